"""The sharding faults of MindSpeed-MM, each with a test that ours does not have it.

Names and numbers are those of the list of its silent failures (8.2) and crashes or wrong mathematics (8.3).
"""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from mm_core.config import ConfigError, parse_train_flags
from mm_core.config.document import read_document
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.section import check_section
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.patterns import PatternError, PlanError
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import POLICY, Composite, sharded, train_from_scratch

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[2]
BLOCKS = "predictor.blocks.{*}"


def read_fsdp2(tmp_path: Path, **keys: Any) -> Fsdp2Config:
    """fsdp2.yaml as a user has it, read from disk."""
    path = tmp_path / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(keys))
    checked = check_section(Fsdp2Config, read_document(path))
    if checked.section is None:
        raise ConfigError(checked.findings)
    return checked.section


# -- 8.2: silent failures -------------------------------------------------------------------------------------------


def test_fault_8_2_1_an_unknown_key_of_the_yaml_is_dropped(tmp_path):
    with pytest.raises(ConfigError, match=r"fsdp2\.yaml:1:1.*reshard_after_foward.*reshard_after_forward"):
        read_fsdp2(tmp_path, reshard_after_foward=False)


def test_fault_8_2_3_a_pattern_that_matches_nothing_is_only_printed(tmp_path):
    config = read_fsdp2(tmp_path, sub_modules_to_wrap=["predictor.block.{*}"])
    with pytest.raises(PatternError, match=r"predictor\.block\.\{\*\}.*matches no module.*predictor\.blocks"):
        build_plan(Composite().predictor, POLICY, config)


def test_fault_8_2_4_keys_are_ignored_by_the_models_own_policy(tmp_path):
    config = read_fsdp2(
        tmp_path,
        sub_modules_to_wrap=["predictor.blocks.{0-1}"],
        recompute_modules=["predictor.blocks.1"],
        use_reentrant=True,
        num_to_backward_prefetch=2,
    )
    plan = build_plan(Composite().predictor, POLICY, config)
    assert [unit.path for unit in plan.units] == ["blocks.0", "blocks.1"]
    assert (plan.recompute, plan.use_reentrant, plan.backward_prefetch) == (("blocks.1",), True, 2)


