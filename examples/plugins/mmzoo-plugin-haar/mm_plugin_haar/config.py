"""What a configuration may say about the Haar autoencoder. Torch-free, because `mm check` and `mm list`
import it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from mm_core.config.section import SectionModel, invalid

Levels = Annotated[int, Field(ge=0, le=4)]


class HaarVideoConfig(SectionModel):
    """`ae` with `model_id: haar_video`."""

    has_weights: ClassVar[bool] = False
    """Neither `from_pretrained` nor `init: random` is asked for: there is nothing to load."""

    temporal_levels: Levels = 1
    """Frames are gathered in groups of `2 ** temporal_levels`."""
    spatial_levels: Levels = 1
    """Rows and columns are gathered in groups of `2 ** spatial_levels`."""
    latents_mean: list[float] | None = None
    """One number for each latent channel; zeros by default."""
    latents_std: list[Annotated[float, Field(gt=0.0)]] | None = None
    """One number for each latent channel; ones by default."""

    @model_validator(mode="after")
    def _check(self) -> HaarVideoConfig:
        channels = self.latent_channels
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != channels:
                raise invalid(
                    name,
                    f"has {len(values)} numbers, but 3 colours at these levels make {channels} latent "
                    "channels",
                )
        return self

    @property
    def latent_channels(self) -> int:
        """Of the latents; the core compares it with the predictor's channels."""
        return 3 * 2 ** (self.temporal_levels + 2 * self.spatial_levels)

    def size_problem(self, frames: int, height: int, width: int) -> str | None:
        """Return why a video of these sizes cannot be encoded, or None; the core asks before anything is
        built.
        """
        side = 2**self.spatial_levels
        for name, size, factor in (
            ("frames", frames, 2**self.temporal_levels),
            ("height", height, side),
            ("width", width, side),
        ):
            if size % factor:
                near = max(1, size // factor) * factor
                return f"{name} must be a multiple of {factor}; choose {near} or {near + factor}"
        return None
