"""The table of a plan: bytes, the predicted peak, folding and sources."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.observe import console
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.plan import ShardingPlan
from mm_core.sharding.rows import is_wrapped, peak_memory, unit_rows
from mm_core.sharding.table import folded, plan_texts


class Experts(nn.Linear):
    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(8, width, bias=False)
        self.experts = Experts(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Net(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 8, 8, 16, 8)) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def plan(policy: ShardingPolicy | None = None, net: nn.Module | None = None, **fsdp2: object) -> ShardingPlan:
    config = Fsdp2Config.model_validate(fsdp2)
    return build_plan(net or Net(), policy or ShardingPolicy(units=("blocks.{*}",)), config)


def test_equal_units_that_count_up_share_a_line():
    labels = [run.label for run in folded(unit_rows(plan(), 2))]
    assert labels == ["predictor.blocks.0-2 ×3", "predictor.blocks.3", "predictor.blocks.4", "predictor"]
    nested = plan(
        sub_modules_to_wrap=("predictor.blocks.{*}", "predictor.blocks.{*}.attn"), net=Net((8,) * 12)
    )
    assert [run.label for run in folded(unit_rows(nested, 2))] == [
        "predictor.blocks.0-11 ×12",
        "predictor.blocks.0-11.attn ×12",
        "predictor",
    ]
    half = plan(net=Net((8,) * 4), recompute_modules=("predictor.blocks.{0-1}",))
    assert [run.label for run in folded(unit_rows(half, 2))] == [
        "predictor.blocks.0-1 ×2",
        "predictor.blocks.2-3 ×2",
        "predictor",
    ]


def test_bytes_of_a_rank_with_gradients_and_optimizer():
    net = Net((8, 8))
    net.blocks[0].requires_grad_(False)
    rows = {row["unit"]: row for row in unit_rows(plan(net=net), 4)}
    block = (8 * 8 + 4 * 8) * 4 // 4
    assert rows["predictor.blocks.1"]["bytes_per_rank"] == block
    assert rows["predictor.blocks.1"]["training_bytes_per_rank"] == 4 * block
    assert rows["predictor.blocks.0"]["training_bytes_per_rank"] == block  # frozen


def test_the_peak_is_what_is_stored_and_the_most_that_is_gathered_at_once():
    net = Net((8, 8, 16, 8))
    sizes = [12 * 8 * 2, 12 * 8 * 2, 20 * 8 * 2, 12 * 8 * 2]  # bf16, whole
    root = 8 * 8 * 2
    base = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    made = plan(net=net, **base)
    peak = peak_memory(made, 4)
    assert peak.shards == (sum(sizes) + root) * 2 // 4
    assert (peak.gradients, peak.optimizer) == (peak.shards, 2 * peak.shards)
    assert peak.gathered == root + sizes[2] + sizes[1]  # in backward FSDP2 asks for one ahead
    assert peak.whole_gradients == 3 * (sizes[2] + root)  # bf16, and fp32 to be reduced
    assert peak.total == 4 * peak.shards + peak.gathered + peak.whole_gradients

    deep = peak_memory(plan(net=net, num_to_forward_prefetch=3, **base), 4)
    assert deep.gathered == root + sum(sizes)
    kept = peak_memory(plan(net=net, reshard_after_forward=False, **base), 4)
    assert kept.gathered == root + sum(sizes)
    partly = peak_memory(plan(net=net, reshard_after_forward=2, **base), 4)
    assert partly.gathered == peak.gathered + sum(sizes) // 2
    host = peak_memory(plan(net=net, offload_to_cpu=True, **base), 4)
    assert host.on_host
    assert host.total == host.gathered + host.whole_gradients
    alone = peak_memory(made, 1, wrapped=False)
    assert (alone.gathered, alone.total) == (0, 4 * alone.shards)


def test_units_around_the_one_that_runs_are_gathered_too():
    net = Net((8, 8))
    made = plan(net=net, sub_modules_to_wrap=("predictor.blocks.{*}", "predictor.blocks.{*}.attn"))
    root, outer, inner = 64 * 4, 32 * 4, 64 * 4
    # Block 1 and its attn, and block 0, which is asked for ahead.
    assert peak_memory(made, 2).gathered == root + outer + inner + outer
    assert unit_rows(made, 2)[0]["gathered_bytes"] == outer


def test_experts_are_dealt_out_first_and_cut_over_the_ranks_that_are_left():
    policy = ShardingPolicy(units=("blocks.{*}",), experts=("blocks.{*}.experts",))
    made = plan(policy, Net((8, 8)), expert_parallel_size=2, reshard_local_experts=False)
    rows = {row["unit"]: row for row in unit_rows(made, 4)}
    experts = rows["predictor.blocks.0.experts"]
    assert experts["numel"] == 4 * 8
    assert experts["bytes_per_rank"] == 4 * 8 * 4 // 4
    assert experts["gathered_bytes"] == 4 * 8 * 4 // 2
    assert experts["reshard"] is False
    assert rows["predictor.blocks.0"]["reshard"] is True
    text = plan_texts({"predictor": made}, 4, 4)
    assert "experts: dealt out over 2 ranks, and each cut over 2" in text


def test_the_text_has_the_total_and_the_sources():
    policy = ShardingPolicy(units=("blocks.{*}",), recompute=("blocks.{*}",), num_to_forward_prefetch=1)
    made = plan(policy, Net((8, 8)), reshard_after_forward=False, offload_activations=("predictor.blocks.1",))
    text = plan_texts({"predictor": made}, 2, 4)
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("predictor: 4 ranks, parameters cut over 2, 2 copies\n")
    assert [
        "predictor.blocks.0",
        "96",
        "192",
        "B",
        "768",
        "B",
        "384",
        "B",
        "fp32",
        "yes",
        "no",
        "no",
        "1",
        "/",
        "auto",
    ] in lines
    assert [
        "predictor.blocks.1",
        "96",
        "192",
        "B",
        "768",
        "B",
        "384",
        "B",
        "fp32",
        "yes",
        "yes",
        "no",
        "0",
        "/",
        "auto",
    ] in lines
    assert ["total", "256", "512", "B", "2.0", "KiB"] in lines
    assert "predicted peak of parameters on the device: " in text
    assert "recompute: 2 modules, full, non-reentrant" in text
    assert "fsdp2.yaml: reshard_after_forward false, offload_activations" in text
    assert "policy: num_to_forward_prefetch 1, sub_modules_to_wrap, recompute_modules" in text
    assert "everything else: default" in text
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize(
    ("fsdp2", "ranks", "title"),
    [
        ({}, 1, "predictor: not sharded, there is one rank"),
        ({"param_dtype": "bf16"}, 1, "predictor: 1 rank, parameters cut over 1"),
        ({}, None, "predictor: whole sizes, since --nproc-per-node does not say"),
    ],
)
def test_one_rank_and_a_number_that_is_not_known(fsdp2, ranks, title):
    made = plan(net=Net((8, 8)), **fsdp2)
    assert plan_texts({"predictor": made}, 1, ranks).startswith(title)
    assert is_wrapped(made, 2)


def test_what_is_stored_with_the_run_has_every_field_of_the_plan():
    made = plan(ShardingPolicy(units=("blocks.{*}",), recompute=("blocks.{*}",)), param_dtype="bf16")
    stored = json.loads(json.dumps(made.as_dict(2, 4)))
    expected = set(ShardingPlan.__dataclass_fields__) - {"root", "ignored_parameters"}
    assert expected <= set(stored)
    assert (stored["shards"], stored["ranks"], stored["param_dtype"]) == (2, 4, "bf16")
    assert stored["recompute"][0] == "predictor.blocks.0"
    assert stored["units"][-1]["unit"] == "predictor"
    peak = peak_memory(made, 2)
    assert stored["memory"]["peak"] == peak.total
    assert replace(peak, on_host=True).total < peak.total


def test_the_table_is_on_the_console_once_and_in_the_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    for handler in before:
        root.removeHandler(handler)
    try:
        console.setup_logging(0, tmp_path)
        text = plan_texts({"predictor": plan()}, 2, 2)
        console.show(text)
        logging.getLogger("x").info("another line")
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
            handler.close()
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
    assert capsys.readouterr().err.count("predicted peak") == 1
    logged = (tmp_path / "rank-00000.log").read_text()
    assert text.rstrip() in logged
    assert "another line" in logged
