"""Folders into models that are cut in other ways than by rows: columns, rows within rows, stages of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mm_core.weights import LoadedFolder, WeightsError, load_hf_folder
from mm_core.weights.tensors import state_tensors, whole_tensor
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block() for _ in range(2)])
    save_file({key: t.bfloat16() for key, t in blocks.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def wholes(module: nn.Module) -> dict[str, list[Any]]:
    return {key: whole_tensor(t).tolist() for key, t in state_tensors(module).items()}


def expected(folder: Path) -> dict[str, list[Any]]:
    blocks = nn.ModuleList([Block() for _ in range(2)])
    load_hf_folder(blocks, folder)
    return {key: t.tolist() for key, t in blocks.state_dict().items()}


@pytest.mark.parametrize("shape", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_tensor_parallel_with_and_without_fsdp(shape: tuple[int, int], folder: Path) -> None:
    def run() -> tuple[dict[str, list[Any]], int]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        with torch.device("meta"):
            blocks = nn.ModuleList([Block() for _ in range(2)])
        for block in blocks:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["dp"])
        blocks.to_empty(device="cpu")
        loaded = load_hf_folder(blocks, folder)
        return wholes(blocks), loaded.read

    for found, read in run_ranks(run, shape[0] * shape[1]):
        assert found == expected(folder)
        assert read > 0


def test_a_stage_of_a_pipeline_takes_its_part(folder: Path) -> None:
    def run() -> tuple[dict[str, list[Any]], str]:
        rank = dist.get_rank()
        stage = nn.ModuleDict({str(rank): Block()})
        others = {
            key
            for other in range(2)
            if other != rank
            for key in nn.ModuleDict({str(other): Block()}).state_dict()
        }
        with pytest.raises(WeightsError, match=rf"unexpected: {1 - rank}\.down\.bias"):
            load_hf_folder(stage, folder)
        loaded: LoadedFolder = load_hf_folder(stage, folder, elsewhere=others)
        assert loaded.dtypes.keys() == stage.state_dict().keys()
        return {key: t.tolist() for key, t in stage.state_dict().items()}, loaded.dtypes[
            "0.up.bias" if rank == 0 else "1.up.bias"
        ]

    first, second = run_ranks(run, 2)
    assert first[0] | second[0] == expected(folder)
    assert {first[1], second[1]} == {"BF16"}
