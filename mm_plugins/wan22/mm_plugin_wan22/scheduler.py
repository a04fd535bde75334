"""Wan's flow matching: the sigma grid, which timesteps are trained, and their weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from mm_core.models.flow import RectifiedFlow
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)


class WanFlowMatchScheduler(RectifiedFlow):
    """Rectified flow (Liu et al., 2022; Lipman et al., 2022) on a shifted grid (Esser et al., 2024), as Wan
    trains it.

    `x_t = (1 - sigma) x_0 + sigma noise` and the model predicts `noise - x_0`. The grid is
    `linspace(sigma_max, sigma_min, N)`, of N + 1 points without the last when `extra_one_step`, then `sigma'
    = shift sigma / (1 + (shift - 1) sigma)`; timesteps are `sigma' * num_train_timesteps`. It descends, so
    index 0 is the highest noise. It is computed in float64 and kept in fp32.

    Which timesteps are trained is said in one of two forms:

    - `boundary` with `expert`: the sigma at which Wan2.2 hands over from the high-noise to the low-noise
      expert (0.875 for text to video), and which of the two this is. The index range follows from the grid's
      own shift. Without `expert`, both are trained: all timesteps are drawn, and `boundary_timestep` parts them.
    - `min_timestep_boundary`, `max_timestep_boundary`: fractions of the index (0 is the highest noise), as
      MindSpeed-MM has them. The sigma that they mean holds for this shift only; `describe()` tells it.

    Attributes:
        sigmas: `[num_train_timesteps]` fp32, descending.
        timesteps: `[num_train_timesteps]` fp32, descending.
        index_range: first and one past the last grid index that training draws.
        boundary_timestep: timestep value at and above which the high-noise expert works, where both are trained; else
            None.

    Raises:
        UserError: an empty or contradictory range of timesteps.
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        num_inference_timesteps: int | None = None,
        shift: float = 3.0,
        sigma_max: float = 1.0,
        sigma_min: float = 0.003 / 1.002,
        extra_one_step: bool = False,
        guidance_scale: float | Sequence[float] = 0.0,
        min_timestep_boundary: float = 0.0,
        max_timestep_boundary: float = 1.0,
        boundary: float | None = None,
        expert: Literal["high", "low"] | None = None,
        inverse_timesteps: bool = False,
        reverse_sigmas: bool = False,
    ) -> None:
        if inverse_timesteps or reverse_sigmas:
            raise UserError("wan_flow_match_scheduler: inverse_timesteps and reverse_sigmas are not offered")
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_timesteps = num_inference_timesteps
        self.shift = shift
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min
        self.extra_one_step = extra_one_step
        self.guidance_scale = guidance_scale

        grid = self._grid(num_train_timesteps)  # [N] float64
        self.sigmas = grid.float()
        self.timesteps = (grid * num_train_timesteps).float()
        bell = self._bell(grid * num_train_timesteps)
        self._weight_floor = float(bell.min())
        self._weight_scale = num_train_timesteps / float((bell - bell.min()).sum())
        self.boundary_timestep: float | None = None
        self.index_range = self._index_range(
            grid, min_timestep_boundary, max_timestep_boundary, boundary, expert
        )
        logger.info("%s", self.describe())

    def _grid(self, steps: int) -> torch.Tensor:
        """Shifted sigmas `[steps]` in float64, descending."""
        points = steps + 1 if self.extra_one_step else steps
        sigmas = torch.linspace(self.sigma_max, self.sigma_min, points, dtype=torch.float64)[:steps]
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _bell(self, t: torch.Tensor) -> torch.Tensor:
        n = self.num_train_timesteps
        return torch.exp(-2 * ((t - n / 2) / n) ** 2)

    def _index_range(
        self, grid: torch.Tensor, low: float, high: float, boundary: float | None, expert: str | None
    ) -> tuple[int, int]:
        count = len(grid)
        if boundary is None and expert is not None:
            raise UserError(
                f"wan_flow_match_scheduler: expert is {expert!r}, but there is no boundary (a sigma) that says what it trains"
            )
        if boundary is not None:
            if (low, high) != (0.0, 1.0):
                raise UserError(
                    "wan_flow_match_scheduler: boundary and min/max_timestep_boundary both say which "
                    "timesteps are trained; keep one"
                )
            if expert not in (None, "high", "low"):
                raise UserError(f"wan_flow_match_scheduler: expert is 'high' or 'low', not {expert!r}")
            # >= as in generation, where the high-noise expert takes t >= boundary * num_train_timesteps
            hand_over = int((grid >= boundary).sum())
            start, stop = {"high": (0, hand_over), "low": (hand_over, count), None: (0, count)}[expert]
            if expert is None:
                if hand_over in (0, count):
                    raise UserError(
                        f"wan_flow_match_scheduler: boundary {boundary:g} leaves one of the experts no timestep of the "
                        f"{count} between sigma {float(grid[0]):.4f} and {float(grid[-1]):.4f}"
                    )
                above, below = self.timesteps[hand_over - 1 : hand_over + 1].tolist()
                value = boundary * self.num_train_timesteps
                # In fp32 a grid point at the boundary may be rounded past it.
                self.boundary_timestep = value if below < value <= above else above
        else:
            if not 0.0 <= low < high <= 1.0:
                raise UserError(
                    f"wan_flow_match_scheduler: need 0 <= min_timestep_boundary ({low}) < "
                    f"max_timestep_boundary ({high}) <= 1"
                )
            start, stop = int(low * count), int(high * count)
        if start >= stop:
            raise UserError(
                f"wan_flow_match_scheduler: no timestep of the {count} is left to train between index "
                f"{start} and {stop}"
            )
        return start, stop

    def describe(self) -> str:
        """One line: which timesteps are trained, and the sigmas that they mean."""
        start, stop = self.index_range
        first, last = float(self.sigmas[start]), float(self.sigmas[stop - 1])
        edge = f", handing over at sigma {float(self.sigmas[stop]):.4f}" if stop < len(self.sigmas) else ""
        if self.boundary_timestep is not None:
            edge = f", two experts handing over at timestep {self.boundary_timestep:.1f}"
        return (
            f"flow matching trains {stop - start} of {len(self.sigmas)} timesteps, index {start} to "
            f"{stop - 1}: "
            f"sigma {first:.4f} to {last:.4f} at shift {self.shift:g}{edge}"
        )

    def training_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of timestep values `[B]` -> `[B]` in their dtype: a bell around the middle, its mean over
        the grid 1, its least 0.
        """
        return (self._bell(t) - self._weight_floor) * self._weight_scale

    def draw_timesteps(
        self, latents: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> torch.Tensor:
        """Draw grid points of the trained range, all alike."""
        return self.timesteps_of(generators)

    def timesteps_of(self, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
        """The timesteps `[B]` that `q_sample` draws from these generators, whatever the latents are."""
        start, stop = self.index_range
        index = torch.cat([torch.randint(start, stop, (1,), generator=g) for g in generators])  # [B]
        return self.timesteps[index]

    def timestep_at(self, quantile: float) -> float:
        """The grid point of the trained range that lies at a quantile of it: 0.0 is its least noise, 1.0 its most."""
        start, stop = self.index_range
        return float(self.timesteps[stop - 1 - round(quantile * (stop - 1 - start))])

    def inference_sigmas(self, steps: int, latents: torch.Tensor) -> torch.Tensor:
        """The grid of so many steps."""
        return self._grid(steps)
