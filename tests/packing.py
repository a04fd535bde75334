"""Rows that hold several samples one after another, as batches of packed documents have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

Sample = Mapping[str, torch.Tensor]
FILLS = {"input_ids": 0, "labels": -100, "mm_token_type_ids": 0, "document_ids": -1}
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def packed(rows: Sequence[Sequence[Sample]], length: int) -> dict[str, torch.Tensor]:
    """A batch of rows of `length` tokens, each of which holds the samples of one list, and padding at its end."""
    made: dict[str, list[torch.Tensor]] = {name: [] for name in FILLS}
    for row in rows:
        for name, fill in FILLS.items():
            parts = [
                torch.full_like(one["input_ids"], number) if name == "document_ids" else one[name]
                for number, one in enumerate(row)
            ]
            joined = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
            made[name].append(F.pad(joined, (0, length - len(joined)), value=fill))
    batch = {name: torch.stack(tensors) for name, tensors in made.items()}
    for name in PICTURES:
        if parts := [one[name] for row in rows for one in row if name in one]:
            batch[name] = torch.cat(parts)
    return batch
