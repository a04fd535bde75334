"""Files of `torch.save` give their tensors, and nothing that they name is run or allocated."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.weights import WeightsError
from mm_core.weights.foreign import foreign_names
from mm_core.weights.sources import CheckpointSource, SavedSource
from mm_core.weights.tensors_only import Inert, SavedFile

TRACE: list[str] = []


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __reduce__(self) -> Any:
        return (os.system, self.words) if self.words else (TRACE.append, ("ran",))


class Stranger:
    """Of a class of the program that wrote the file; its methods must not run here."""

    def __setstate__(self, state: Any) -> None:
        TRACE.append("ran")


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A file as torch.save writes it, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as written:
        written.writestr("x/data.pkl", data)
        for name, content in entries.items():
            written.writestr(f"x/{name}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        SavedFile(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    base = torch.randn(5, 4)
    marked = torch.arange(3.0)
    marked.partition_dim = 0  # Megatron leaves such marks
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "steps": base[::2, 1:],
        "bf16": base.bfloat16(),
        "fp8": base.to(torch.float8_e4m3fn),
        "integers": torch.tensor([2**40, -1]),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "parameter": nn.Parameter(base[0]),
        "marked": marked,
    }
    torch.save({"model": OrderedDict(tensors), "args": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    with SavedFile(tmp_path / "x.pt") as file:
        assert isinstance(file.content["args"], Inert)
        for name, tensor in tensors.items():
            read = file.read(file.content["model"][name])
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.double(), tensor.detach().double())
            assert read.is_contiguous()


def test_what_the_file_names_is_not_run(tmp_path: Path) -> None:
    TRACE.clear()
    proof = tmp_path / "ran"
    bombs = [Bomb(f"touch {proof}"), Bomb(), Stranger()]
    torch.save({"model": {"a": torch.ones(2)}, "args": bombs, Bomb(): 1}, tmp_path / "x.pt")
    assert SavedSource(tmp_path / "x.pt").read("model.a").tolist() == [1, 1]

    for number, content in enumerate((Bomb(f"touch {proof}"), {"model": Bomb()}, [Stranger()])):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(WeightsError, match="has no tensors"):
            SavedSource(tmp_path / f"{number}.pt")
    assert not proof.exists()
    assert not TRACE


# By hand: what no honest writer makes. `c` names an object, `R` calls one, `b` gives it a state.
_DESCRIBE = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
_STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"


def described(offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return _DESCRIBE + _STORAGE + offset + shape + stride + b"\x89}tR."


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (described(b"K\x01", b"K\x02\x85", b"K\x01\x85"), "does not fit into its 2 elements"),
        (described(b"K\x00", b"K\x03\x85", b"K\x00\x85"), "does not fit into its 2 elements"),
        (described(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "a tensor has size"),
        (
            described(b"K\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x7f\x85", b"K\x00\x85"),
            "a tensor has size",
        ),
        (described(b"K\x00", b"K\x02\x85", b")"), "a tensor has size"),
        (_STORAGE.replace(b"K\x02tQ", b"K\x03tQ") + b".", "has 8 bytes, and 3 elements"),
        (_STORAGE.replace(b"0X\x03", b"7X\x03") + b".", "which is not in the file"),
        (b"X\x01\x00\x00\x00aQ.", "it asks for 'a'"),
        (described(b"K\x00", b"K\x02\x85", b"K\x01\x85")[:-1] + b"}b.", "changes what only it describes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "changes what only it describes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "is given ()"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)tR.",
            "by itself",
        ),
        (b"cargparse\nNamespace\n}b.", "refused"),
        (b"ctorch\nSize\n(X\x01\x00\x00\x00a}ub.", "refused"),
        (b"\x82\x01.", "the opcode EXT1"),
        (b"Pa\n.", "the opcode PERSID"),
        (b"\x97.", "the opcode NEXT_BUFFER"),
        (b"Nr\xff\xff\xff\x7f.", "position 2147483647 of its memo"),
        (b"\x8e" + struct.pack("<Q", 1 << 40) + b"ab.", "refused"),
        (b"\x96" + struct.pack("<Q", 1 << 40) + b"ab.", "refused"),
        (b"\x8d" + struct.pack("<Q", 1 << 40) + b"ab.", "refused"),
        (b"(" * 100, "refused"),
        (b"", "refused"),
        (b"K\x01", "refused"),
        (b"0.", "refused"),
    ],
)
def test_descriptions_that_cannot_be_true(tmp_path: Path, data: bytes, why: str) -> None:
    path = archive(tmp_path / "x.pt", data, **{"data/0": b"\0" * 8})
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert why in message


def test_archives_that_are_none(tmp_path: Path) -> None:
    good = pickle.dumps({"model": {}}, protocol=2)
    assert "is compressed" in refusal(archive(tmp_path / "a.pt", good, zipfile.ZIP_DEFLATED))
    assert "little-endian" in refusal(archive(tmp_path / "b.pt", good, byteorder=b"big"))
    (tmp_path / "c.pt").write_bytes(pickle.dumps([1]))
    assert "no file of torch.save" in refusal(tmp_path / "c.pt")

    torch.save({"model": {"a": torch.ones(1000)}}, tmp_path / "d.pt")
    whole = (tmp_path / "d.pt").read_bytes()
    (tmp_path / "d.pt").write_bytes(whole[: len(whole) // 2])
    assert "was cut off" in refusal(tmp_path / "d.pt")
    # The list of entries is at the end: here it says that they lie elsewhere.
    (tmp_path / "d.pt").write_bytes(whole[1000:])
    assert "d.pt is" in refusal(tmp_path / "d.pt")

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        written.writestr("x/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            written.writestr("x/data.pkl", good)
    (tmp_path / "e.pt").write_bytes(buffer.getvalue())
    assert "two entries" in refusal(tmp_path / "e.pt")
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as written:
        written.writestr("x/y", b"")
    assert "without a data.pkl" in refusal(tmp_path / "f.pt")
    os.mkfifo(tmp_path / "g.pt")
    assert "no regular file" in refusal(tmp_path / "g.pt")
    assert "cannot be read" in refusal(tmp_path / "none.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickles_in_a_distributed_checkpoint_are_not_read(tmp_path: Path) -> None:
    TRACE.clear()
    import torch.distributed.checkpoint as dcp

    tensors = {"a": torch.randn(3, 4), "b": torch.ones((), dtype=torch.bfloat16)}
    dcp.save({"model": tensors, "args": Bomb()}, checkpoint_id=tmp_path / "x", no_dist=True)
    source = CheckpointSource(tmp_path / "x", only_tensors=False)
    assert sorted(source.tensors) == ["model.a", "model.b"]
    assert all(torch.equal(source.read(f"model.{name}"), tensor) for name, tensor in tensors.items())
    assert not TRACE
    with pytest.raises(WeightsError, match="'args' is no tensor"):
        CheckpointSource(tmp_path / "x")


def test_a_components_tensors_are_found_below_any_prefix() -> None:
    wanted = ["a.weight", "model.b"]
    for prefix in ("", "model.", "model.module.", "model.predictor.", "module.predictor."):
        names = foreign_names([f"{prefix}{name}" for name in wanted] + ["optim.x"], wanted, None, "predictor")
        assert {name: names.names.get(name) for name in wanted} == {
            name: f"{prefix}{name}" for name in wanted
        }
    names = foreign_names(["model.predictor.a.weight", "model.ae.c"], wanted, None, "predictor")
    assert names.names == {"a.weight": "model.predictor.a.weight"}
    assert names.left_out == ("model.ae.c",)
