"""Files that were made to do harm: each is refused in one sentence, nothing that it names is run, and nothing is allocated
that it has no bytes for.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mm_core.weights import WeightsError, layout, load_hf_folder, load_module_weights, save_checkpoint
from mm_core.weights.foreign import find_foreign, open_foreign
from mm_core.weights.sources import CheckpointSource, FolderSource
from mm_core.weights.tensors_only import SavedFile

pytestmark = pytest.mark.timeout(60)
HUGE = 1 << 50


@contextmanager
def little_memory(room: int = 512 << 20) -> Iterator[None]:
    """No more than this can be allocated, also of what is not touched. A thread takes some 70 MB of it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(call: Callable[[], Any]) -> str:
    """What a call says that has to refuse; running out of memory is no refusal."""
    with little_memory(), pytest.raises(WeightsError) as caught:
        call()
    text = str(caught.value)
    assert "Memory" not in text
    assert "allocate" not in text
    assert "refused: ." not in text, "an error without words, as Python's of its memory"
    assert len(text) < 800
    return text


# -- what runs something ------------------------------------------------------------------------------------------------


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


def bombs(flag: Path) -> dict[str, bytes]:
    """Pickles that run `touch flag`, by the way in which they do."""
    command = f"touch {flag}".encode()
    python = f"__import__('os').system({f'touch {flag}'!r})".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    code = b"X" + struct.pack("<I", len(python)) + python
    return {
        "reduce": pickle.dumps(Bomb(flag)),
        "reduce-0": pickle.dumps(Bomb(flag), protocol=0),
        "inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "eval": b"cbuiltins\neval\n" + code + b"\x85R.",
        "stack-global": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + text + b"\x85R.",
        "dotted-name": b"\x80\x04\x8c\x07pathlib\x94\x8c\x0bos.system.__call__\x94\x93" + text + b"\x85R.",
        "dotted-allowed": b"\x80\x04\x8c\x07pathlib\x94\x8c\x0fPath.cwd().open\x94\x93)R.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR" + text + b"\x85R.",
        "in-a-key": b"}cos\nsystem\n" + text + b"\x85RK\x01s.",
        "torch": b"ctorch.serialization\nload\n" + text + b"\x85R.",
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + text + b"tR)R.",
    }


KINDS = sorted(bombs(Path("x")))


