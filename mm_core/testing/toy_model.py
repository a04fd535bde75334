"""A whole model of a few hundred parameters, and a batch for it: what tasks and callbacks are tried out with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mm_core.models.sora import SoRAModel
from mm_core.testing import builds

_CHANNELS, _WIDTH, _WORDS = 4, 8, 16


class _Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(_CHANNELS, _CHANNELS, 1)
        self.condition = nn.Linear(_WIDTH + 1, _CHANNELS)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: Any, prompt_mask: Any = None
    ) -> torch.Tensor:
        text, mask = (v[0] if isinstance(v, list) else v for v in (prompt, prompt_mask))
        pooled = (text if mask is None else text * mask.unsqueeze(-1)).mean(1)  # [B, D]
        shift = self.condition(torch.cat([pooled, timestep.view(-1, 1) / 1000], dim=1))  # [B, C]
        output: torch.Tensor = self.mix(latents) + shift.view(*shift.shape, 1, 1, 1)
        return output


class _AutoEncoder(nn.Module):
    latent_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.channels = nn.Conv3d(3, _CHANNELS, 1)

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        return t, h, w

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.channels(video)
        return latents


class ToyTextEncoder(nn.Module):
    """A table of embeddings `[16, width]`."""

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.table = nn.Embedding(_WORDS, width)

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table(input_ids), attention_mask


class ToyTokenizer:
    """Ids from the lengths of words, for `ToyTextEncoder`."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [len(word) % _WORDS for word in text.split()][: self.max_length]
        padding = self.max_length - len(ids)
        return torch.tensor(ids + [0] * padding), torch.tensor([1] * len(ids) + [0] * padding)

    def __len__(self) -> int:
        return _WORDS


class _Flow:
    """Rectified flow on ten steps."""

    num_train_timesteps = 10
    guidance_scale = 0.0
    sigmas = torch.linspace(1.0, 0.1, 10, device="cpu")
    timesteps = sigmas * 1000

    def q_sample(
        self, latents: Any, noise: Any = None, t: Any = None, generator: Any = None, **_: Any
    ) -> Any:
        several = isinstance(generator, Sequence)
        keys = list(generator) if several else [generator] * len(latents)
        if t is None:
            t = self.timesteps[torch.cat([torch.randint(0, 10, (1,), generator=key) for key in keys])]
        if noise is None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=key) for key in keys])
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise, t

    def training_losses(self, model_output: Any, x_start: Any, x_t: Any, noise: Any, t: Any, **_: Any) -> Any:
        return (model_output.float() - (noise - x_start).float()).square().flatten(1).mean(1)

    def sample(self, model: Any, latents: Any, model_kwargs: Any, **_: Any) -> Any:
        return latents - model(latents, self.timesteps[:1].expand(len(latents)), **model_kwargs)


def toy_model() -> SoRAModel:
    """A `SoRAModel` of toy components, the same at every call."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        diffusion: Any = _Flow()
        return SoRAModel(
            predictor=_Predictor(), ae=_AutoEncoder(), text_encoder=ToyTextEncoder(), diffusion=diffusion
        )
    finally:
        torch.set_rng_state(state)


def toy_batch(first: int = 0, count: int = 2) -> dict[str, Any]:
    """A micro batch as the loader makes it; sample k is the same in every batch."""
    rows = range(first, first + count)
    return {
        "video": builds.samples(first + count, (3, 2, 4, 4), 0, "video")[first:].tanh(),
        "prompt_ids": torch.tensor([[(i + j) % _WORDS for j in range(5)] for i in rows]),
        "prompt_mask": torch.tensor([[1] * (4 - i % 3) + [0] * (1 + i % 3) for i in rows]),
        "sample_index": torch.tensor(list(rows)),
        "file": [f"clip-{i}.mp4" for i in rows],
    }
