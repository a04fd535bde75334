"""What the diffusion task says of two experts, and the loss of a validation set at fixed quantiles of the timesteps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mm_core
from mm_core.data.dealing import Deal
from mm_core.models.sora import SoRAModel
from mm_core.training.tasks.diffusion import QUANTILES, DiffusionInputs, DiffusionTask
from mm_core.training.validation import ValidationSums
from mm_registry.errors import UserError

CPU = torch.device("cpu")
INDICES = [4, 5, 6]


class Scaled(nn.Module):
    """Predicts its input, times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> torch.Tensor:
        return self.factor * latents


def task(second: bool = True, **diffusion: Any) -> DiffusionTask:
    fields = {"shift": 5.0, "sigma_min": 0.0, "extra_one_step": True, **diffusion}
    model = SoRAModel(
        predictor=Scaled(0.1),
        low_noise_predictor=Scaled(0.2) if second else None,
        ae=mm_core.AE_MODEL_MAPPINGS["haar_video"](temporal_levels=1, spatial_levels=1),
        text_encoder=mm_core.TEXT_ENCODER_MAPPINGS["UMT5"](
            config={"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        ),
        diffusion=mm_core.DIFFUSION_MODEL_MAPPINGS["wan_flow_match_scheduler"](**fields),
    )
    return DiffusionTask(model, seed=7, device=CPU)


def batch(**more: Any) -> dict[str, Any]:
    videos = torch.rand(len(INDICES), 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = torch.ones(len(INDICES), 8, dtype=torch.long)
    return {
        "video": videos,
        "prompt_ids": ids,
        "prompt_mask": ids,
        "sample_index": torch.tensor(INDICES),
        **more,
    }


@torch.no_grad()
def sums_of(sums: ValidationSums) -> dict[str, float]:
    """As `ValidationSums.reduce` does on one rank."""
    loss = sum(float(x.sum()) for x in sums._losses)
    weight = sum(float(x.sum()) for x in sums._weights)
    metrics = {name: sum(float(x.sum()) for x in values) for name, values in sums._metrics.items()}
    assert weight == pytest.approx(sums.samples)
    return {f"val_{name}": value / weight for name, value in {"loss": loss, **metrics}.items()}


def run(one: DiffusionTask, inputs: DiffusionInputs) -> Any:
    return one.loss(one.forward(one.model, inputs), inputs)


def test_a_sample_belongs_to_the_expert_whose_timesteps_its_own_is_among() -> None:
    one = task(boundary=0.9)
    assert one.owners is not None
    keys = range(400)
    owned = one.owners(keys)
    (inputs,) = one.prepare([batch(sample_index=torch.tensor(INDICES))])
    for index, t in zip(INDICES, inputs.timesteps.tolist(), strict=True):
        assert owned[index] == (0 if t >= 900 else 1)
    share = owned.count(0) / len(owned)
    schedule = one.model.diffusion
    assert share == pytest.approx(int((schedule.sigmas >= 0.9).sum()) / 1000, abs=0.06)
    assert task(second=False).owners is None


def test_two_experts_need_a_boundary() -> None:
    with pytest.raises(UserError, match="does not say at which timestep it takes over"):
        task()
    with pytest.raises(UserError, match="leaves one of the experts no timestep"):
        task(boundary=0.99999, sigma_max=0.9)


def test_the_expert_and_the_weights_of_a_deal_count() -> None:
    one = task(boundary=0.9)
    (plain,) = one.prepare([batch()])
    weight = torch.tensor([1.0, 0.0, 1.0])
    (low,) = one.prepare([batch(sample_weight=weight, deal=Deal(1, True, True))])
    assert torch.equal(low.noised_latents, plain.noised_latents)
    losses, weights, metrics = run(one, low)
    assert torch.equal(weights, weight)
    output = 0.2 * low.noised_latents
    expected = one.model.diffusion.training_losses(
        output, low.latents, low.noised_latents, low.noise, low.timesteps
    )
    torch.testing.assert_close(losses, expected * weight)
    assert not metrics
    assert one.tokens(low) * 3 == one.tokens(plain) * 2
    losses.sum().backward()
    assert one.model.predictor.factor.grad is None
    assert one.model.low_noise_predictor.factor.grad is not None


@pytest.mark.parametrize(
    ("second", "fields"),
    [(True, {"boundary": 0.9}), (False, {}), (False, {"boundary": 0.9, "expert": "low"})],
)
def test_validation_is_at_quantiles_of_what_is_trained(second: bool, fields: dict[str, Any]) -> None:
    one = task(second, **fields)
    schedule = one.model.diffusion
    start, stop = schedule.index_range
    trained = schedule.timesteps[start:stop].double()
    sums, losses, sides = ValidationSums(), [], []
    for number, inputs in enumerate(one.validation_inputs(batch())):
        assert len(set(inputs.timesteps.tolist())) == 1
        t = inputs.timesteps[0]
        wanted = torch.quantile(trained, QUANTILES[number], interpolation="nearest")
        assert (schedule.timesteps - t).abs().argmin() - (schedule.timesteps - wanted).abs().argmin() in (
            -1,
            0,
            1,
        )
        parts = run(one, inputs)
        sums.add(parts, len(INDICES), again=number > 0)
        predictor = one.model.low_noise_predictor if second and t < 900 else one.model.predictor
        output = predictor.factor * inputs.noised_latents
        losses.append(
            schedule.training_losses(output, inputs.latents, inputs.noised_latents, inputs.noise, inputs.timesteps)
            .mean().item()
        )  # fmt: skip
        sides.append("high" if t >= 900 else "low")
    assert sums.samples == len(INDICES)
    means = sums_of(sums)
    assert means["val_loss"] == pytest.approx(sum(losses) / len(losses))
    for name, loss in zip(("q10", "q30", "q50", "q70", "q90"), losses, strict=True):
        assert means[f"val_loss/{name}"] == pytest.approx(loss)
    if second:
        assert set(sides) == {"high", "low"}
        for name in ("high", "low"):
            own = [loss for loss, side in zip(losses, sides, strict=True) if side == name]
            assert means[f"val_loss/{name}"] == pytest.approx(sum(own) / len(own))
    else:
        assert not {"val_loss/high", "val_loss/low"} & set(means)
