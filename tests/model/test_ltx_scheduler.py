"""`ltx_flow_match` against diffusers' scheduler and its formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from mm_core.models.protocols import Diffusion
from mm_plugin_ltx.scheduler import LTXFlowMatchScheduler
from mm_registry.errors import UserError

TOKENS = [32, 1024, 2500, 4096, 9000]


def upstream(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler with the values of LTX-Video's scheduler_config.json."""
    fields = {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    }
    return FlowMatchEulerDiscreteScheduler(**{**fields, **changes})


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_shift_is_the_pipelines(tokens: int) -> None:
    expected = calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
    assert LTXFlowMatchScheduler().mu(tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("terminal", [0.1, None])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_sampling_sigmas_are_diffusers(steps: int, tokens: int, terminal: float | None) -> None:
    ours = LTXFlowMatchScheduler(shift_terminal=terminal)
    theirs = upstream(shift_terminal=terminal)
    mu = calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
    # float64, by diffusers' own functions
    exact = theirs.time_shift(mu, 1.0, np.linspace(1.0, 1 / steps, steps))
    if terminal is not None:
        exact = theirs.stretch_shift_to_terminal(exact)
    sigmas = ours.sampling_sigmas(steps, tokens)
    assert sigmas.dtype is torch.float64
    assert np.abs(sigmas.numpy() - exact).max() < 1e-13
    # fp32, as the pipeline calls it
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.allclose(theirs.sigmas[:-1], sigmas.float(), rtol=0, atol=3e-6)
    assert (sigmas.diff() < 0).all()
    if terminal is not None:
        assert float(sigmas[-1]) == pytest.approx(terminal, abs=1e-12)


def test_a_sample_is_diffusers_step_by_step() -> None:
    ours, theirs = LTXFlowMatchScheduler(num_inference_timesteps=9), upstream()
    noise = torch.randn(2, 3, 2, 4, 5)
    mu = calculate_shift(40, 1024, 4096, 0.95, 2.05)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9), mu=mu)

    def model(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.sin(latents) * 0.3 + timestep.view(-1, 1, 1, 1, 1) / 1000

    done: list[tuple[int, int]] = []
    result = ours.sample(model, noise, {}, progress=lambda step, steps: done.append((step, steps)))
    latents = noise
    for t in theirs.timesteps:
        latents = theirs.step(model(latents, t.expand(2)), t, latents, return_dict=False)[0]
    assert torch.allclose(result, latents, rtol=0, atol=1e-5)
    assert (result - noise).abs().max() > 0.1
    assert done == [(i, 9) for i in range(1, 10)]


def test_one_step_goes_all_the_way() -> None:
    clean, noise = torch.randn(2, 1, 2, 1, 3, 3).unbind()
    result = LTXFlowMatchScheduler().sample(lambda latents, timestep: noise - clean, noise, {}, steps=1)
    assert torch.allclose(result, clean, atol=1e-6)


def test_guidance_moves_away_from_the_unconditional_prediction() -> None:
    noise = torch.zeros(1, 1, 1, 1, 1)
    result = LTXFlowMatchScheduler().sample(
        lambda latents, timestep, value: torch.full_like(latents, value),
        noise, {"value": 1.0}, uncond_kwargs={"value": 0.5}, guidance=3.0, steps=4,
    )  # fmt: skip
    assert float(result) == pytest.approx(-(0.5 + 3.0 * 0.5), abs=1e-6)


def test_noising_and_loss_follow_the_definition() -> None:
    scheduler = LTXFlowMatchScheduler()
    clean, noise, output = torch.randn(3, 3, 2, 2, 3, 3, dtype=torch.float64).unbind()
    t = torch.tensor([3.5, 500.0, 999.0])
    noised, same_noise, timesteps = scheduler.q_sample(clean, noise=noise, t=t)
    assert torch.equal(timesteps, t)
    assert torch.equal(same_noise, noise)
    losses = scheduler.training_losses(output, clean, noised, noise, timesteps)
    for i in range(3):
        sigma = float(t[i]) / 1000
        assert torch.allclose(noised[i], (1 - sigma) * clean[i] + sigma * noise[i], rtol=0, atol=1e-14)
        error = float(((output[i] - (noise[i] - clean[i])) ** 2).mean())
        assert float(losses[i]) == pytest.approx(error, rel=1e-12)
    half = scheduler.training_losses(output.bfloat16(), clean.float(), noised, noise, t)
    assert half.dtype is torch.float32


@pytest.mark.parametrize("side", [4, 40])
def test_training_draws_the_shifted_logit_normal(side: int) -> None:
    scheduler = LTXFlowMatchScheduler(timestep_std=0.8)
    latents = torch.zeros(1, 1, 2, side, side).expand(4000, -1, -1, -1, -1)
    _, _, t = scheduler.q_sample(latents, noise=latents, generator=torch.Generator().manual_seed(0))
    assert t.dtype is torch.float32
    assert ((t > 0) & (t < 1000)).all()
    logits = torch.logit(t.double() / 1000)
    assert float(logits.mean()) == pytest.approx(scheduler.mu(2 * side * side), abs=0.05)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.05)


def test_a_samples_randomness_is_its_own() -> None:
    scheduler = LTXFlowMatchScheduler()
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
    assert whole[2].unique().numel() == 4
    with pytest.raises(ValueError, match="2 generators for 4"):
        scheduler.q_sample(latents, generator=generators()[:2])
    with pytest.raises(ValueError, match=r"need \[4\]"):
        scheduler.q_sample(latents, t=torch.tensor([1.0]))


def test_it_is_a_diffusion_and_says_what_it_cannot() -> None:
    scheduler = LTXFlowMatchScheduler(num_train_timesteps=40)
    assert isinstance(scheduler, Diffusion)
    assert torch.equal(scheduler.timesteps, upstream(num_train_timesteps=40).timesteps)
    assert math.isclose(float(scheduler.sigmas[-1]), 1 / 40, rel_tol=1e-6)
    with pytest.raises(UserError, match="num_inference_timesteps"):
        scheduler.sample(lambda latents, timestep: latents, torch.zeros(1, 1, 1, 1, 1), {})
    with pytest.raises(UserError, match="base_seq_len 9"):
        LTXFlowMatchScheduler(base_seq_len=9, max_seq_len=9)