def test_the_bombs_are_live(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    live = set()
    for kind, data in bombs(flag).items():
        with suppress(Exception):  # some only try
            pickle.loads(data)
        if flag.exists():
            live.add(kind)
            flag.unlink()
    assert live >= set(KINDS) - {"dotted-name", "dotted-allowed", "torch"}


def archive(path: Path, data: bytes, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A file as torch.save writes it."""
    with zipfile.ZipFile(path, "w", **options) as out:
        out.writestr("archive/data.pkl", data)
        for name, content in {"version": b"3", **(entries or {})}.items():
            out.writestr(f"archive/{name}", content)
    return path


_TWICE = b"K\x01" + b"2\x86" * 100  # a tuple that holds another one twice, and so on: hashing it never ends
_DEEP = b"K\x01" + b"\x85" * 300_000  # hashing it takes more stack than there is
_LONG = b"](" + b"K\x01" * 1000 + b"e"
_INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "data",
    [
        b"}" + _TWICE + b"K\x01s.",
        b"}" + _DEEP + b"K\x01s.",
        b"}(" + _TWICE + b"K\x01u.",
        b"}" + _INDEX + b")\x81}(X\x03\x00\x00\x00fqn" + _TWICE + b"X\x06\x00\x00\x00offsetNubK\x01s.",
        b"}" + _INDEX + b")\x81}(X\x03\x00\x00\x00fqnX\x01\x00\x00\x00aX\x06\x00\x00\x00offset"
        + _TWICE + b"ubK\x01s.",
        b"ccollections\nOrderedDict\n]" + _TWICE + b"K\x01\x86a\x85R.",
        b"ctorch\nSize\n" + _LONG + b"\x85R.",
        _INDEX + b"X\x01\x00\x00\x00a" + _LONG + b"\x86R.",
        b"(" + _LONG + b"ctorch\nSize\no.",
    ],
    ids=["twice", "deep", "pairs", "name", "place", "ordered", "size", "index", "obj"],
)  # fmt: skip
def test_metadata_that_would_keep_the_reader_busy(data: bytes, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / ".metadata").write_bytes(data)
    assert "metadata is refused" in refused(lambda: CheckpointSource(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_runs_anything(kind: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    data = bombs(flag)[kind]
    with suppress(WeightsError):
        SavedFile(archive(tmp_path / "a.pt", data)).close()
    (tmp_path / "plain.pt").write_bytes(data)
    refused(lambda: SavedFile(tmp_path / "plain.pt"))
    folder = checkpoint(tmp_path)
    (folder / ".metadata").write_bytes(data)
    renew_marker(folder)
    assert "metadata is refused" in refused(lambda: load_module_weights(nn.Linear(2, 2), folder, prefix="m"))
    assert "metadata is refused" in refused(lambda: CheckpointSource(folder, only_tensors=False))
    assert not flag.exists()


def test_a_bomb_beside_tensors_does_not_go_off(tmp_path: Path) -> None:
    flag, file = tmp_path / "flag", tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"weight": torch.arange(4.0)}, "args": Bomb(flag)}, file)
    source = open_foreign(file)
    (name,) = source.tensors
    assert source.read(name).tolist() == [0, 1, 2, 3]
    assert not flag.exists()
    torch.load(file, weights_only=False)
    assert flag.exists()


# -- what claims to be larger than it is --------------------------------------------------------------------------------

_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def rebuilt(numel: int, offset: int, size: int, stride: int) -> bytes:
    storage = _STORAGE + number(numel) + b"tQ"
    sizes = number(size) + b"\x85" + number(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89}tR."


LIARS = {
    "elements": rebuilt(HUGE, 0, 4, 1),
    "size": rebuilt(4, 0, HUGE, 1),
    "stride-0": rebuilt(4, 0, HUGE, 0),
    "stride": rebuilt(4, 0, 2, HUGE),
    "negative": rebuilt(4, 3, 2, -1),
    "offset": rebuilt(4, HUGE, 1, 1),
    "memo": b"Nr\xff\xff\xff\x7f.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x.",
    "some-bytearray": b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N.",
    "long": b"\x8b\xff\xff\xff\x7f1.",
    "nested": b"(" * 50_000 + b"t" * 50_000 + b".",
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_saved_file_that_claims_too_much(kind: str, tmp_path: Path) -> None:
    data = LIARS[kind]
    file = archive(tmp_path / "a.pt", data, {"data/0": bytes(16)})
    if kind == "nested":  # nothing is wrong with it
        with little_memory():
            SavedFile(file).close()
    else:
        assert f"{file} is refused" in refused(lambda: SavedFile(file))


@pytest.mark.parametrize("kind", [kind for kind in LIARS if kind != "nested"])
def test_metadata_that_claims_too_much(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / ".metadata").write_bytes(LIARS[kind])
    assert "metadata is refused" in refused(lambda: CheckpointSource(folder))


@pytest.mark.parametrize("around", [b"%sQ.", b"ctorch._utils\n_rebuild_tensor_v2\n(%stR."])
def test_what_cannot_be_printed_is_not_printed(around: bytes, tmp_path: Path) -> None:
    """Each list holds the one before twice: 60 of them have 2⁶⁰ places."""
    lists = b"]" + b"".join(
        b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )
    file = archive(tmp_path / "a.pt", around % lists)
    assert "is refused" in refused(lambda: SavedFile(file))


_TWICE = b")\x85" + b"2\x86" * 60  # each tuple holds the one before twice: 2⁶⁰ places
_DEEP = b")" + b"\x85" * 250_000  # in each other: more than a stack holds


@pytest.mark.parametrize(
    "data",
    [
        b"}" + _TWICE + b"Ns.",
        b"}(" + _TWICE + b"Nu.",
        b"(" + _TWICE + b"Nd.",
        b"\x8f(" + _TWICE + b"\x90.",
        b"(" + _TWICE + b"\x91.",
        b"}" + _DEEP + b"Ns.",
        b"ccollections\nOrderedDict\n](" + _TWICE + b"N\x86e\x85R.",
    ],
    ids=["setitem", "setitems", "dict", "set", "frozenset", "deep", "pairs"],
)
def test_keys_whose_hash_takes_for_ever(data: bytes, tmp_path: Path) -> None:
    assert "is refused" in refused(lambda: SavedFile(archive(tmp_path / "a.pt", data)))


def test_a_long_list_is_not_copied_again_and_again(tmp_path: Path) -> None:
    data = b"ctorch\nSize\nq\x00](" + b"N" * 100_000 + b"eq\x01" + b"h\x00h\x01\x85R" * 10_000 + b"."
    assert "is refused: a size is" in refused(lambda: SavedFile(archive(tmp_path / "a.pt", data)))


def test_keys_that_are_short_tuples(tmp_path: Path) -> None:
    saved = {("a", 1): {2}, 3: frozenset({None, 1.5})}
    assert SavedFile(archive(tmp_path / "a.pt", pickle.dumps(saved))).content == saved


def test_an_archive_that_unpacks_to_much_more(tmp_path: Path) -> None:
    data = b"B" + struct.pack("<I", 1 << 26) + bytes(1 << 26) + b"."
    file = archive(tmp_path / "a.pt", data, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 20
    assert "compressed" in refused(lambda: SavedFile(file))


def test_an_archive_whose_entries_lie_elsewhere(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.pt", pickle.dumps({}), {"data/0": bytes(16)})
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 1 << 30, 1 << 30)  # sizes
    file.write_bytes(data)
    refused(lambda: SavedFile(file))
    struct.pack_into("<II", data, entry + 20, 16, 16)
    struct.pack_into("<I", data, entry + 42, len(data) + 100)  # where it begins
    file.write_bytes(data)
    refused(lambda: SavedFile(file))


def test_metadata_of_a_tensor_that_its_file_is_too_short_for(tmp_path: Path) -> None:
    """The parts make a whole and lie in the file, but have not as many bytes as elements."""
    folder = checkpoint(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["m.bias"]
    entry.size = torch.Size([HUGE])
    entry.chunks[0].sizes = torch.Size([HUGE])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "m.bias" in refused(lambda: CheckpointSource(folder).read("m.bias"))


def header(path: Path, entries: dict[str, Any], length: int | None = None) -> None:
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)


@pytest.mark.parametrize("length", [HUGE, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_absurd_length(length: int, tmp_path: Path) -> None:
    header(tmp_path / "model.safetensors", {}, length)
    assert f"its header would have {length} bytes" in refused(
        lambda: load_hf_folder(nn.Linear(2, 2), tmp_path)
    )
    assert f"its header would have {length} bytes" in refused(lambda: FolderSource(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]},
        {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [HUGE, 0], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [HUGE], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F" * 10**5, "shape": [0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 0]},
    ],
)
def test_a_safetensors_header_that_claims_too_much(entry: dict[str, Any], tmp_path: Path) -> None:
    header(tmp_path / "model.safetensors", {"weight": entry})
    refused(lambda: load_hf_folder(nn.Linear(2, 2), tmp_path))
    refused(lambda: FolderSource(tmp_path))


# -- what leads elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors", "a\0b",
     "..", "", ".", 7, None, ["x"], "x" * 5000, "\ud800"],
)  # fmt: skip
def test_an_index_that_leads_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    if name == "/secret.safetensors":
        name = str(tmp_path / "secret.safetensors")
    index = {"weight_map": {"weight": name, "bias": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    assert "index.json" in refused(lambda: load_hf_folder(module, folder))
    assert "index.json" in refused(lambda: FolderSource(folder))
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    "text", ["../other", "/etc", "release/../../other", "", "x" * 100_000, "\0", "-1", "9" * 5000]
)
def test_a_tracker_that_leads_out_of_its_folder(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other/mp_rank_00"
    other.mkdir(parents=True)
    torch.save({"model": {"weight": torch.ones(2)}}, other / "model_optim_rng.pt")
    folder = tmp_path / "folder"
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    assert "latest_checkpointed_iteration.txt" in refused(lambda: find_foreign(folder))


def checkpoint(run: Path) -> Path:
    """One of a tiny module."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    state = {"step": 1, "consumed_samples": 1, "seed": 1}
    return save_checkpoint(run, 1, {"m": nn.Linear(2, 2)}, None, state, with_rng=False)


def renew_marker(folder: Path) -> None:
    """As an attacker would: the marker agrees with the changed files."""
    (folder / ".complete").unlink()
    layout.write_marker(folder, 1)
