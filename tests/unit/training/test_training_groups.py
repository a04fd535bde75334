"""Learning rates and weight decay by module: what the names mean, and that each update is plain torch's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config import ConfigError, TrainFlags, load_training_job, parse_train_flags
from mm_core.sharding import ShardingPolicy
from mm_core.training.optimizer import build_optimizer, set_learning_rate
from mm_core.training.parameter_groups import GroupSettings, check_groups, group_settings
from mm_core.training.precheck import check_build
from mm_core.weights.optimizer_state import NamedOptimizer

ROOT = Path(__file__).resolve().parents[3]
TINY = Path("examples/tiny/wan22-t2v")
POLICY = {
    "predictor": ShardingPolicy(aliases={"text_embedding": "embed", "layers.{*}.proj": "blocks.{*}.linear"})
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))


def flags_of(*words: str) -> TrainFlags:
    return parse_train_flags(["--lr", "0.1", "--train-iters", "3", "--weight-decay", "0.2", *words])


def settings_of(*words: str) -> dict[str, tuple[float, float]]:
    network = Network()
    found = group_settings({"predictor": network}, flags_of(*words), POLICY)
    return {name: (found[p].lr_mult, found[p].weight_decay) for name, p in network.named_parameters()}


def test_parts_of_names_patterns_and_names_from_elsewhere() -> None:
    found = settings_of(
        "--lr-scale-modules", "EMBED.weight", "blocks.{0,2-3}.norm:3", "layers.1.proj", "blocks:0.5", "--lr-mult", "0.25",
        "--weight-decay-exclude-modules", "bias,text_embedding",
    )  # fmt: skip
    assert found["embed.weight"] == (0.25, 0.0)
    assert found["embed.bias"] == (1.0, 0.0)
    assert found["blocks.0.norm.weight"] == (3.0, 0.2)
    assert found["blocks.1.norm.weight"] == (0.5, 0.2)
    assert found["blocks.1.linear.weight"] == (0.25, 0.2)
    assert found["blocks.3.linear.bias"] == (0.5, 0.0)


def test_updates_are_those_of_plain_groups_and_a_checkpoint_may_have_other_groups() -> None:
    words = ("--lr-scale-modules", "embed:0.1", "norm:2", "--weight-decay-exclude-modules", "bias")
    torch.manual_seed(0)
    ours, theirs = Network(), Network()
    theirs.load_state_dict(ours.state_dict())
    flags = flags_of(*words)
    settings = group_settings({"predictor": ours}, flags, POLICY)
    optimizer = build_optimizer(ours.parameters(), flags, settings=settings)
    factors: Callable[[str], float] = lambda name: 0.1 if "embed" in name else 2.0 if "norm" in name else 1.0  # noqa: E731
    plain = torch.optim.AdamW(
        [
            {"params": [p], "factor": factors(name), "weight_decay": 0.0 if "bias" in name else 0.2}
            for name, p in theirs.named_parameters()
        ]
    )
    for step, rate in enumerate((0.1, 0.05, 0.02)):
        set_learning_rate(optimizer, rate)
        for group in plain.param_groups:
            group["lr"] = rate * group["factor"]
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        optimizer.step()
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    stored = NamedOptimizer(optimizer, {"predictor": ours}).settings()
    other_groups = NamedOptimizer(build_optimizer(ours.parameters(), flags_of()), {"predictor": ours})
    changed = other_groups.restore_settings(json.loads(json.dumps(stored)))
    assert sorted(changed) == ["lr_mult 0.1 → 1.0", "lr_mult 2.0 → 1.0", "weight_decay 0.0 → 0.2"]


def test_every_selection_of_adamw_makes_the_same_steps() -> None:
    """Against the formula of Loshchilov and Hutter in float64."""
    start, gradients = torch.randn(5), torch.randn(3, 5)
    weight, m, v = start.double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, gradient in enumerate(gradients.double(), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * update
    for selection in ("fused_torch_adamw", "torch_adamw", "fused_adamw"):
        words = ("--optimizer-selection", selection, "--adam-beta2", "0.95", "--adam-eps", "1e-6")
        parameter = nn.Parameter(start.clone())
        optimizer = build_optimizer([parameter], flags_of(*words))
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_without_the_flags_there_is_one_group() -> None:
    network, flags = Network(), flags_of()
    settings = group_settings({"predictor": network}, flags, POLICY)
    assert set(settings.values()) == {GroupSettings(1.0, 0.2)}
    assert len(build_optimizer(network.parameters(), flags, settings=settings).param_groups) == 1


WRONG = [
    (("--lr-scale-modules", "patch_embeding", "--lr-mult", "2"), "Did you mean patch_embedding"),
    (("--lr-scale-modules", "blocks.{99}:2"), 'has "blocks.{99}" in its name'),
    (("--weight-decay-exclude-modules", "lora"), "no parameter that is trained"),
    (
        ("--lr-scale-modules", "patch_embedding:2", "--lora-target-modules", "proj_q"),
        "means parameters that are frozen",
    ),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_name_that_means_nothing_is_found_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    files = ("--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"))
    job = load_training_job(parse_train_flags([*files, "--train-iters", "1", "--lr", "1", *words]))
    with pytest.raises(ConfigError) as caught:
        check_build(job)
    (finding,) = caught.value.findings
    assert words[0] in finding.path
    assert message in f"{finding.message} {finding.suggestion}"


def said(*words: str) -> Any:
    return [(f.level, f.path, f.message) for f in flags_of(*words).findings]


def test_flags_that_do_nothing_or_do_not_fit() -> None:
    assert said("--lr-scale-modules", "a") == [
        (
            "note",
            "--lr-scale-modules",
            "it has no effect: the learning rate of a is multiplied by --lr-mult, which is 1",
        )
    ]
    assert said("--lr-mult", "2")[0][:2] == ("note", "--lr-mult")
    assert said("--lr-wsd-decay-iters", "2")[0][2] == "it has no effect: only --lr-decay-style WSD reads it"
    assert not said("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2")
    for words in (
        ("--lr-decay-style", "WSD"),
        ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "4"),
        ("--lr-scale-modules", "a:-1"),
    ):
        with pytest.raises(ConfigError):
            flags_of(*words)


def test_the_name_of_one_expert_is_not_the_others() -> None:
    """`predictor` is part of `low_noise_predictor`."""
    experts = {"predictor": Network(), "low_noise_predictor": Network()}
    policies = dict.fromkeys(experts, POLICY["predictor"])

    def scaled(*words: str) -> set[str]:
        found = group_settings(experts, flags_of("--lr-scale-modules", *words), policies)
        return {
            f"{name}.{path}"
            for name, network in experts.items()
            for path, p in network.named_parameters()
            if found[p].lr_mult == 0.5
        }

    first = {f"predictor.{path}" for path, _ in Network().named_parameters()}
    second = {f"low_noise_{path}" for path in first}
    assert scaled("predictor:0.5") == first
    assert scaled("low_noise_predictor:0.5") == second
    assert scaled("predictor.emb:0.5") == {"predictor.embed.weight", "predictor.embed.bias"}
    assert scaled("predictor.text_embedding:0.5") == {"predictor.embed.weight", "predictor.embed.bias"}
    assert scaled("embed.weight:0.5") == {"predictor.embed.weight", "low_noise_predictor.embed.weight"}
    with pytest.raises(ConfigError, match="Did you mean predictor"):
        check_groups(experts, flags_of("--lr-scale-modules", "predictr:0.5"), policies)
    with pytest.raises(ConfigError, match="Did you mean predictor"):  # one network is trained
        check_groups({"predictor": Network()}, flags_of("--lr-scale-modules", "low_noise_predictor"), POLICY)
    undecayed = group_settings(experts, flags_of("--weight-decay-exclude-modules", "predictor"), policies)
    assert {p for p, one in undecayed.items() if one.weight_decay == 0} == set(
        experts["predictor"].parameters()
    )
