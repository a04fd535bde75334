"""`Example`: how the conformance kit builds a component of a plugin. Torch-free data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Example:
    """A tiny section of one component, and the sizes of what it is given.

    A plugin declares it in the entry-point group `mm_core.examples`, named `role/id` as a config class is. The
    target is an `Example`, or a function without arguments that returns one, in a module without torch. Sizes
    that are None are derived from the section where that can be done.

    Attributes:
        section: what a user writes, without `model_id`; small, with `"init": "random"` where there are weights.
        latents: `(C, T, H, W)` of one sample, for a predictor or a diffusion.
        prompt: `(L, D)` of one sample, for a predictor.
        video: `(T, H, W)` in pixels, for an autoencoder.
        tokens: `L` of one sample, for a text encoder.
        config: config.json of the folder that `init_from_hf_path` names, for a transformers model; tiny. The kit writes it.
        pixels: area of an image, at most, for a transformers model that takes some.
        known_failures: name of a check -> why this component fails it. Such a failure does not count; a pass does.
    """

    section: Mapping[str, Any] = field(default_factory=_empty)
    latents: tuple[int, int, int, int] | None = None
    prompt: tuple[int, int] | None = None
    video: tuple[int, int, int] | None = None
    tokens: int | None = None
    config: Mapping[str, Any] = field(default_factory=_empty)
    pixels: int | None = None
    known_failures: Mapping[str, str] = field(default_factory=_empty)
