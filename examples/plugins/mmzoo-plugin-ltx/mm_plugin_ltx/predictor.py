"""LTX-Video's diffusion transformer, computed by diffusers' LTXVideoTransformer3DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from torch import nn
from torch.distributed.tensor import DTensor

from mm_plugin_ltx.weights import config_differences, diffusers_config
from mm_registry.errors import UserError


class LTXDiT(LTXVideoTransformer3DModel):
    """The text-to-video transformer of LTX-Video (HaCohen et al., "LTX-Video: Realtime Video Latent
    Diffusion", 2024).

    State-dict keys, initial distributions and mathematics are those of diffusers' class, which takes tokens;
    this one takes latents `[B, C, T, H, W]`.

    Args:
        in_dim, out_dim: latent channels.
        patch_size: latent frames, rows and columns of one token.
        num_heads, head_dim, num_layers: sizes of the transformer.
        text_dim: width of the text encoder's embeddings.
        cross_attention_dim: None or `num_heads * head_dim`.
        norm_eps: of the blocks' norms.
        frame_rate: frames a second, unless `forward` is told another.
        temporal_compression, spatial_compression: frames and pixels a latent, by the autoencoder.
        checkpoint_keys: read by the weights adapter, not here.

    Raises:
        UserError: sizes that contradict each other.
    """

    def __init__(
        self,
        *,
        in_dim: int = 128,
        out_dim: int = 128,
        patch_size: tuple[int, int, int] = (1, 1, 1),
        num_heads: int = 32,
        head_dim: int = 64,
        num_layers: int = 28,
        text_dim: int = 4096,
        cross_attention_dim: int | None = None,
        norm_eps: float = 1e-6,
        frame_rate: float = 25.0,
        temporal_compression: int = 8,
        spatial_compression: int = 32,
        checkpoint_keys: str = "diffusers",
    ) -> None:
        width = num_heads * head_dim
        if cross_attention_dim not in (None, width):
            raise UserError(
                f"ltx_dit: cross_attention_dim {cross_attention_dim} is not num_heads * head_dim, {width}; "
                "leave it out"
            )
        if patch_size[1] != patch_size[2]:
            raise UserError(f"ltx_dit: patch_size {list(patch_size)}: rows and columns must be equal")
        arguments = diffusers_config(
            {
                "in_dim": in_dim,
                "out_dim": out_dim,
                "patch_size": patch_size,
                "num_heads": num_heads,
                "head_dim": head_dim,
                "num_layers": num_layers,
                "text_dim": text_dim,
                "norm_eps": norm_eps,
            }
        )
        super().__init__(**arguments)
        self.in_dim = in_dim
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.frame_rate = frame_rate
        self.compression = (temporal_compression, spatial_compression)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt: torch.Tensor | list[torch.Tensor],
        prompt_mask: torch.Tensor | list[torch.Tensor] | None = None,
        frame_rate: float | torch.Tensor | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """Predict the velocity (noise - video) of noised latents.

        Args:
            latents: `[B, C, T, H, W]`, T, H and W divisible by the patch.
            timestep: `[B]`, or `[B, S]` for one a token; values in `[0, 1000]`.
            prompt: text embeddings `[B, L, D]`; a list is one per text encoder, and LTX-Video has one.
            prompt_mask: `[B, L]`, 1 for tokens of the prompt, which alone are attended to. None: all.
            frame_rate: frames a second, one number or `[B]`; None takes the section's.

        Returns:
            `[B, C, T, H, W]` in the parameters' dtype.

        Raises:
            UserError: latents of other channels, or of sizes that the patch does not divide.
            TypeError: a condition that text to video does not have.
        """
        if conditions:
            raise TypeError(f"ltx_dit (text to video) takes no condition {', '.join(sorted(conditions))}")
        T, H, W = self._token_grid(latents)
        B = latents.shape[0]
        if timestep.shape not in ((B,), (B, T * H * W)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}, but needs [{B}] or [{B}, {T * H * W}]"
            )
        text = _like(self.caption_projection.linear_1.weight, _single(prompt))
        tokens: torch.Tensor = super().forward(
            hidden_states=_like(self.proj_in.weight, pack(latents, self.patch_size)),
            encoder_hidden_states=text,
            timestep=timestep,
            encoder_attention_mask=None if prompt_mask is None else _single(prompt_mask),
            num_frames=T,
            height=H,
            width=W,
            rope_interpolation_scale=self._rope_scale(frame_rate),
            return_dict=False,
        )[0]
        return unpack(tokens, (T, H, W), self.patch_size)

    def _rope_scale(self, frame_rate: float | torch.Tensor | None) -> tuple[Any, int, int]:
        """Seconds, pixels and pixels of one latent: the units of the rotary positions."""
        frames, pixels = self.compression
        rate = self.frame_rate if frame_rate is None else frame_rate
        seconds = frames / (rate.float().view(-1, 1, 1, 1, 1) if isinstance(rate, torch.Tensor) else rate)
        return seconds, pixels, pixels

    def _token_grid(self, latents: torch.Tensor) -> tuple[int, int, int]:
        if latents.shape[1] != self.in_dim:
            raise UserError(
                f"ltx_dit: the latents have {latents.shape[1]} channels, but in_dim is {self.in_dim}; "
                "it must be the number of the autoencoder"
            )
        for axis, size, patch in zip("THW", latents.shape[2:], self.patch_size, strict=True):
            if size % patch:
                raise UserError(
                    f"ltx_dit: latent size {axis}={size} is not divisible by the patch's {patch}; "
                    "choose a video size that the autoencoder's factor times patch_size divides"
                )
        T, H, W = (size // patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True))
        return T, H, W

    def check_pretrained_config(self, config: Mapping[str, Any]) -> list[str]:
        """What a diffusers config.json says otherwise than this network."""
        ours = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return config_differences(ours, config)

    def init_module(self, module: nn.Module) -> bool:
        """Draw upstream's initial values of the modulation tables; other modules reset themselves."""
        if module is not self and not isinstance(module, LTXVideoTransformerBlock):
            return False
        table = module.scale_shift_table  # [2 or 6, D]
        nn.init.normal_(table, std=table.shape[-1] ** -0.5)
        return True


def pack(latents: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """Latents `[B, C, T, H, W]` -> tokens `[B, S, C * patch volume]`, frames outermost."""
    B, C, T, H, W = latents.shape
    pt, ph, pw = patch
    cut = latents.reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def unpack(tokens: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> torch.Tensor:
    """The reverse of `pack`; `grid` is frames, rows and columns in tokens."""
    B = tokens.shape[0]
    (T, H, W), (pt, ph, pw) = grid, patch
    cut = tokens.reshape(B, T, H, W, -1, pt, ph, pw)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, -1, T * pt, H * ph, W * pw)


def _like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Cast to a weight's dtype, unless it belongs to a unit that FSDP has yet to gather and cast."""
    return value if isinstance(weight, DTensor) else value.to(weight.dtype)


def _single(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if len(value) != 1:
        raise UserError(f"ltx_dit: LTX-Video reads one text encoder, but the model has {len(value)}")
    return value[0]
