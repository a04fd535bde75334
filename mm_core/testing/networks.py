"""How the kit tries out a network of transformers: its folder, its inputs, and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.config.document import expanded
from mm_core.config.latents import read_hf_config
from mm_core.config.transformers_model import ExampleImage, TransformersFamilyConfig
from mm_core.random import keyed_generator
from mm_core.testing.check import CheckFailed

if TYPE_CHECKING:
    from mm_core.testing.case import Case

Inputs = dict[str, Any]
LENGTH = 16
_PIXELS = 128 * 128
_WORDS = 8  # learnt at the end of each sample; the shortest one has two


def hf_config(case: Case) -> dict[str, Any]:
    """config.json of the example's folder."""
    return dict(read_hf_config(expanded(case.component.from_pretrained or "")))


def example_image(case: Case) -> ExampleImage | None:
    """The image that its config class describes; None if it takes none, or describes none."""
    family = case.component.config
    if not isinstance(family, TransformersFamilyConfig):
        return None
    pixels = (case.example.pixels if case.example is not None else None) or _PIXELS
    return family.example_image(hf_config(case), pixels, LENGTH - _WORDS)


def network_inputs(case: Case, batch: int, seed: int = 0) -> Inputs:
    """Arguments of its forward: `input_ids` and `attention_mask` `[B, LENGTH]`, padded at the end, and an image a sample if
    its config class describes one. Sample k is the same in every batch.
    """
    config, image = hf_config(case), example_image(case)
    vocabulary = config.get("text_config", config).get("vocab_size", 2)
    rows = [
        torch.randint(vocabulary // 2, (LENGTH,), generator=keyed_generator(seed, "tokens", i))
        for i in range(batch)
    ]
    ids = torch.stack(rows)
    lengths = torch.tensor([LENGTH - 2 * (i % 3) for i in range(batch)])
    given: Inputs = {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}
    if image is None:
        return given
    ids[:, : image.tokens] = image.token_id
    kinds = torch.zeros_like(ids)
    kinds[:, : image.tokens] = 1
    pixels = [
        torch.randn(image.patches, image.values, generator=keyed_generator(seed, "pixels", i))
        for i in range(batch)
    ]
    return {
        **given,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor([image.grid] * batch),
    }


def labels_of(given: Inputs) -> torch.Tensor:
    """The ids where there is text, -100 elsewhere, `[B, S]`."""
    learnt = given["attention_mask"].bool() & (given.get("mm_token_type_ids", torch.zeros(())) == 0)
    return given["input_ids"].masked_fill(~learnt, -100)


def run_network(module: nn.Module, given: Inputs) -> torch.Tensor:
    """Logits `[B, S, V]`; zero where a row is padded, whose values mean nothing."""
    output: Any = module(**given, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise CheckFailed(f"its forward returns a {type(output).__name__} without logits")
    if logits.shape[:2] != given["input_ids"].shape:
        raise CheckFailed(f"logits are {list(logits.shape)} for {list(given['input_ids'].shape)} tokens")
    return logits * given["attention_mask"].unsqueeze(-1).to(logits.dtype)


def network_part(given: Inputs, rows: slice) -> Inputs:
    """Some samples of a batch, with their images."""
    samples = len(given["input_ids"])
    first, last, _ = rows.indices(samples)
    found = {}
    for name, value in given.items():
        each = len(value) // samples  # patches of a sample's image, and 1 of everything else
        found[name] = value[first * each : last * each]
    return found
