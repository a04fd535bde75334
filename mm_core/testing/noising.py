"""Latents, targets and a toy denoiser for the checks of diffusions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mm_core.testing import builds
from mm_core.testing.check import CheckSkipped
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.testing.case import Case

_LATENTS = (4, 2, 4, 4)  # C, T, H, W where no example says another size


class ToyDenoiser:
    """Predicts a share of the latents; remembers the timesteps that it was called with."""

    def __init__(self) -> None:
        self.timesteps: list[torch.Tensor] = []

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        self.timesteps.append(timestep.clone())
        return scale * latents + 0.1 * latents.square()


def latents(case: Case, batch: int) -> torch.Tensor:
    """Clean latents `[batch, C, T, H, W]`."""
    size = case.example.latents if case.example is not None else None
    return builds.samples(batch, size or _LATENTS, 0, "latents")


def trained(case: Case) -> Any:
    """The component, if it is one to train with.

    Raises:
        CheckSkipped: its q_sample says that it only generates.
    """
    built = builds.build(case)
    try:
        built.q_sample(latents(case, 1), generator=builds.generators(1))
    except UserError as error:
        raise CheckSkipped(f"it only generates ({str(error).split(';')[0]})") from error
    return built


def middle(built: Any, batch: int) -> torch.Tensor:
    """Timestep values `[batch]` from the middle of the grid, all different where it is long enough."""
    grid = built.timesteps
    indices = [(len(grid) // 3 + i * max(1, len(grid) // 7)) % len(grid) for i in range(batch)]
    return grid[indices].clone()


def noised(case: Case, built: Any, batch: int) -> tuple[torch.Tensor, ...]:
    """Latents, noised latents, noise and timesteps."""
    clean = latents(case, batch)
    noise = builds.samples(batch, clean.shape[1:], 5, "noise")
    x_t, noise, t = built.q_sample(clean.clone(), noise=noise, t=middle(built, batch))
    return clean, x_t, noise, t


def best_output(
    built: Any, x: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The output with the least loss: a usual target, or where one Newton step of a quadratic loss ends."""
    probe = torch.ones_like(x, requires_grad=True)
    start = torch.zeros_like(x, requires_grad=True)
    gradients = [
        torch.autograd.grad(built.training_losses(point, x, x_t, noise, t).sum(), point)[0]
        for point in (start, probe)
    ]
    curvature = gradients[1] - gradients[0]
    newton = torch.where(curvature.abs() > 1e-12, -gradients[0] / curvature, torch.zeros_like(x))
    candidates = [noise - x, x - noise, noise, x, newton]
    losses = [float(built.training_losses(c, x, x_t, noise, t).double().sum()) for c in candidates]
    return candidates[losses.index(min(losses))]
