"""Patch embedding of videos as the matrix product that it is."""

from __future__ import annotations

from mm_core.models.patch_embedding import PatchConv3d


class LinearPatchEmbedding(PatchConv3d):
    """A Conv3d whose stride is its kernel, computed as a Linear over flattened patches."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)
