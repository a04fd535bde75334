"""How the load of experts is counted, on any ranks."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.observe.callback import RunContext, StepRecord
from mm_core.sharding.expert_load import ExpertLoad
from mm_core.training.expert_load import ExpertLoadLog
from mm_core.training.tasks.router_loss import router_losses
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.models import DENSE, LENGTH, MOE, VOCABULARY

pytestmark = pytest.mark.timeout(120)
LAYERS = "predictor.model.layers.{*}"
CPU = torch.device("cpu")


def count(tp: int = 1, **fsdp2: Any) -> tuple[dict[str, list[float]], dict[str, float], list[float]]:
    composite = MOE.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2), ParallelSizes(tp=tp))
    materialize(composite.predictor, "cpu", 0)
    load = ExpertLoad(composite)
    mesh = composite.parallel_mesh
    composite.train()
    MOE.loss(composite.predictor, 0, mesh.dp_rank, mesh.dp_size)[0].backward()
    with torch.no_grad():  # no step of training
        MOE.loss(composite.predictor, 1, mesh.dp_rank, mesh.dp_size)
    numbers = load.numbers(CPU)
    dist.all_reduce(numbers)
    shares = {path: share.tolist() for path, share in load.shares(numbers).items()}
    return shares, load.metrics(numbers), load.numbers(CPU).tolist()


def chosen() -> list[list[float]]:
    """How often each expert is among the two likeliest of a token, from the routers' logits."""
    composite = MOE.composite()
    composite.fully_shard(None, Fsdp2Config())
    materialize(composite.predictor, "cpu", 0)
    found = composite.predictor(MOE.batch(0)["ids"], use_cache=False, output_router_logits=True).router_logits
    return [torch.bincount(one.topk(2).indices.flatten(), minlength=8).tolist() for one in found]


def test_shares_are_those_of_the_routers_choices():
    shares, metrics, after = run_ranks(count, 1)[0]
    assert list(shares) == [f"predictor.model.layers.{i}.mlp.experts" for i in range(3)]
    for share, times in zip(shares.values(), run_ranks(chosen, 1)[0], strict=True):
        assert share == pytest.approx([each / (8 * LENGTH * 2) for each in times])
    flat = [value * 8 for share in shares.values() for value in share]
    assert metrics["expert_load_max"] == pytest.approx(max(flat))
    assert metrics["expert_load_min"] == pytest.approx(min(flat))
    assert metrics["experts_idle"] == flat.count(0)
    assert 0.5 < metrics["expert_load_entropy"] < 1
    assert not any(after)  # counted from one call to the next


@pytest.mark.parametrize(
    ("world", "tp", "fsdp2"),
    [
        pytest.param(2, 1, {"expert_parallel_size": 2}, id="experts"),
        pytest.param(2, 2, {}, id="tensor"),
        pytest.param(4, 1, {"recompute_modules": (LAYERS,), "expert_parallel_size": 2}, id="recompute"),
    ],
)
def test_any_ranks_count_the_same(world, tp, fsdp2):
    one, one_metrics, _ = run_ranks(count, 1)[0]
    for shares, metrics, _ in run_ranks(count, world, tp, **fsdp2):
        assert list(shares) == list(one)
        for path, share in shares.items():
            assert share == pytest.approx(one[path])
        assert metrics == pytest.approx(one_metrics)


def test_metrics_of_a_known_load():
    def run() -> dict[str, float]:
        load = ExpertLoad(MOE.build())
        assert load.metrics(torch.zeros(24)) == {}
        even = torch.ones(8)
        one = torch.zeros(8)
        one[3] = 5
        return load.metrics(torch.cat([even, one, torch.zeros(8)]))

    found = run_ranks(run, 1)[0]
    assert found == pytest.approx(
        {"expert_load_max": 8, "expert_load_min": 0, "expert_load_entropy": 0.5, "experts_idle": 7}
    )


def test_a_model_without_experts_has_nothing_to_count():
    def run() -> tuple[dict[str, int], int, dict[str, float]]:
        load = ExpertLoad(DENSE.build())
        return load.layers, len(load.numbers(CPU)), load.metrics(torch.zeros(0))

    assert run_ranks(run, 1)[0] == ({}, 0, {})


def test_stages_of_a_pipeline_have_one_order_of_all_layers():
    def run() -> tuple[list[str], list[float]]:
        model = MOE.build()
        del model.model.layers[1 - dist.get_rank()]  # each rank has lost another one
        kept = model.model.layers[0].mlp.experts
        load = ExpertLoad(torch.nn.ModuleDict({f"stage{dist.get_rank()}": kept}))
        load._counts = {next(iter(load._own)): torch.full((8,), dist.get_rank() + 1.0)}
        numbers = load.numbers(CPU)
        dist.all_reduce(numbers)
        return list(load.layers), numbers.tolist()

    assert run_ranks(run, 2) == [(["stage0", "stage1"], [1.0] * 8 + [2.0] * 8)] * 2


def test_router_losses_of_parts_of_a_sequence_add_up():
    """Context parallelism: each rank has other tokens of the same samples."""

    def run() -> tuple[list[float], list[float]]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, LENGTH, 8, generator=generator)
        mask = (torch.randint(VOCABULARY, (2, LENGTH), generator=generator) > 9).long()
        own = slice(0, 4) if dist.get_rank() == 0 else slice(4, None)
        part = router_losses([logits[:, own]] * 2, 2, mask[:, own], dist.group.WORLD)
        dist.all_reduce(part)
        return part.tolist(), router_losses([logits] * 2, 2, mask).tolist()

    for found, wanted in run_ranks(run, 2):
        assert found == pytest.approx(wanted)


def test_the_log_has_a_line_each_interval_and_the_folder_every_share(tmp_path):
    def run() -> tuple[list[dict[str, float]], list[str]]:
        said: list[str] = []
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("mm_core.training.expert_load")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        composite = MOE.composite()
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=2))
        materialize(composite.predictor, "cpu", 0)
        rank, world = dist.get_rank(), dist.get_world_size()
        context = RunContext(rank, world, 4, 8, 2, tmp_path, composite)
        callback = ExpertLoadLog(CPU)
        callback.on_train_start(context)
        extras = []
        for step in range(5, 9):
            MOE.loss(composite.predictor, step, rank, world)[0].backward()
            record = StepRecord(step, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1)
            callback.on_step_end(context, record)
            extras.append(record.extra)
        callback.on_train_end(context)
        return extras, said

    (extras, said), (others, quiet) = run_ranks(run, 2)
    assert [bool(extra) for extra in extras] == [False, True, False, True]
    assert not any(others)
    assert not quiet
    assert len(said) == 2
    assert said[0].startswith("step 6: the fullest expert has ")
    lines = [json.loads(line) for line in (tmp_path / "logs" / "expert_load.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"]) for line in lines] == [(6, 2), (8, 2)]
    assert list(lines[0]["shares"]) == [f"predictor.model.layers.{i}.mlp.experts" for i in range(3)]
    assert lines[1]["expert_load_max"] == extras[3]["expert_load_max"]
