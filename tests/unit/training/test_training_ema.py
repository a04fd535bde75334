"""Averaged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mm_core.training.ema import ExponentialAverage
from mm_core.training.looks import Looks
from mm_core.weights import load_checkpoint, load_module_weights, save_checkpoint

STATE = {"step": 1, "consumed_samples": 1, "seed": 1}


def model() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[0].bias.requires_grad_(False)
    net[2].weight = net[0].weight  # tied
    return net


def test_an_average_follows_what_is_trained() -> None:
    net = model()
    average = ExponentialAverage({"predictor": net}, 0.75)
    expected = net[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            net[0].weight += 1.0
        average.update()
        expected = 0.75 * expected + 0.25 * net[0].weight.detach()
    tensors = average.tensors("predictor")
    torch.testing.assert_close(tensors["0.weight"], expected)
    assert sorted(tensors) == ["0.weight", "1.bias", "1.weight", "2.bias"], (
        "no frozen one, no buffer, a tied one once"
    )
    average.restart()
    assert torch.equal(tensors["0.weight"], net[0].weight)


def test_weights_of_half_precision_are_averaged_in_fp32() -> None:
    net = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    average = ExponentialAverage({"predictor": net}, 0.999)
    with torch.no_grad():
        before = net.weight.float().clone()
        net.weight += 1.0
    average.update()
    torch.testing.assert_close(average.tensors("predictor")["weight"], before.lerp(net.weight.float(), 0.001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_stand_in_for_the_weights_and_both_come_back(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    average = ExponentialAverage({"predictor": net}, 0.7)
    with torch.no_grad():
        net[0].weight += torch.randn(3, 3).to(dtype)
    average.update()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    averages = {name: t.clone() for name, t in average.tensors("predictor").items()}
    with average.swapped():
        assert torch.equal(net[0].weight, averages["0.weight"].to(dtype))
        assert not torch.equal(net[0].weight, weights["0.weight"])
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert all(torch.equal(t, averages[name]) for name, t in average.tensors("predictor").items())


class Asked:
    """Stands for a validation or for sample videos: notes what it finds."""

    def __init__(self, every: int, net: nn.Module) -> None:
        self.every, self.net, self.found = every, net, []

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def run(self, step: int, stop_requested: Any, suffix: str = "") -> dict[str, float]:
        self.found.append((step, suffix, float(self.net[0].weight.detach().sum())))
        return {"val_loss": self.found[-1][2], "val_samples": 1}


def test_the_averages_are_looked_at_as_well() -> None:
    net = model()
    average = ExponentialAverage({"predictor": net}, 0.5)
    with torch.no_grad():
        net[0].weight += 1.0
    average.update()
    weight, mean = float(net[0].weight.detach().sum()), float(average.tensors("predictor")["0.weight"].sum())
    validation, samples = Asked(2, net), Asked(3, net)
    looks = Looks(validation, samples, average)  # type: ignore[arg-type]
    assert [step for step in range(1, 7) if looks.due(step)] == [2, 3, 4, 6]
    assert looks.run(2, lambda: False) == {
        "val_loss": weight, "val_samples": 1, "val_ema_loss": mean, "val_ema_samples": 1,
    }  # fmt: skip
    assert looks.run(3, lambda: False) == {}
    assert samples.found == [(3, "", weight), (3, "-ema", mean)]


def test_averages_are_part_of_a_checkpoint_and_can_be_loaded_alone(tmp_path) -> None:
    net = model()
    average = ExponentialAverage({"predictor": net}, 0.5)
    with torch.no_grad():
        net[0].weight += 1.0
        net[0].bias += 1.0
    average.update()
    modules = {"predictor": net, **average.modules()}
    checkpoint = save_checkpoint(tmp_path, 1, modules, None, STATE)

    other = model()
    again = ExponentialAverage({"predictor": other}, 0.5)
    load_checkpoint(checkpoint, {"predictor": other, **again.modules()})
    assert torch.equal(again.tensors("predictor")["0.weight"], average.tensors("predictor")["0.weight"])
    assert torch.equal(other[0].weight, net[0].weight)

    averaged = model()
    load_module_weights(averaged, checkpoint, ema=True)
    assert torch.equal(averaged[0].weight, average.tensors("predictor")["0.weight"])
    assert torch.equal(averaged[0].bias, net[0].bias), "frozen: as it was"
