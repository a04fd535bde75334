"""Patch embedding of images and videos as the matrix product that it is."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn


class PatchConv3d(nn.Conv3d):
    """A Conv3d whose stride is its kernel, computed as a Linear over flattened patches.

    Patches do not overlap, so the convolution is exactly one product of the patches with the flattened kernel. As a
    convolution it is 10 to 50 times slower on recent torch and missing in bf16 on some accelerators. Parameters keep Conv3d's
    names, shapes and initial distribution, so published weights load as they are. The eager twin is `nn.Conv3d.forward`.
    """

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> Self:
        """Return a module that has the parameters of a convolution, for which `is_patch_embedding` is true."""
        with torch.device("meta"):
            made = cls(
                convolution.in_channels,
                convolution.out_channels,
                kernel_size=convolution.kernel_size,
                stride=convolution.stride,
                bias=convolution.bias is not None,
            )
        made.weight, made.bias = convolution.weight, convolution.bias
        return made.train(convolution.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, T, H, W]` to `[B, D, T // pt, H // ph, W // pw]`; what is left of a patch at an end is not read.

        The input is cast to the parameters' dtype: samplers keep latents in fp32 whatever the model computes in.
        """
        pt, ph, pw = self.kernel_size
        t, h, w = input.shape[2] // pt, input.shape[3] // ph, input.shape[4] // pw
        patches = input[:, :, : t * pt, : h * ph, : w * pw].to(self.weight.dtype)
        patches = patches.reshape(len(input), self.in_channels, t, pt, h, ph, w, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T', H', W', C*pt*ph*pw]
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)  # [B, T', H', W', D]
        # A view with Conv3d's shape: flatten(2).transpose(1, 2) of it is contiguous without a copy.
        return embedded.permute(0, 4, 1, 2, 3)


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module is a Conv3d whose patches neither overlap nor are padded, and nothing else."""
    return (
        type(module) is nn.Conv3d
        and module.stride == module.kernel_size
        and module.padding == (0, 0, 0)
        and module.dilation == (1, 1, 1)
        and module.groups == 1
    )


def compute_patches_as_linear(network: nn.Module) -> tuple[str, ...]:
    """Let each patch embedding of a network be computed as a product of matrices, in place.

    Parameters stay the same objects under the same names.

    Returns:
        Paths of the modules that are.
    """
    found = tuple(name for name, module in network.named_modules() if name and is_patch_embedding(module))
    for name in found:
        convolution = network.get_submodule(name)
        assert isinstance(convolution, nn.Conv3d)
        network.set_submodule(name, PatchConv3d.of(convolution))
    return found
