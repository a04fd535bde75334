"""Clips that the autoencoder cannot encode are found before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mm_core.data.buckets import ClipShape
from mm_core.data.errors import DataError
from mm_core.training.clip_shapes import check_clip_shapes
from mm_registry.errors import UserError


class Clips:
    name = "clips.csv"

    def __init__(self, *shapes: ClipShape | None) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def bucket(self, index: int) -> ClipShape | None:
        return self.shapes[index]


def latent_shape(t: int, h: int, w: int) -> tuple[int, int, int]:
    if t % 2:
        raise UserError(f"frames {t} is odd")
    return t // 2, h // 8, w // 8


MODEL = SimpleNamespace(ae=SimpleNamespace(latent_shape=latent_shape))
GOOD, IMAGE = ClipShape(4, 32, 64), ClipShape(1, 32, 64)


def test_a_shape_without_latents_is_named() -> None:
    with pytest.raises(
        DataError, match=r"^clips\.csv: clips of 2 of its 5 .* 1×32×64 .*frames 1 is odd; images are"
    ):
        check_clip_shapes(Clips(GOOD, IMAGE, GOOD, IMAGE, GOOD), MODEL)


def test_what_cannot_be_known_passes() -> None:
    check_clip_shapes(Clips(GOOD, None), MODEL)
    check_clip_shapes(Clips(IMAGE), SimpleNamespace(ae=None))
    check_clip_shapes(object(), MODEL)
