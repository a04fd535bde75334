"""Samples of conversations to a batch, and several of them to one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.data.chat.labels import IGNORED

Sample = Mapping[str, Tensor]
DOCUMENTS = "document_ids"
_PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def join(samples: Sequence[Sample], *, documents: bool) -> dict[str, Tensor]:
    """Put samples into one sequence.

    Args:
        documents: whether `document_ids` int64 `[S]` say which sample each token is of, from 0. Without them the sequence is
            one text, whose tokens see all before them.
    """
    joined = {name: torch.cat([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    if any("mm_token_type_ids" in sample for sample in samples):
        joined["mm_token_type_ids"] = torch.cat([_kinds(sample) for sample in samples])
    joined |= _pictures(samples)
    if documents:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        joined[DOCUMENTS] = torch.arange(len(samples)).repeat_interleave(lengths)
    return joined


@dataclass(frozen=True, slots=True)
class ChatCollate:
    """Samples to a batch, padded on the right.

    A batch has `input_ids`, `labels` (-100 where nothing is learnt) and `attention_mask` (0 where it is padded), int64
    `[B, S]`; where a sample has pictures `mm_token_type_ids` `[B, S]` and the pixels and grids of all samples one after
    another; of packed samples `document_ids` `[B, S]`, -1 where it is padded.

    Args:
        pad_id: token of the padding.
        multiple: S is one of it.
    """

    pad_id: int
    multiple: int = 8

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.multiple) * self.multiple

        def padded(rows: Sequence[Tensor], value: int) -> Tensor:
            return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in rows])

        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": padded(ids, self.pad_id),
            "labels": padded([sample["labels"] for sample in samples], IGNORED),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }
        if any("mm_token_type_ids" in sample for sample in samples):
            batch["mm_token_type_ids"] = padded([_kinds(sample) for sample in samples], 0)
        if DOCUMENTS in samples[0]:
            batch[DOCUMENTS] = padded([sample[DOCUMENTS] for sample in samples], -1)
        return {**batch, **_pictures(samples)}


def _kinds(sample: Sample) -> Tensor:
    kinds = sample.get("mm_token_type_ids")
    return torch.zeros_like(sample["input_ids"]) if kinds is None else kinds


def _pictures(samples: Sequence[Sample]) -> dict[str, Tensor]:
    found = {name: [sample[name] for sample in samples if name in sample] for name in _PICTURES}
    return {name: torch.cat(values) for name, values in found.items() if values}
