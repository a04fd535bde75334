"""Folders that are written tensor by tensor, in any order."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mm_core.weights import WeightsError, load_hf_folder, save_hf_folder
from mm_core.weights.hf_writer import FolderWriter, PlannedTensor, split_files
from mm_core.weights.recipe import Concat, Narrowed, Picked, Recipe, Stack, Stored, Transposed
from mm_core.weights.stored import StoredWeights

TENSORS = {
    "odd": torch.tensor([1.5, -2.0, 3.0]).bfloat16(),
    "matrix": torch.arange(12.0).view(3, 4),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
    "mask": torch.tensor([True, False, True]),
    "on_its_side": torch.arange(6.0).view(2, 3).t(),
}
PLANNED = {name: PlannedTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("limit", [10**9, 50])
def test_tensors_come_back_whatever_the_order(tmp_path: Path, limit: int) -> None:
    planned = {**PLANNED, "matrix": PlannedTensor(torch.float16, (3, 4))}
    with FolderWriter(tmp_path / "w", planned, split_files(planned, limit), stem="model") as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
        assert not (tmp_path / "w").exists()
        writer.publish()
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "w").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.to(planned[name].dtype))
    index = tmp_path / "w" / "model.safetensors.index.json"
    assert index.exists() == (limit == 50)
    if limit == 50:
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(
            p.nbytes for p in planned.values()
        )


def test_what_is_not_complete_is_not_published(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "w", PLANNED, split_files(PLANNED, 10**9)) as writer:
        writer.write("odd", TENSORS["odd"])
        with pytest.raises(RuntimeError, match="5 tensors were not written: count …"):
            writer.publish()
        with pytest.raises(RuntimeError, match=r"matrix is \[2\], but \[3, 4\] was planned"):
            writer.write("matrix", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    planned = {"huge": PlannedTensor(torch.float32, (10**15,))}
    with pytest.raises(WeightsError, match=r"needs 4000000\.00 GB, but .* has .* GB free; make room"):
        FolderWriter(tmp_path / "w", planned, [["huge"]])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_in_the_middle(tmp_path: Path) -> None:
    """A limit of the process on the size of files plays the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FolderWriter(tmp_path / "w", PLANNED, split_files(PLANNED, 10**9)) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        try:
            with pytest.raises(
                WeightsError, match=r"w cannot be written \(File too large\); name another folder"
            ):
                writer.write("matrix", TENSORS["matrix"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_writes(tmp_path: Path) -> None:
    files = split_files(PLANNED, 10**9)
    (tmp_path / ".tmp-w").mkdir()  # of a crash
    with FolderWriter(tmp_path / "w", PLANNED, files) as writer:
        with pytest.raises(WeightsError, match="w is being written by another process; wait for it"):
            FolderWriter(tmp_path / "w", PLANNED, files)
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.publish()
    assert len(load_file(tmp_path / "w" / "diffusion_pytorch_model.safetensors")) == len(TENSORS)


def test_a_dtype_that_no_file_holds(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a: a safetensors file cannot hold torch\.complex128"):
        FolderWriter(tmp_path / "w", {"a": PlannedTensor(torch.complex128, (1,))}, [["a"]])
    assert list(tmp_path.iterdir()) == []


def test_a_group_of_names_stays_in_one_file() -> None:
    planned = {name: PlannedTensor(torch.uint8, (10,)) for name in "abcde"}
    assert split_files(planned, 20) == [["a", "b"], ["c", "d"], ["e"]]
    assert split_files(planned, 20, [["a"], ["b", "c", "d"], ["e"]]) == [["a"], ["b", "c", "d"], ["e"]]


class Experts(nn.Module):
    """All experts in one tensor, and two projections in one; two names for one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.qkv = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.tied = self.bias


#: One tensor an expert and half, on its side; one more that is made of two of the module's.
LAYOUT: dict[str, Recipe] = {
    **{
        f"experts.{i}.{half}": Transposed(0, 1, Picked(0, i, Narrowed(1, begin, begin + 3, Stored("up"))))
        for i in range(3)
        for half, begin in (("gate", 0), ("up", 3))
    },
    "all": Concat(0, (Stored("qkv"), Stack(0, (Stored("tied"),)))),
}


@pytest.mark.parametrize("averaged", [False, True])
def test_a_layout_is_written_as_it_says_and_averages_instead_of_weights(
    tmp_path: Path, averaged: bool
) -> None:
    module = Experts()
    values = {"up": torch.randn(3, 6, 5), "bias": torch.randn(5)} if averaged else {}
    state = {**module.state_dict(), **values}
    folder = save_hf_folder(
        module,
        tmp_path / "w",
        layout=LAYOUT,
        dtypes={"up": "BF16", "bias": "F16"},
        values=values,
        max_file_bytes=100,
    )
    assert len(list(folder.glob("*.safetensors"))) == 2
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == LAYOUT.keys()
    for i in range(3):
        assert torch.equal(found[f"experts.{i}.up"], state["up"][i, 3:].t().bfloat16())
        assert torch.equal(found[f"experts.{i}.gate"], state["up"][i, :3].t().bfloat16())
    assert torch.equal(found["all"], torch.cat([state["qkv"], state["bias"][None]]))


def test_a_layout_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        save_hf_folder(Experts(), tmp_path / "w", layout={"a": Stored("down"), "b": Stored("bias")})
    assert str(caught.value) == (
        "the folder's layout does not fit the module:\n"
        "  not in the module: down\n  not written: up\n  not written: qkv"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_remembered_of_a_folder_survives_json(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    save_hf_folder(module, tmp_path / "w", dtypes={"weight": "BF16"})
    loaded = load_hf_folder(module, tmp_path / "w")
    assert loaded.dtypes == {"weight": "BF16", "bias": "F32"}
    stored = StoredWeights(loaded.dtypes, {**loaded.layout, **LAYOUT})
    assert StoredWeights.from_json(json.loads(json.dumps(stored.as_json()))) == stored


@pytest.mark.parametrize(
    "value",
    [None, {"dtypes": {}}, {"dtypes": {"a": "BF17"}, "layout": {}}, {"dtypes": {}, "layout": {"a": ["x"]}}],
)
def test_what_is_no_such_memory(value: object) -> None:
    with pytest.raises(WeightsError):
        StoredWeights.from_json(value)
