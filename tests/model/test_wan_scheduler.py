"""`wan_flow_match_scheduler` against its formulas in plain Python floats (float64)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from mm_core.models.protocols import Diffusion
from mm_plugin_wan22.scheduler import WanFlowMatchScheduler
from mm_registry.errors import UserError

WAN = {"shift": 5.0, "sigma_min": 0.0, "extra_one_step": True}
VARIANTS: list[dict[str, Any]] = [
    {},
    WAN,
    {"shift": 1.0, "num_train_timesteps": 40},
    {"shift": 12.0, "sigma_max": 0.9, "sigma_min": 0.02, "num_train_timesteps": 100},
]


def grid(n: int = 1000, shift: float = 3.0, **fields: Any) -> list[float]:
    """Sigmas by the definition, one by one."""
    first, last = fields.get("sigma_max", 1.0), fields.get("sigma_min", 0.003 / 1.002)
    n = fields.get("num_train_timesteps", n)
    points = n + 1 if fields.get("extra_one_step") else n
    raw = [first + (last - first) * i / (points - 1) for i in range(n)]
    return [shift * s / (1 + (shift - 1) * s) for s in raw]


def weights(sigmas: list[float], n: int) -> list[float]:
    bell = [math.exp(-2 * ((s * n - n / 2) / n) ** 2) for s in sigmas]
    raised = [b - min(bell) for b in bell]
    return [r * n / sum(raised) for r in raised]


@pytest.mark.parametrize("fields", VARIANTS)
def test_grid_and_weight_follow_the_definition(fields: dict[str, Any]) -> None:
    scheduler = WanFlowMatchScheduler(**fields)
    n = fields.get("num_train_timesteps", 1000)
    sigmas = grid(**fields)
    expected = torch.tensor(sigmas, dtype=torch.float64)
    assert torch.allclose(scheduler.sigmas.double(), expected, rtol=1e-7, atol=1e-9)
    assert torch.allclose(scheduler.timesteps.double(), expected * n, rtol=1e-7, atol=1e-6)
    assert (scheduler.timesteps.diff() < 0).all()
    ours = scheduler.training_weight(expected * n)
    theirs = torch.tensor(weights(sigmas, n), dtype=torch.float64)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert float(ours.mean()) == pytest.approx(1.0, abs=1e-12)
    assert float(ours.min()) == 0.0


def test_published_numbers_of_wan22() -> None:
    scheduler = WanFlowMatchScheduler(**WAN)
    assert float(scheduler.sigmas[0]) == 1.0
    assert float(scheduler.sigmas[417]) == pytest.approx(0.8748, abs=5e-5)
    assert float(scheduler.sigmas[358]) == pytest.approx(0.8997, abs=5e-5)
    weight = scheduler.training_weight(scheduler.timesteps)
    assert float(weight[:417].mean()) == pytest.approx(0.342, abs=2e-3)
    assert float(weight[417:].mean()) == pytest.approx(1.470, abs=2e-3)


def test_noising_loss_and_velocity_in_float64() -> None:
    scheduler = WanFlowMatchScheduler(**WAN)
    clean = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64)
    noise = torch.randn_like(clean)
    output = torch.randn_like(clean)
    t = torch.tensor([3.5, 500.0, 999.0])  # between grid points too
    noised, same_noise, timesteps = scheduler.q_sample(clean, noise=noise, t=t)
    losses = scheduler.training_losses(output, clean, noised, noise, timesteps)
    assert torch.equal(timesteps, t)
    assert torch.equal(same_noise, noise)
    sigmas = grid(**WAN)
    bell = [math.exp(-2 * ((s * 1000 - 500) / 1000) ** 2) for s in sigmas]
    total = sum(b - min(bell) for b in bell)
    for i in range(3):
        sigma = t[i].item() / 1000
        assert torch.allclose(noised[i], (1 - sigma) * clean[i] + sigma * noise[i], rtol=0, atol=1e-14)
        weight = (math.exp(-2 * ((t[i].item() - 500) / 1000) ** 2) - min(bell)) * 1000 / total
        error = ((output[i] - (noise[i] - clean[i])) ** 2).mean().item()
        assert losses[i].item() == pytest.approx(weight * error, rel=1e-10)


def test_losses_of_half_precision_outputs_are_fp32() -> None:
    scheduler = WanFlowMatchScheduler()
    clean = torch.randn(2, 4, 1, 2, 2)
    noised, noise, t = scheduler.q_sample(clean.bfloat16(), t=torch.tensor([100.0, 900.0]))
    assert noised.dtype is noise.dtype is t.dtype is torch.float32
    losses = scheduler.training_losses(noise.bfloat16(), clean, noised, noise, t)
    assert losses.dtype is torch.float32
    assert losses.shape == (2,)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0, 1000)),
        ({"max_timestep_boundary": 0.417}, (0, 417)),
        ({"min_timestep_boundary": 0.417}, (417, 1000)),
        ({"boundary": 0.875, "expert": "high"}, (0, 417)),
        ({"boundary": 0.875, "expert": "low"}, (417, 1000)),
        ({"boundary": 0.9, "expert": "high"}, (0, 358)),
    ],
)
def test_only_the_timesteps_of_the_expert_are_drawn(
    fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    scheduler = WanFlowMatchScheduler(**WAN, **fields)
    assert scheduler.index_range == expected
    generator = torch.Generator().manual_seed(0)
    _, _, t = scheduler.q_sample(torch.zeros(4000, 1, 1, 1, 1), generator=generator)
    allowed = scheduler.timesteps[slice(*expected)]
    assert torch.isin(t, allowed).all()
    span = expected[1] - expected[0]
    assert t.unique().numel() > 0.8 * span  # all over the range: 4000 draws of at most 1000 values
    assert t.max() >= allowed[span // 50]
    assert t.min() <= allowed[-span // 50]


def test_the_experts_share_the_grid_without_gap_or_overlap() -> None:
    for boundary in (0.875, 0.9, 0.5):
        high, low = (
            WanFlowMatchScheduler(**WAN, boundary=boundary, expert=expert) for expert in ("high", "low")
        )
        assert high.index_range[1] == low.index_range[0]
        assert float(high.sigmas[high.index_range[1] - 1]) >= boundary > float(low.sigmas[low.index_range[0]])
    assert "0.8748" in WanFlowMatchScheduler(**WAN, max_timestep_boundary=0.417).describe()


@pytest.mark.parametrize("boundary", [0.5, 0.875, 0.9, 5 * 0.417 / (1 + 4 * 0.417)])
def test_both_experts_part_the_grid_as_each_alone_would(boundary: float) -> None:
    both = WanFlowMatchScheduler(**WAN, boundary=boundary)
    high, low = (WanFlowMatchScheduler(**WAN, boundary=boundary, expert=expert) for expert in ("high", "low"))
    assert high.boundary_timestep is None
    assert both.boundary_timestep is not None
    above = both.timesteps >= both.boundary_timestep
    assert both.index_range == (0, len(both.timesteps))
    assert torch.equal(both.timesteps[above], high.timesteps[slice(*high.index_range)])
    assert torch.equal(both.timesteps[~above], low.timesteps[slice(*low.index_range)])
    generators = [torch.Generator().manual_seed(i) for i in range(32)]
    drawn = both.timesteps_of([g.clone_state() for g in generators])
    assert torch.equal(drawn, both.q_sample(torch.zeros(32, 1, 1, 1, 1), generator=generators)[2])
    assert high.timestep_at(1.0) == both.timestep_at(1.0) == float(both.timesteps[0])
    assert high.timestep_at(0.0) == pytest.approx(boundary * 1000, abs=3)
    assert "two experts handing over" in both.describe()


def test_a_samples_randomness_is_its_own() -> None:
    scheduler = WanFlowMatchScheduler(**WAN)
    latents = torch.randn(4, 2, 1, 3, 3)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 + i) for i in range(4)]

    whole = scheduler.q_sample(latents, generator=generators())
    parts = [
        scheduler.q_sample(latents[i : i + 1], generator=[generator])
        for i, generator in enumerate(generators())
    ]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([part[k] for part in parts]))
    assert whole[2].unique().numel() == 4  # a timestep for each sample
    with pytest.raises(ValueError, match="2 generators for 4"):
        scheduler.q_sample(latents, generator=generators()[:2])
    with pytest.raises(ValueError, match=r"needs? \[4\]|need \[4\]"):
        scheduler.q_sample(latents, t=torch.tensor([1.0]))


def test_euler_sampling_with_guidance_follows_the_definition() -> None:
    scheduler = WanFlowMatchScheduler(**WAN, num_inference_timesteps=7)
    noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    seen: list[float] = []

    def model(latents: torch.Tensor, timestep: torch.Tensor, shift: float) -> torch.Tensor:
        seen.append(float(timestep[0]))
        return torch.sin(latents) * 0.3 + shift * timestep.double().view(-1, 1, 1, 1, 1) / 1000

    done: list[tuple[int, int]] = []
    result = scheduler.sample(
        model,
        noise,
        {"shift": 0.5},
        uncond_kwargs={"shift": -0.2},
        guidance=lambda t: 3.0 if t >= 900 else 1.0,
        progress=lambda step, steps: done.append((step, steps)),
    )
    sigmas = [*grid(num_train_timesteps=7, **WAN), 0.0]
    x = noise.clone()
    calls = 0
    for now, following in itertools.pairwise(sigmas):
        conditional = torch.sin(x) * 0.3 + 0.5 * now
        velocity = conditional
        if now * 1000 >= 900:
            unconditional = torch.sin(x) * 0.3 - 0.2 * now
            velocity = unconditional + 3.0 * (conditional - unconditional)
            calls += 1
        calls += 1
        x = x + (following - now) * velocity
    assert torch.allclose(result, x, rtol=0, atol=1e-6)
    assert len(seen) == calls  # without guidance the unconditional prediction is not computed
    assert done == [(i, 7) for i in range(1, 8)]


def test_sampling_inverts_a_straight_flow() -> None:
    """With the true velocity of one pair, Euler steps arrive at the clean latents whatever the grid."""
    scheduler = WanFlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    clean, noise = torch.randn(1, 2, 1, 3, 3), torch.randn(1, 2, 1, 3, 3)
    result = scheduler.sample(lambda latents, timestep: noise - clean, noise, {}, steps=5)
    assert torch.allclose(result, clean, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"expert": "low"}, "no boundary"),
        ({"boundary": 0.999, "sigma_max": 0.9}, "leaves one of the experts no timestep"),
        ({"boundary": 0.9, "expert": "middle"}, "middle"),
        ({"boundary": 0.9, "expert": "low", "min_timestep_boundary": 0.2}, "keep one"),
        ({"min_timestep_boundary": 0.6, "max_timestep_boundary": 0.6}, "min_timestep_boundary"),
        ({"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5004}, "no timestep"),
        ({"reverse_sigmas": True}, "reverse_sigmas"),
    ],
)
def test_contradictory_ranges_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        WanFlowMatchScheduler(**WAN, **fields)


def test_generation_without_a_number_of_steps_is_an_error() -> None:
    with pytest.raises(UserError, match="num_inference_timesteps"):
        WanFlowMatchScheduler().sample(lambda latents, timestep: latents, torch.zeros(1, 1, 1, 1, 1), {})


def test_it_is_a_diffusion() -> None:
    assert isinstance(WanFlowMatchScheduler(), Diffusion)
