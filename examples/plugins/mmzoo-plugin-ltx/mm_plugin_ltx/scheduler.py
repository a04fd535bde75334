"""LTX-Video's rectified flow: more tokens, more noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mm_core.models.flow import RectifiedFlow
from mm_registry.errors import UserError


class LTXFlowMatchScheduler(RectifiedFlow):
    """Rectified flow (Liu et al., 2022) with a shift that depends on the number of tokens.

    `x_t = (1 - sigma) x_0 + sigma noise` and the model predicts `noise - x_0`; timesteps are `sigma *
    num_train_timesteps`. The shift is `mu(S)`, a straight line through `(base_seq_len, base_shift)` and
    `(max_seq_len, max_shift)`, with S the tokens of a sample: `calculate_shift` of diffusers' LTXPipeline.
    It moves a sigma to `exp(mu) / (exp(mu) + 1 / sigma - 1)`, which adds mu to its logit.

    - Training draws `sigma = sigmoid(mu + timestep_std * z)` with z standard normal: the shifted
      logit-normal distribution (Esser et al., "Scaling Rectified Flow Transformers", 2024; HaCohen et al.,
      2024). All sigmas weigh the same.
    - Sampling takes Euler steps over the shifted `linspace(1, 1 / steps, steps)`, stretched so that the last
      sigma is `shift_terminal`, then to 0: diffusers' FlowMatchEulerDiscreteScheduler with
      `use_dynamic_shifting`, as LTXPipeline calls it.

    Attributes:
        sigmas: `[num_train_timesteps]` fp32, descending, before the shift, which needs a size.
        timesteps: the same times `num_train_timesteps`.

    Raises:
        UserError: `base_seq_len` is not below `max_seq_len`.
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        num_inference_timesteps: int | None = None,
        guidance_scale: float = 0.0,
        base_shift: float = 0.95,
        max_shift: float = 2.05,
        base_seq_len: int = 1024,
        max_seq_len: int = 4096,
        shift_terminal: float | None = 0.1,
        timestep_std: float = 1.0,
    ) -> None:
        if base_seq_len >= max_seq_len:
            raise UserError(
                f"ltx_flow_match: base_seq_len {base_seq_len} must be below max_seq_len {max_seq_len}"
            )
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_timesteps = num_inference_timesteps
        self.guidance_scale = guidance_scale
        self.base_shift = base_shift
        self.max_shift = max_shift
        self.base_seq_len = base_seq_len
        self.max_seq_len = max_seq_len
        self.shift_terminal = shift_terminal
        self.timestep_std = timestep_std
        grid = _unshifted(num_train_timesteps)
        self.sigmas = grid.float()
        self.timesteps = (grid * num_train_timesteps).float()

    def mu(self, tokens: int) -> float:
        """The shift, as a logarithm, of samples of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_seq_len - self.base_seq_len)
        return self.base_shift + slope * (tokens - self.base_seq_len)

    def sampling_sigmas(self, steps: int, tokens: int) -> torch.Tensor:
        """Sigmas at which a video is denoised, `[steps]` float64, descending; the flow ends at 0 after."""
        odds = math.exp(self.mu(tokens))
        sigmas = odds / (odds + 1 / _unshifted(steps) - 1)
        if self.shift_terminal is not None and steps > 1:  # one step has no last sigma but the first
            cleared = 1 - sigmas
            sigmas = 1 - cleared * ((1 - self.shift_terminal) / cleared[-1])
        return sigmas

    def draw_timesteps(
        self, latents: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> torch.Tensor:
        """Draw from the shifted logit-normal distribution of this size."""
        z = torch.cat([torch.randn(1, generator=g, dtype=torch.float64) for g in generators])  # [B]
        mu = self.mu(math.prod(latents.shape[2:]))
        return torch.sigmoid(mu + self.timestep_std * z) * self.num_train_timesteps

    def inference_sigmas(self, steps: int, latents: torch.Tensor) -> torch.Tensor:
        """`sampling_sigmas` of a video of this size: T * H * W tokens."""
        return self.sampling_sigmas(steps, math.prod(latents.shape[2:]))


def _unshifted(steps: int) -> torch.Tensor:
    return torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64, device="cpu")
