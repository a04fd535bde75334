"""Patch embedding of videos as the matrix product that it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LinearPatchEmbedding(nn.Conv3d):
    """A Conv3d whose stride is its kernel, computed as a Linear over flattened patches.

    Patches do not overlap, so the convolution is exactly one product of the patches with the flattened
    kernel. As a convolution it is 10 to 50 times slower on recent torch and missing in bf16 on some
    accelerators. Parameters keep Conv3d's names, shapes and initial distribution, so published weights load
    as they are.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, T, H, W]` to `[B, D, T/pt, H/ph, W/pw]`; sizes must be divisible by the patch.

        The input is cast to the parameters' dtype: samplers keep latents in fp32 whatever the model computes
        in.
        """
        B, C, T, H, W = input.shape
        pt, ph, pw = self.kernel_size
        patches = input.to(self.weight.dtype).reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T', H', W', C*pt*ph*pw]
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)  # [B, T', H', W', D]
        # A view with Conv3d's shape: flatten(2).transpose(1, 2) of it is contiguous without a copy.
        return embedded.permute(0, 4, 1, 2, 3)
