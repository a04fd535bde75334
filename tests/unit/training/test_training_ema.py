"""Averaged weights."""

from __future__ import annotations

import torch
from torch import nn

from mm_core.training.ema import ExponentialAverage
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
