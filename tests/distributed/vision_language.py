"""Tiny Qwen3-VL models, dense and of experts, and the global batches of texts, images and videos that they are trained on.

Kinds of samples are mixed in every way: with images, with a video, with both, with neither; so one micro batch needs the
vision tower, and the next does not.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mm_core.sharding import ShardingPolicy
from mm_plugin_qwen3vl.policy import qwen3_vl, qwen3_vl_moe
from tests import tiny_vlm
from tests.distributed.models import BATCH, Batch, TinyModel

MIXED = ("two_images", "text", "video", "image", "image", "text", "text", "video")
"""Kind of each sample of a global batch; micro batches of two: with images, with both, with images, with a video."""
TEXTS_APART = ("text", "text", "image", "two_images", "text", "text", "video", "image")
"""Here half of the micro batches of two have texts alone."""
LENGTH = 40
"""Tokens of a row, padded; rows of 17 to 34."""
_TEXT = "model.language_model"


def samples(step: int, kinds: Iterable[str] = MIXED) -> list[dict[str, torch.Tensor]]:
    """The samples of a global batch. They differ in how many of their tokens are learnt."""
    return [
        tiny_vlm.sample(kind, 4 + (3 * number + step) % 8, 100 * step + number)
        for number, kind in enumerate(kinds)
    ]


def micro_batch(step: int, first: int, size: int, kinds: Iterable[str] = MIXED) -> Batch:
    """Some samples of a global batch as the language task takes them."""
    return tiny_vlm.collate(samples(step, kinds)[first : first + size], LENGTH)


def make(moe: bool) -> nn.Module:
    """The network on the default device; its experts in transformers' plain form."""
    config = tiny_vlm.tiny_qwen3_vl(moe)
    network: nn.Module = tiny_vlm.network_of(config, experts_implementation="eager" if moe else None)
    return network


@functools.cache
def policy(moe: bool) -> ShardingPolicy:
    """What the plugin registers, for the tiny networks."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_vlm.tiny_qwen3_vl(moe).save_pretrained(folder)
        return (qwen3_vl_moe if moe else qwen3_vl)({"init_from_hf_path": str(Path(folder))})


def _losses(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {k: v for k, v in batch.items() if k not in ("labels", "sample_index")}
    logits = module(**arguments, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum(1), (labels >= 0).sum(1).float()


def tiny_model(name: str) -> TinyModel:
    """For the sharding matrix."""
    moe = is_moe(name)
    return TinyModel(
        name,
        functools.partial(make, moe),
        policy(moe),
        samples,  # type: ignore[arg-type]  # `take` makes tensors of them
        _losses,
        blocks=f"{_TEXT}.layers.{{*}}",
        parts=f"{_TEXT}.layers.{{*}}.mlp",
        attention=f"{_TEXT}.layers.{{*}}.self_attn",
        frozen="model.visual.blocks.{*}.mlp",
        take=lambda batch, part: tiny_vlm.collate(batch[part], LENGTH),
    )


assert len(MIXED) == len(TEXTS_APART) == BATCH


def names() -> tuple[str, ...]:
    """Of both models."""
    return "qwen3_vl", "qwen3_vl_moe"


def is_moe(name: str) -> bool:
    """Whether a model has experts, by its name."""
    return name == "qwen3_vl_moe"
