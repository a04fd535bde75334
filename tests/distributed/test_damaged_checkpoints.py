"""Checkpoints whose files were changed after they were written, with and without a marker that agrees."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from mm_core.weights import (
    WeightsError,
    layout,
    load_checkpoint,
    load_module_weights,
    resolve_load,
    save_checkpoint,
)
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)

STATE = {"step": 1, "consumed_samples": 8, "seed": 3}
WIDTH = 600  # 1.4 MB: above the size that is read through at once


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)


def save_run(run: Path, step: int, *, optimizer: bool = False) -> None:
    module = Tiny()
    adam = torch.optim.AdamW(module.parameters()) if optimizer else None
    save_checkpoint(run, step, {"m": module}, adam, STATE)


def load_run(run: Path, *, optimizer: bool = False) -> str:
    module = Tiny()
    adam = torch.optim.AdamW(module.parameters()) if optimizer else None
    try:
        load_checkpoint(resolve_load(run), {"m": module}, adam)
    except WeightsError as error:
        return str(error)
    return "loaded"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, by two ranks."""
    run: Path = tmp_path_factory.mktemp("written")

    def save() -> None:
        save_run(run, 1)
        save_run(run, 2, optimizer=True)

    run_ranks(save, 2)
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def renew_marker(checkpoint: Path) -> None:
    (checkpoint / ".complete").unlink()
    layout.write_marker(checkpoint, 2)


def test_every_file_has_a_checksum(run: Path) -> None:
    newest = run / "checkpoints/iter_0000002"
    entries = json.loads((newest / ".complete").read_text())["files"]
    assert set(entries) == {path.name for path in newest.iterdir()} - {".complete"}
    assert all(entry["blake2b"] == layout.checksum(newest / name) for name, entry in entries.items())
    assert max(entry["bytes"] for entry in entries.values()) > layout._QUICK


def test_one_flipped_bit_among_the_tensors_is_found_on_every_rank(run: Path) -> None:
    newest = run / "checkpoints/iter_0000002"
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    resolve_load(run)  # a quick look; big files are read through when they are wanted
    messages = run_ranks(load_run, 2, run)
    assert messages[0] == messages[1]
    assert f"iter_0000002 is damaged: {file.name} was changed after it was written" in messages[0]
    assert f"--load {run / 'checkpoints/iter_0000001'}" in messages[0]
    with pytest.raises(WeightsError, match="was changed after it was written"):
        load_module_weights(Tiny(), newest, prefix="m")


def test_a_marker_of_an_older_version_has_no_checksums_of_large_files(run: Path) -> None:
    marker = run / "checkpoints/iter_0000002/.complete"
    content = json.loads(marker.read_text())
    for entry in content["files"].values():
        if entry["bytes"] > layout._QUICK:
            del entry["blake2b"]
    marker.write_text(json.dumps(content))
    assert run_ranks(load_run, 1, run, optimizer=True) == ["loaded"]


