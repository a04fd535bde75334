"""The clips of a set against the autoencoder, before the first step rather than at the first odd one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mm_core.data.errors import DataError
from mm_registry.errors import UserError


def check_clip_shapes(dataset: Any, model: Any) -> None:
    """Check that the autoencoder has latents of each shape of clip that the set gives.

    A set that does not know its shapes (`bucket`), and a model without an autoencoder, pass.

    Raises:
        DataError: a shape cannot be encoded; it says which, and of how many samples.
    """
    ae, bucket = getattr(model, "ae", None), getattr(dataset, "bucket", None)
    if bucket is None or not callable(latent_shape := getattr(ae, "latent_shape", None)):
        return
    shapes = Counter(bucket(index) for index in range(len(dataset)))
    for shape, count in shapes.most_common():
        if shape is None:
            continue
        try:
            latent_shape(*shape)
        except UserError as error:
            name = getattr(dataset, "name", type(dataset).__name__)
            images = "; images are clips of one frame" if shape.frames == 1 else ""
            raise DataError(
                f"{name}: clips of {count} of its {len(dataset)} samples are {shape} (frames × height × width): "
                f"{error}{images} (`mm data inspect` shows all shapes)"
            ) from error
