"""The size at which the conformance kit tries the autoencoder out. Torch-free data; nothing else reads it."""

from __future__ import annotations

from mm_core.testing.example import Example

HAAR_VIDEO = Example({"temporal_levels": 1, "spatial_levels": 2}, video=(4, 8, 16))