def test_fault_8_2_10_flags_are_dropped_when_the_first_argument_is_a_yaml(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("gpt_args:\n  distributed_backend: nccl\n  lr: 1.0e-5\n")
    flags = parse_train_flags([str(job), "--distributed-backend", "gloo", "--train-iters", "3"])
    assert (flags.distributed_backend, flags.train_iters, flags.lr) == ("gloo", 3, 1e-5)


def test_fault_8_2_13_experts_that_match_nothing_are_silently_not_distributed(tmp_path):
    config = read_fsdp2(tmp_path, expert_parallel_size=2, moe_modules=["predictor.blocks.{*}.experts"])
    with pytest.raises(PlanError, match=r"moe_modules.*experts.*matches no module"):
        build_plan(Composite().predictor, POLICY, config)
    none_named = read_fsdp2(tmp_path, expert_parallel_size=2)
    with pytest.raises(PlanError, match=r"expert_parallel_size.*2"):
        build_plan(Composite().predictor, POLICY, none_named)


# -- 8.3: crashes and wrong mathematics -----------------------------------------------------------------------------


def test_fault_8_3_uniform_recomputation_feeds_every_layer_of_a_chunk_the_same_input():
    """With more than one layer a chunk only the last layer's result was used."""
    from mm_core.config.recompute import with_recompute_flags

    flags = parse_train_flags(
        ["--train-iters", "3", "--lr", "1e-3", "--recompute-granularity", "full", "--recompute-method", "uniform",
         "--recompute-num-layers", "2"]
    )  # fmt: skip
    config, _ = with_recompute_flags(Fsdp2Config(), flags)
    written = {name: getattr(config, name) for name in config.model_fields_set}
    expected = run_ranks(train_from_scratch, 1, 3)[0]
    found = run_ranks(train_from_scratch, 2, 3, **written)[0]
    assert written  # the flags do ask for something
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_fault_8_3_blocks_wait_for_the_device_in_each_forward(monkeypatch):
    """Waiting for the device ends all overlap; here nothing in forward or backward may ask for it."""
    from mm_core.accelerator import Accelerator
    from tests.distributed.tiny import loss_of

    def step() -> str:
        def refuse(*_: Any) -> None:
            raise AssertionError("a forward or backward pass waited for the device")

        model = sharded(recompute_modules=(BLOCKS,), num_to_forward_prefetch=1)
        Accelerator.synchronize = refuse  # type: ignore[method-assign]
        torch.Tensor.item = refuse  # type: ignore[method-assign]
        torch.Tensor.tolist = refuse  # type: ignore[method-assign]
        loss_of(model.predictor, 0).backward()
        return "done"

    assert run_ranks(step, 2) == ["done", "done"]


def test_fault_8_3_data_parallel_ranks_share_timestep_and_noise():
    """Each sample has noise and a timestep of its own, whichever rank it is dealt to."""
    from mm_core.random import keyed_generator, keyed_normal

    def draw() -> tuple[float, float]:
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = [index for index in range(4) if index % world == rank]
        noise = keyed_normal(7, "noise", mine, (2, 2))
        timesteps = [torch.rand((), generator=keyed_generator(7, "timestep", i)).item() for i in mine]
        return noise[0].sum().item(), timesteps[0]

    (noise_a, time_a), (noise_b, time_b) = run_ranks(draw, 2)
    assert noise_a != noise_b
    assert time_a != time_b


@pytest.mark.parametrize("content", [None, {}, {"sharding_size": None}])
def test_fault_8_3_the_default_configuration_crashes(content, tmp_path):
    config = Fsdp2Config() if content is None else read_fsdp2(tmp_path, **content)
    plan = build_plan(Composite().predictor, ShardingPolicy(), config)
    assert [unit.path for unit in plan.units] == ["blocks.0", "blocks.1", "blocks.2"]


def test_fault_8_3_an_expert_parallel_size_of_null_crashes(tmp_path):
    config = read_fsdp2(tmp_path, expert_parallel_size=None)
    assert build_plan(Composite().predictor, POLICY, config).expert_parallel_size == 1


def test_fault_8_3_device_names_are_written_into_the_code():
    """Only the accelerator's file may know one device from another when a model is built, sharded and trained."""
    rooms = ("sharding", "training", "models", "weights", "data", "generation")
    files = [file for room in rooms for file in (ROOT / "mm_core" / room).rglob("*.py")]
    files += (ROOT / "mm_plugins").rglob("*.py")
    named = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in _lines_with_devices(file)]
    assert len(files) > 40
    assert named == []


def _lines_with_devices(file: Path) -> list[int]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if "::" not in text and text.partition(":")[0] in ("cuda", "npu", "nccl", "hccl"):  # no operator
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu"):
            found.append(node.lineno)
    return found


def test_fault_8_3_the_expert_mesh_ignores_the_process_group():
    from mm_core.sharding.mesh import EP, build_device_mesh, build_expert_mesh

    def meshes() -> Any:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mesh = build_device_mesh(Fsdp2Config(), groups[dist.get_rank() // 2])
        return build_expert_mesh(mesh, 2)[EP].mesh.tolist()

    assert run_ranks(meshes, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_fault_8_3_importing_replaces_functions_of_torch():
    script = """
import importlib, inspect, pkgutil, torch, torch.distributed as dist, torch.distributed.fsdp, torch.utils.checkpoint
import transformers, diffusers
places = [torch, torch.nn.Module, torch.Tensor, torch.nn.functional, torch.distributed, dist.distributed_c10d,
          torch.distributed.fsdp.FSDPModule, torch.utils.checkpoint, torch.optim.Optimizer, torch.autograd.Function]
def look():
    return {(str(place), name): id(value) for place in places for name, value in vars(place).items()
            if callable(value) and not name.startswith("__")}
before = look()
import mm_core
count = 0
for module in pkgutil.walk_packages(mm_core.__path__, "mm_core."):
    if module.name.endswith("__main__") or ".testing" in module.name:
        continue
    importlib.import_module(module.name)
    count += 1
after = look()
changed = [name for name, value in before.items() if after.get(name) != value]
assert count > 100, count
print(changed)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_fault_8_3_every_rank_prints_what_a_pattern_matched():
    def shard() -> str:
        import contextlib
        import io

        out = io.StringIO()
        handler = logging.StreamHandler(out)
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.INFO)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            sharded(recompute_modules=(BLOCKS,), ignored_modules=("ae",))
        return out.getvalue()

    assert run_ranks(shard, 2)[1] == ""
