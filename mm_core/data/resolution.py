"""Which size in pixels a clip gets, and which videos are refused for their shape."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResolutionRule:
    """How sizes are chosen; the fields are those of `preprocess_parameters`.

    Attributes:
        max_height, max_width: the size of every clip with `force_resolution`; else what `"auto"` means in
            `train_pipeline`.
        force_resolution: True: clips of exactly `max_height` × `max_width`. False: each keeps its aspect
            ratio.
        max_hxw: most pixels (height × width) of a clip that keeps its ratio; `max_height` × `max_width` by
            default.
        min_hxw: fewest pixels of one; a quarter of `max_hxw` by default.
        hw_stride: height and width of a clip that keeps its ratio are cut to multiples of this.
        hw_aspect_thr: with `force_resolution`, the most that height / width may differ from the wanted ratio,
            as a factor; without, the most that the sides may differ from each other. 0 means 1.5.
    """

    max_height: int = 480
    max_width: int = 640
    force_resolution: bool = True
    max_hxw: int | None = None
    min_hxw: int | None = None
    hw_stride: int = 32
    hw_aspect_thr: float = 1.5

    @property
    def max_area(self) -> int:
        """Most pixels of a clip that keeps its aspect ratio."""
        return self.max_hxw if self.max_hxw is not None else self.max_height * self.max_width

    @property
    def min_area(self) -> int:
        """Fewest pixels of a clip that keeps its aspect ratio."""
        return self.min_hxw if self.min_hxw is not None else self.max_area // 4

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the clip that a video becomes under the default transforms."""
        if self.force_resolution:
            return self.max_height, self.max_width
        height, width = shrink_to_area(height, width, self.max_area)
        return height // self.hw_stride * self.hw_stride, width // self.hw_stride * self.hw_stride

    def refusal(self, height: int, width: int) -> str | None:
        """Return why a video of this size is refused, or None."""
        threshold = self.hw_aspect_thr or 1.5
        if self.force_resolution:
            ratio, wanted = height / width, self.max_height / self.max_width
        else:
            new_height, new_width = self.size(height, width)
            if new_height * new_width < max(self.min_area, 1):
                made = f"{new_height}×{new_width} (from {height}×{width})"
                if not new_height * new_width:
                    return f"{made}: a side is shorter than hw_stride ({self.hw_stride})"
                return f"{made} has fewer than {self.min_area} pixels (min_hxw)"
            ratio, wanted = new_height / new_width, 1.0
        if wanted / threshold <= ratio <= wanted * threshold:
            return None
        allowed = f"within a factor of {threshold:g} (hw_aspect_thr) of {wanted:.2f}"
        return f"height / width is {ratio:.2f}, not {allowed}"


def shrink_to_area(height: int, width: int, area: int) -> tuple[int, int]:
    """Return the size scaled down, never up, to at most `area` pixels."""
    if height * width <= area:
        return height, width
    scale = math.sqrt(area / (height * width))
    return max(1, int(height * scale)), max(1, int(width * scale))
