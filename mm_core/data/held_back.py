"""Samples of a set that are held back from training, to validate with."""

from __future__ import annotations

import torch

from mm_core.data.errors import DataError
from mm_core.random import keyed_generator


def split(size: int, rate: float, seed: int, name: str) -> tuple[list[int], list[int]]:
    """Which samples to train with and which to validate with, both ascending; they follow from the seed and the size alone.

    Args:
        size: samples of the set.
        rate: share of it that is held back, at least one sample.
        name: of the set, for messages.

    Raises:
        DataError: none is left to train with.
    """
    held_back = max(1, round(size * rate))
    if held_back >= size:
        raise DataError(
            f"val_rate {rate:g} holds back {held_back} of the {size} samples of {name}, and none is left to train with; "
            "use a smaller share, or val_data_path"
        )
    order = torch.randperm(size, generator=keyed_generator(seed, "validation")).tolist()
    return sorted(order[held_back:]), sorted(order[:held_back])