def test_zeroed_tensors_under_a_marker_that_agrees(run: Path) -> None:
    newest = run / "checkpoints/iter_0000002"
    for file in newest.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    renew_marker(newest)
    messages = run_ranks(load_run, 2, run)
    assert messages[0] == messages[1]
    assert "iter_0000002 is damaged: its tensors cannot be read (" in messages[0]
    assert "iter_0000001" in messages[0]


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *where, key, value = path

    def change(content: dict[str, Any]) -> None:
        for part in where:
            content = content[part]
        if value is ...:
            del content[key]
        else:
            content[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("state", [1]), r"state is \[1\], but must be an object"),
        (_set("state", ...), "state is None, but must be an object"),
        (_set("state", "step", ...), "state has no step"),
        (_set("state", "consumed_samples", "8"), "state.consumed_samples is '8', but must be an integer"),
        (_set("state", "step", -1), "state.step is -1, but must not be negative"),
        (_set("state", "seed", None), "state.seed is None, but must be an integer"),
        (_set("state", "plugins", []), r"state.plugins is \[\], but must be an object"),
        (_set("state", "versions", {"torch": 2}), "state.versions is .*, but must be an object of versions"),
        (_set("state", "loader", "epoch 1"), "state.loader is 'epoch 1', but must be an object"),
        (_set("state", "loader", {"num_workers": 1}), "state.loader.micro_batch_size is None, but must be"),
        (
            _set("state", "loader", {"num_workers": 1, "micro_batch_size": 1, "ranks": []}),
            "state.loader.ranks must be a list",
        ),
        (_set("state", "schedule", {"peak": []}), r"state.schedule.peak is \[\], but must be a number"),
        (_set("state", "weights", {"m": 7}), "state.weights.m is 7, but must have objects"),
        (_set("iteration", "2"), "iteration is '2'"),
        (_set("format", 2), "has format 2; this version reads format 1"),
        (_set("optimizer", []), r"optimizer is \[\], but must be an object"),
        (_set("optimizer", {}), "optimizer must have groups"),
        (_set("optimizer", "groups", 0, 7), r"optimizer.groups\[0\] must have params"),
        (_set("optimizer", "groups", 0, "params", None), r"optimizer.groups\[0\] must have params"),
        (_set("optimizer", "scalars", {"a": []}), r"optimizer.scalars\['a'\] is \[\]"),
    ],
)
def test_a_state_of_another_shape(run: Path, change: Any, message: str) -> None:
    newest = run / "checkpoints/iter_0000002"
    content = json.loads((newest / "state.json").read_text())
    change(content)
    (newest / "state.json").write_text(json.dumps(content))
    renew_marker(newest)
    with pytest.raises(WeightsError, match=rf"{message}.*--load .*iter_0000001"):
        load_checkpoint(newest, {"m": Tiny()})


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "\0"])
def test_a_state_that_is_no_object(run: Path, text: str) -> None:
    newest = run / "checkpoints/iter_0000002"
    (newest / "state.json").write_text(text)
    renew_marker(newest)
    with pytest.raises(WeightsError, match=r"state\.json.*--load .*iter_0000001"):
        load_checkpoint(newest, {"m": Tiny()})


def test_a_state_without_plugins_is_an_older_one(run: Path) -> None:
    assert load_checkpoint(run / "checkpoints/iter_0000002", {"m": Tiny()}) == {**STATE, "plugins": {}}


def test_a_state_that_could_not_be_resumed_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="state has no consumed_samples"):
        save_checkpoint(tmp_path, 1, {"m": Tiny()}, None, {"step": 1})
    assert not (tmp_path / "checkpoints").exists()


def _first(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def _pickled(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        metadata = pickle.loads(data)
        change(metadata)
        return pickle.dumps(metadata)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"cpathlib._local\nPath\n.", "refused: No module named 'pathlib._local'"),
        (lambda data: pickle.dumps(Metadata.__new__(Metadata)), "refused: .*state_dict_metadata"),
        (lambda data: data[: len(data) // 2], "refused: "),
        (lambda data: b"", "refused: "),
        (_pickled(lambda m: setattr(_first(m), "offset", -9)), "refused: m.wide.*lies outside"),
        (_pickled(lambda m: setattr(_first(m), "length", 10**9)), "refused: m.wide.*lies outside"),
        (_pickled(lambda m: setattr(_first(m), "offset", None)), "refused: "),
        (_pickled(lambda m: setattr(_first(m), "relative_path", "x")), "its file 'x' is missing"),
        (_pickled(lambda m: setattr(m, "storage_data", None)), "does not say where the tensors are"),
        (_pickled(lambda m: m.storage_data.clear()), "the parts of m.wide.* do not make a tensor"),
        (_pickled(lambda m: m.state_dict_metadata["m.wide.bias"].chunks.clear()), "parts of m.wide.bias"),
        (_pickled(lambda m: setattr(m.state_dict_metadata["m.wide.bias"], "size", None)), "refused: "),
        (_pickled(lambda m: setattr(m, "storage_meta", 3)), "storage_meta is of another kind"),
    ],
)
def test_metadata_that_cannot_be_used(run: Path, change: Any, message: str) -> None:
    newest = run / "checkpoints/iter_0000001"
    (newest / ".metadata").write_bytes(change((newest / ".metadata").read_bytes()))
    renew_marker(newest)
    with pytest.raises(WeightsError, match=rf"\.metadata is {message}" if message[:3] == "ref" else message):
        load_checkpoint(newest, {"m": Tiny()})
