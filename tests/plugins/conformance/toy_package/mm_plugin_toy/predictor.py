"""A small diffusion transformer in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm_registry.errors import UserError


class ToyAttention(nn.Module):
    """Tokens see each other; by itself, so that ranks that share a sequence can exchange here. It has one head."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen = F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
        return seen.squeeze(1)  # [B, S, D]


class ToyBlock(nn.Module):
    """Self-attention, cross-attention to the prompt and an MLP, behind a gate that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.attend = ToyAttention()
        self.read = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(self.norm(tokens)).chunk(3, dim=-1)  # each [B, S, D]
        seen = self.attend(query, key, value)
        told = F.scaled_dot_product_attention(self.read(seen), text, text, attn_mask=keep.unsqueeze(1))
        return tokens + self.gate * torch.tanh(self.mlp(seen + told))


class ToyDiT(nn.Module):
    """Latents `[B, C, T, H, W]`, H and W even, to a velocity of the same shape."""

    def __init__(self, *, channels: int = 4, width: int = 8, text_dim: int = 6, num_layers: int = 2) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.embed = nn.Linear(4 * channels, width)
        self.time = nn.Linear(width, width)
        self.text = nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(num_layers))
        self.head = nn.Linear(width, 4 * channels)
        self.register_buffer("frequencies", self._frequencies(), persistent=False)

    def _frequencies(self) -> torch.Tensor:
        return 10.0 ** -torch.linspace(0, 3, self.width // 2)

    def reset_buffers(self, device: torch.device) -> None:
        self.frequencies = self._frequencies().to(device)

    def init_module(self, module: nn.Module) -> bool:
        if not isinstance(module, ToyBlock):
            return False
        nn.init.zeros_(module.gate)
        return True

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Any,
        prompt_mask: Any = None,
        stage: Any = None,
        **conditions: Any,
    ) -> Any:
        if conditions:
            raise TypeError(f"toy_dit takes no condition {', '.join(sorted(conditions))}")
        text = prompt[0] if isinstance(prompt, list) else prompt
        mask = prompt_mask[0] if isinstance(prompt_mask, list) else prompt_mask
        B, C, T, H, W = latents.shape
        if H % 2 or W % 2:
            raise UserError(f"toy_dit: {H} x {W} latents cannot be cut into patches of 2 x 2")
        keep = torch.ones_like(text[..., 0]).bool() if mask is None else mask > 0  # [B, L]
        if stage is None or stage.first:
            tokens, text = self._begin(latents, timestep, text)
        else:
            tokens, text = stage.received
        for block in self.blocks:
            tokens = block(tokens, text, keep)
        if stage is not None and not stage.last:
            return tokens, text
        patches = self.head(tokens).reshape(B, T, H // 2, W // 2, C, 2, 2)
        return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(B, C, T, H, W)

    def _begin(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
        B, C, T, H, W = latents.shape
        latents, text = latents.to(self.embed.weight.dtype), text.to(self.embed.weight.dtype)
        patches = latents.reshape(B, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        tokens = self.embed(patches.reshape(B, -1, 4 * C))  # [B, S, D]
        angles = timestep.float().view(B, 1) * self.frequencies.float()
        time = torch.cat([angles.sin(), angles.cos()], dim=1).to(tokens.dtype)
        return tokens + self.time(time).unsqueeze(1), self.text(text)

    def stage_boundary(
        self, latents: Any, timestep: Any, prompt: Any, prompt_mask: Any = None, *, dtype: Any
    ) -> Any:
        B, _, T, H, W = latents.shape
        lengths = (T * H * W // 4, prompt.shape[1])
        return tuple(torch.empty(B, length, self.width, dtype=dtype, device="meta") for length in lengths)
