"""Megatron's groups and layers on device meshes, with the real Megatron-Core. `test_megatron_core` installs it and runs
this file; a plain run of the tests does not collect it.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.megatron import destroy_parallel_state, initialize_parallel_state, transformer_config
from mm_core.sharding.mesh import build_device_mesh
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import Composite, optimizer_of, train
from tests.e2e.conftest import ROOT
from tests.e2e.pages import titled

# Imported before ranks are forked: it takes seconds.
from megatron.core import parallel_state as state  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # isort: skip

pytestmark = pytest.mark.timeout(240)
TINY = {"text_decoder": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 32}}


# -- parallel_state


def _theirs() -> dict[str, list[int]]:
    groups = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def _sum_of_ranks(group: dist.ProcessGroup) -> int:
    value = torch.tensor(dist.get_rank())
    dist.all_reduce(value, group=group)
    return int(value)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2,), ("dp_shard",)),
        ((2,), ("tp",)),
        ((2, 2), ("dp_shard", "tp")),
        ((2, 2), ("tp", "dp_shard")),  # not Megatron's own order
        ((2, 2), ("pp", "cp")),
        ((2, 1, 2), ("pp", "dp_shard", "tp")),
    ],
)
def test_megatrons_groups_are_those_of_the_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    def run() -> None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        initialize_parallel_state(mesh)
        expected = {kind: [dist.get_rank()] for kind in ("tp", "cp", "dp", "pp")}
        for name in names:
            expected["dp" if name.startswith("dp") else name] = dist.get_process_group_ranks(
                mesh.get_group(name)
            )
        assert _theirs() == expected
        assert _sum_of_ranks(state.get_tensor_model_parallel_group()) == sum(expected["tp"])
        assert _sum_of_ranks(state.get_data_parallel_group_gloo()) == sum(expected["dp"])
        initialize_parallel_state(mesh)  # a second time changes nothing
        assert _theirs() == expected
        destroy_parallel_state()
        assert not state.model_parallel_is_initialized()
        destroy_parallel_state()
        initialize_parallel_state(mesh)
        assert _theirs() == expected

    run_ranks(run, math.prod(shape))


def test_the_meshes_that_the_engine_makes() -> None:
    def run() -> list[int]:
        initialize_parallel_state(build_device_mesh(Fsdp2Config(sharding_size=2)))  # replicate 2 × shard 2
        return _theirs()["dp"]

    assert run_ranks(run, 4) == [[0, 1, 2, 3]] * 4


def test_a_state_of_others_is_kept_if_it_is_the_same_and_an_error_if_not() -> None:
    def run() -> tuple[str, bool]:
        state.initialize_model_parallel(tensor_model_parallel_size=2)
        initialize_parallel_state(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp")))
        destroy_parallel_state()  # it is not ours
        alive = state.model_parallel_is_initialized()
        try:
            initialize_parallel_state(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
        except UserError as error:
            return str(error), alive
        return "nothing raised", alive

    message, alive = run_ranks(run, 2)[1]
    assert alive
    assert message == (
        "Megatron's parallel state is initialised already, with other ranks than the device mesh (dp_shard 2) gives "
        "rank 1: tensor parallel ranks [0, 1], not [1]; data parallel ranks [1], not [0, 1]; initialise it in one "
        "place only, or end the other with megatron.core.parallel_state.destroy_model_parallel()"
    )


def test_a_state_of_a_process_group_that_has_ended_counts_for_nothing() -> None:
    def run() -> list[int]:
        initialize_parallel_state(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        initialize_parallel_state(init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",)))
        return _theirs()["dp"]

    assert run_ranks(run, 1) == [[0]]


def test_meshes_that_megatron_cannot_follow() -> None:
    def refused(mesh: DeviceMesh) -> str:
        try:
            initialize_parallel_state(mesh)
        except UserError as error:
            return str(error)
        return "nothing raised"

    def run() -> list[str]:
        found = [
            refused(init_device_mesh("cpu", (4,))),
            refused(init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))),
            refused(init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "tp", "dp_shard"))),
            refused(DeviceMesh("cpu", torch.tensor([3, 2, 1, 0]), mesh_dim_names=("tp",))),
            refused(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))["tp"]),
        ]
        assert not state.model_parallel_is_initialized()
        return found

    assert run_ranks(run, 4)[0] == [
        "The dimensions of the device mesh (? 4) have no names; name them tp, cp, dp…, or pp",
        'The dimension "ep" of the device mesh (ep 4) is none that Megatron-Core has; use tp, cp, pp or names that '
        "begin with dp",
        "The data-parallel dimensions of the device mesh (dp_replicate 2, tp 1, dp_shard 2) do not stand side by side, "
        "so they are no single group of Megatron's; move them together",
        "The device mesh (tp 4) is not over all 4 ranks in their order, and Megatron's parallel state always is; make "
        "it with torch's init_device_mesh",
        "The device mesh (tp 2) is not over all 4 ranks in their order, and Megatron's parallel state always is; make "
        "it with torch's init_device_mesh",
    ]


# -- layers on these groups


def test_megatrons_parallel_layers_compute_and_learn_as_whole_ones_do() -> None:
    """Column, then row: the product of the whole matrices, and the gradients of each rank's part."""

    def run() -> dict[str, bool]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        initialize_parallel_state(mesh)
        config = transformer_config(TINY, {"tensor_model_parallel_size": 2})
        torch.manual_seed(0)  # Megatron deals the parts of one matrix that every rank draws
        up = ColumnParallelLinear(
            16, 32, config=config, init_method=config.init_method, gather_output=False, bias=True
        )
        down = RowParallelLinear(
            32, 16, config=config, init_method=config.init_method, input_is_parallel=True, bias=True, skip_bias_add=False
        )  # fmt: skip
        group = state.get_tensor_model_parallel_group()

        def whole(part: torch.Tensor, dim: int) -> torch.Tensor:
            parts = [torch.empty_like(part) for _ in range(2)]
            dist.all_gather(parts, part.detach().contiguous(), group=group)
            return torch.cat(parts, dim)

        x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
        y = down(up(x)[0])[0]
        y.square().sum().backward()
        first = whole(up.weight, 0).requires_grad_()
        second = whole(down.weight, 1).requires_grad_()
        z = x @ first.T @ second.T  # biases start at zero
        z.square().sum().backward()
        return {
            "parts": (tuple(up.weight.shape), tuple(down.weight.shape)) == ((16, 16), (16, 16)),
            "not zero": bool(z.abs().max() > 1e-4),
            "forward": torch.allclose(y, z, rtol=1e-4, atol=1e-7),
            "up": torch.allclose(whole(up.weight.grad, 0), first.grad, rtol=1e-4, atol=1e-7),
            "down": torch.allclose(whole(down.weight.grad, 1), second.grad, rtol=1e-4, atol=1e-7),
        }

    assert run_ranks(run, 4) == [dict.fromkeys(("parts", "not zero", "forward", "up", "down"), True)] * 4


