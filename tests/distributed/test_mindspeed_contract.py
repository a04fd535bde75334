"""MindSpeed's contract, both ways: its `TorchFullyShardedDataParallel` asks our model's `fully_shard` first, and our model
asks a part that was written for MindSpeed. MindSpeed cannot be installed here; the stand-in does what its page says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy
from mm_core.sharding.plan import ShardingError
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import SIZES, Composite, TinyWan, loss_of, optimizer_of, sharded, train

pytestmark = pytest.mark.timeout(120)
YAML = """
sharding_size: auto
sub_modules_to_wrap: ["predictor.blocks.{0-1}"]
ignored_modules: [ae]
"""
ADAPTOR = '''
"""The part of MindSpeed's adaptor that decides who shards a module."""

class TorchFullyShardedDataParallel:
    def __init__(self, config, ddp_config, module, process_group=None):
        self.module, self.process_group, self.ddp_config = module, process_group, ddp_config
        self.generic = False
        if hasattr(module, "fully_shard") and callable(getattr(module, "fully_shard")):
            execute_result = module.fully_shard(
                process_group=self.process_group,
                fsdp2_config_path=ddp_config.fsdp2_config_path,
            )
            if execute_result:
                return
        self.generic = True
'''


@pytest.fixture
def adaptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "site" / "mindspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "torch_fully_sharded_data_parallel_adaptor.py").write_text(ADAPTOR)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "mindspeed.torch_fully_sharded_data_parallel_adaptor"
    for name in [name for name in sys.modules if name.split(".")[0] == "mindspeed"]:
        del sys.modules[name]


def test_mindspeed_leaves_the_sharding_to_our_model(adaptor: str, tmp_path: Path) -> None:
    (tmp_path / "fsdp2.yaml").write_text(YAML)

    def run() -> dict[str, Any]:
        import importlib

        wrapper = importlib.import_module(adaptor).TorchFullyShardedDataParallel
        model = Composite()
        ddp_config = SimpleNamespace(fsdp2_config_path=str(tmp_path / "fsdp2.yaml"))
        wrapped = wrapper(None, ddp_config, model, process_group=dist.group.WORLD)
        materialize(model.predictor, "cpu", 0)
        return {
            "generic": wrapped.generic,
            "units": [unit.path for unit in model.sharding_plans["predictor"].units],
            "losses": train(model, optimizer_of(model), 0, 2),
        }

    def alone() -> list[float]:
        model = sharded(ignored_modules=("ae",))
        return train(model, optimizer_of(model), 0, 2)

    found = run_ranks(run, 2)[0]
    assert found["generic"] is False
    assert found["units"] == ["blocks.0", "blocks.1"]
    assert found["losses"] == pytest.approx(run_ranks(alone, 1)[0], rel=1e-5)


class ForMindSpeed(TinyWan):
    """A predictor as people write one for MindSpeed: it opens the path itself, and shards over the group."""

    answer: Any = True

    def fully_shard(self, process_group: dist.ProcessGroup, fsdp2_config_path: str) -> Any:
        self.path = fsdp2_config_path
        with open(fsdp2_config_path, encoding="utf-8") as file:
            self.read = yaml.safe_load(file)
        self.ranks = dist.get_process_group_ranks(process_group)
        if self.answer:
            mesh = init_device_mesh("cpu", (len(self.ranks),), mesh_dim_names=("Shard",))
            fully_shard(self.blocks[0], mesh=mesh)
            fully_shard(self, mesh=mesh)
        return self.answer


@pytest.mark.parametrize("size", ["auto", 1])
def test_a_part_written_for_mindspeed_gets_a_group_and_a_file(size: Any) -> None:
    def run() -> dict[str, Any]:
        model = Composite()
        with torch.device("meta"):
            model.predictor = ForMindSpeed(**SIZES)
        config = Fsdp2Config(
            sharding_size=size, sub_modules_to_wrap=("predictor.blocks.{*}",), ignored_modules=("ae",)
        )
        model.fully_shard(None, config)
        materialize(model.predictor, "cpu", 0)
        loss_of(model.predictor, 0).backward()
        part = model.predictor
        plan = model.sharding_plans["predictor"]
        return {
            "read": part.read,
            "ranks": part.ranks,
            "left": Path(part.path).exists(),
            "units": [unit.path for unit in plan.units],
        }

    for found in run_ranks(run, 2):
        # Patterns begin at the part, as it sees them; those of other parts are not its business.
        assert found["read"] == {"sharding_size": size, "sub_modules_to_wrap": ["blocks.{*}"]}
        assert found["ranks"] == [0, 1]  # also of a mesh that replicates
        assert found["units"] == ["blocks.0"]  # what it did, not what our plan was
        assert not found["left"]


def test_a_part_that_declines_is_sharded_by_the_plan() -> None:
    def run() -> tuple[Any, list[str], bool]:
        model = Composite()
        with torch.device("meta"):
            model.predictor = ForMindSpeed(**SIZES)
        model.predictor.answer = None  # what a `fully_shard` without a return statement answers
        model.fully_shard(None, Fsdp2Config(param_dtype="bf16"))
        units = [unit.path for unit in model.sharding_plans["predictor"].units]
        return model.predictor.read, units, isinstance(model.predictor, FSDPModule)

    read, units, done = run_ranks(run, 2)[0]
    assert read == {"sharding_size": "auto", "param_dtype": "bf16"}
    assert units == ["blocks.0", "blocks.1", "blocks.2", "proj_out"]
    assert done


def test_a_part_that_claims_to_be_sharded_and_is_not_is_an_error() -> None:
    class Claims(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

        def fully_shard(self, process_group: Any, fsdp2_config_path: str) -> bool:
            return True

    class Model(Composite):
        def sharding_roots(self) -> dict[str, ShardingPolicy]:
            return {"predictor": ShardingPolicy()}

    def run() -> str:
        model = Model()
        model.predictor = Claims()
        try:
            model.fully_shard(None, None)
        except ShardingError as error:
            return str(error)
        return "nothing raised"

    assert run_ranks(run, 2)[0] == '"predictor" says that it sharded itself, but its root is no FSDP module.'
