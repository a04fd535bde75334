"""Items to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mm_core.data.errors import DataError

Item = dict[str, Any]
Batch = dict[str, Any]


def collate(items: Sequence[Item]) -> Batch:
    """Stack the items' tensors to `[B, …]`, numbers to a tensor `[B]`, and gather everything else into lists.

    Raises:
        DataError: tensors of one key differ in shape; it names the files.
    """
    batch: Batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if all(isinstance(value, Tensor) for value in values):
            shapes = [tuple(value.shape) for value in values]
            if len(set(shapes)) > 1:
                raise _different_shapes(key, shapes, [str(item.get("file", "?")) for item in items])
            batch[key] = default_collate(values)  # in a worker straight into shared memory
        elif all(isinstance(value, bool | int | float) for value in values):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def _different_shapes(key: str, shapes: list[tuple[int, ...]], files: list[str]) -> DataError:
    other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
    return DataError(
        f"{key} of {files[0]} is {list(shapes[0])}, but of {files[other]} {list(shapes[other])}, and both "
        "are in one micro batch; set group_data to true, make all clips one size (force_resolution true, "
        "drop_short_ratio 1.0), or use --micro-batch-size 1"
    )
