"""What components promise each other. Structural types: a component needs no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
Guidance: TypeAlias = float | Callable[[float], float]
"""Scale of classifier-free guidance: one number, or a function of the timestep value (one scale per
expert).
"""
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Denoiser(Protocol):
    """A predictor, or a function that chooses one by timestep."""

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> torch.Tensor: ...


@runtime_checkable
class Diffusion(Protocol):
    """`DIFFUSION_MODEL_MAPPINGS[id](**fields)`: how latents are noised, what the loss is, how samples are
    drawn.
    """

    sigmas: torch.Tensor
    """Noise levels, descending."""
    timesteps: torch.Tensor
    """The values that the predictor is given, descending."""
    num_train_timesteps: int
    guidance_scale: float | Sequence[float]

    def q_sample(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        generator: Generators | None = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return noised latents, noise and timesteps `[B]`. `t` are timestep values; outside the trained
        range is allowed when given.
        """
        ...

    def training_losses(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        **conditions: Any,
    ) -> torch.Tensor:
        """Return the loss of each sample, `[B]` in fp32."""
        ...

    def sample(
        self,
        model: Denoiser,
        latents: torch.Tensor,
        model_kwargs: Mapping[str, Any],
        *,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
        generator: Generators | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Denoise `latents` (noise at first) and return clean latents."""
        ...


@runtime_checkable
class ExpertDiffusion(Protocol):
    """A `Diffusion` whose noise levels two experts may share while they are trained in one job. Of any other, too,
    `timestep_at` is asked where it is there.
    """

    boundary_timestep: float | None
    """Timestep value at and above which the high-noise expert works; None: one expert is trained."""

    def timesteps_of(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Return the timesteps `[B]` that `q_sample` would draw from these generators, whatever the latents are."""
        ...

    def timestep_at(self, quantile: float) -> float:
        """Return the trained timestep value at a quantile of all: 0.0 is the least noise. The loss of a validation set is
        taken at some of them.
        """
        ...


@runtime_checkable
class Predictor(Protocol):
    """`PREDICTOR_MODEL_MAPPINGS[id](**fields)`, an `nn.Module` that can be built on the meta device.

    Optional: `reset_buffers(device)` fills non-persistent buffers after a meta build; `init_module(module)
    -> bool` draws the initial values of a module without `reset_parameters`.
    `patch_size` (latent frames, rows and columns of one token) lets the task count tokens.
    """

    def forward(
        self,
        latents: torch.Tensor,  # [B, C, T, H, W]
        timestep: torch.Tensor,  # [B] or [B, S]
        prompt: torch.Tensor | list[torch.Tensor],  # [B, L, D], a list with one a text encoder
        prompt_mask: torch.Tensor | list[torch.Tensor] | None = None,  # [B, L]
        **conditions: Any,
    ) -> torch.Tensor: ...  # [B, C, T, H, W]


@runtime_checkable
class AutoEncoder(Protocol):
    """`AE_MODEL_MAPPINGS[id](**fields)`, an `nn.Module`. With weights it also has `from_pretrained(folder,
    *, dtype, **fields)`.

    One whose `encode` draws from a distribution has `do_sample = True` and takes `generator` (one, or one a
    sample).
    """

    latent_channels: int

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] -> normalised latents `[B, C, T', h, w]`."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        ...

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """`(T', h', w')` of a video of `t` frames of `h` by `w` pixels; `UserError` if it cannot encode
        that size.
        """
        ...


@runtime_checkable
class I2VProcessor(Protocol):
    """`I2V_PROCESSOR_MAPPINGS[id](**fields)`, an `nn.Module` if it has weights: from given frames to conditions."""

    def __call__(
        self, ae: Any, videos: torch.Tensor, latents: torch.Tensor | None = None, **batch: Any
    ) -> Mapping[str, torch.Tensor]:
        """Videos `[B, 3, T, H, W]` in [-1, 1], their latents and the rest of the micro batch -> keyword arguments of the
        predictor, `q_sample` and `training_losses`; tensors `[B, …]`, a sample's own alone deciding its row.
        """
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """`TEXT_ENCODER_MAPPINGS[id](**fields)`, an `nn.Module`; and `from_pretrained(folder, *, dtype,
    **fields)`.
    """

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, L]` -> embeddings `[B, L, D]` and their mask `[B, L]`."""
        ...


class Tokenizer(Protocol):
    """A prompt's ids and mask (1 for a token, 0 for padding), both int64 `[max_length]`; `mm_core.data`
    has one.
    """

    max_length: int

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]: ...


@runtime_checkable
class Pipeline(Protocol):
    """`PIPELINE_MAPPINGS[id](model, tokenizer, device=device, **fields)`: from prompts to videos.

    One that is given frames also takes `first_frames` and `last_frames`, `[B, 3, H, W]` in [-1, 1], whose size the videos
    get. It then has `height` and `width`, the size without them, and `size_steps`, of which both have to be multiples.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | None = None,
        latents: torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Return videos `[B, 3, T, H, W]` in [-1, 1] on the CPU; noise of prompt k is keyed by (seed,
        indices[k]).
        """
        ...