# -- MindSpeed's adaptor in Megatron's own class

ADAPTOR = """
from megatron.core import parallel_state
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel


def torch_fully_sharded_data_parallel_init(self, config, ddp_config, module, process_group=None):
    super(TorchFullyShardedDataParallel, self).__init__(config=config, module=module)
    self.ddp_config = ddp_config
    self.process_group = process_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
    if callable(getattr(module, "fully_shard", None)):
        if module.fully_shard(process_group=self.process_group, fsdp2_config_path=ddp_config.fsdp2_config_path):
            return
    raise AssertionError("the generic way")


TorchFullyShardedDataParallel.__init__ = torch_fully_sharded_data_parallel_init
"""


def test_our_model_inside_megatrons_wrapper_as_mindspeed_adapts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_core.weights import materialize

    package = tmp_path / "site" / "mindspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "megatron_adaptor.py").write_text(ADAPTOR)
    (tmp_path / "fsdp2.yaml").write_text(
        "sub_modules_to_wrap: ['predictor.blocks.{*}']\nignored_modules: [ae]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def run() -> tuple[list[str], list[float], bool]:
        from mm_core.accelerator import Accelerator
        from mm_core.megatron.installed import adapt

        # The device is pretended, and only while MindSpeed is asked: no NPU is here.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accelerator, "current", staticmethod(lambda: Accelerator("npu")))
            assert adapt()
        from megatron.core.distributed import TorchFullyShardedDataParallel

        initialize_parallel_state(build_device_mesh(Fsdp2Config()))
        model = Composite()
        ddp_config = SimpleNamespace(fsdp2_config_path=str(tmp_path / "fsdp2.yaml"))
        wrapped = TorchFullyShardedDataParallel(transformer_config(TINY), ddp_config, model)
        materialize(model.predictor, "cpu", 0)
        units = [unit.path for unit in model.sharding_plans["predictor"].units]
        return units, train(model, optimizer_of(model), 0, 2), wrapped.module is model

    units, losses, same = run_ranks(run, 2)[0]
    assert units == ["blocks.0", "blocks.1", "blocks.2"]
    assert losses[1] != losses[0]
    assert same


# -- the documentation


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/megatron.md"
    shutil.copy(ROOT / "tests/corpus/wan2.2/5B/t2v/pretrain_model.json", tmp_path / "model.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(titled(page, "check_sizes.py"), "check_sizes.py", "exec"), {})

    def run() -> str:
        names: dict[str, Any] = {}
        exec(compile(titled(page, "parallel_layer.py"), "parallel_layer.py", "exec"), names)
        return json.dumps(list(names["output"].shape))

    assert run_ranks(run, 2) == ["[4, 2, 32]"] * 2
