"""The autoencoder must be able to encode the videos of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding
from mm_core.config.latents import check_size


def check_clip_size(
    components: Mapping[str, ComponentConfig], dataset: ComponentConfig, document: Document
) -> Iterator[Finding]:
    """The autoencoder must be able to encode the dataset's clips."""
    ae, settings = components.get("ae"), dataset.fields.get("preprocess_parameters")
    if ae is None or not isinstance(settings, Mapping):
        return
    # Without force_resolution sides vary, and are multiples of the stride.
    fixed = settings.get("force_resolution", True)
    keys = ("num_frames", *(("max_height", "max_width") if fixed else ("hw_stride", "hw_stride")))
    places = {
        axis: (*dataset.path, "preprocess_parameters", key)
        for axis, key in zip(("frames", "height", "width"), keys, strict=True)
    }
    sizes = {axis: settings.get(path[-1]) for axis, path in places.items()}
    yield from check_size(ae, document, places, sizes)


def check_video_size(components: Mapping[str, ComponentConfig], document: Document) -> Iterator[Finding]:
    """The autoencoder must have latents of the size of the video that is generated."""
    ae, pipeline = components.get("ae"), components.get("pipeline")
    size = pipeline.fields.get("input_size") if pipeline is not None else None
    if ae is None or pipeline is None or not isinstance(size, list | tuple) or len(size) != 3:
        return
    axes = ("frames", "height", "width")
    places = {axis: (*pipeline.path, "input_size", index) for index, axis in enumerate(axes)}
    yield from check_size(ae, document, places, dict(zip(axes, size, strict=True)))
