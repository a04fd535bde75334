"""Strict loading of safetensors folders on one process."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mm_core.weights import WeightsError, is_hf_folder, load_hf_folder


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.register_buffer("mean", torch.ones(4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        if tied:
            self.head.weight = self.embed.weight


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / name)
    return folder


def test_parameters_buffers_and_scalars(tmp_path: Path) -> None:
    source, target = Net(), Net()
    load_hf_folder(target, write(tmp_path / "w", source.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_all_that_does_not_fit_is_listed_with_the_closest_names(tmp_path: Path) -> None:
    state = Net().state_dict()
    state["iner.weight"] = state.pop("inner.weight")
    state["head.weight"] = torch.zeros(5, 3)
    del state["mean"]
    target = Net()
    before = target.embed.weight.clone()
    with pytest.raises(WeightsError) as caught:
        load_hf_folder(target, write(tmp_path / "w", state))
    text = str(caught.value)
    assert "missing: inner.weight" in text
    assert "missing: mean" in text
    assert "unexpected: iner.weight (closest missing: inner.weight)" in text
    assert "shape: head.weight is [5, 3] in the file, [5, 4] in the model" in text
    assert torch.equal(target.embed.weight, before)  # nothing was loaded by halves


def test_a_tied_weight_may_be_stored_once_under_either_name(tmp_path: Path) -> None:
    for index, left_out in enumerate(("head.weight", "embed.weight")):
        source, target = Net(tied=True), Net(tied=True)
        state = {k: v for k, v in source.state_dict().items() if k != left_out}
        load_hf_folder(target, write(tmp_path / str(index), state))
        assert torch.equal(target.head.weight, source.embed.weight)


@pytest.mark.parametrize(
    "name", ["../w2/model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", 3]
)
def test_an_index_that_points_outside_is_refused(name: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "w", Net().state_dict())
    write(tmp_path / "w2", Net().state_dict())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    with pytest.raises(WeightsError, match="points outside the folder; refused"):
        load_hf_folder(Net(), folder)


def test_an_index_that_names_absent_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "w", Net().state_dict())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(
        WeightsError, match=r"1 missing files: model-2\.safetensors; the download is incomplete"
    ):
        load_hf_folder(Net(), folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {}}'])
def test_a_broken_index(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "w", Net().state_dict())
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="is no safetensors index"):
        load_hf_folder(Net(), folder)


def test_folders_without_weights_say_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "weights", {})
    with pytest.raises(WeightsError, match=f"no such folder of weights.*Closest: {tmp_path}/weights"):
        load_hf_folder(Net(), tmp_path / "wights")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    write(pipeline / "transformer", Net().state_dict(), "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match="Subfolders with weights: transformer"):
        load_hf_folder(Net(), pipeline)
    write(tmp_path / "two", {}, "a.safetensors")
    write(tmp_path / "two", {}, "b.safetensors")
    with pytest.raises(
        WeightsError, match=r"not exactly one safetensors file \(a.safetensors, b.safetensors\)"
    ):
        load_hf_folder(Net(), tmp_path / "two")


@pytest.mark.parametrize(
    "data", [b"", b"not a file", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 4) + b"{a:}"]
)
def test_a_file_that_is_no_safetensors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="is no safetensors file"):
        load_hf_folder(Net(), tmp_path)


def test_which_folders_hold_weights(tmp_path: Path) -> None:
    assert not is_hf_folder(tmp_path)
    assert not is_hf_folder(tmp_path / "absent")
    assert is_hf_folder(write(tmp_path / "w", {}))
    run = tmp_path / "iter_0000001"
    write(run, {}, "rng-00000.safetensors")
    (run / ".metadata").touch()
    assert not is_hf_folder(run)


def test_what_was_stored_is_told(tmp_path: Path) -> None:
    state = Net(tied=True).state_dict()
    del state["embed.weight"]
    state["inner.weight"] = state["inner.weight"].bfloat16()
    loaded = load_hf_folder(Net(tied=True), write(tmp_path / "w", state))
    assert loaded.dtypes == {
        "head.weight": "F32", "inner.weight": "BF16", "inner.bias": "F32", "mean": "F32", "scale": "F32",
    }  # fmt: skip
    assert loaded.read == loaded.nbytes == (20 + 4 + 4 + 1) * 4 + 16 * 2
    assert {key: recipe.key for key, recipe in loaded.layout.items()} == {key: key for key in loaded.dtypes}


def test_another_kind_of_numbers_is_an_error(tmp_path: Path) -> None:
    state = Net().state_dict()
    state["inner.weight"] = state["inner.weight"].to(torch.int8)
    with pytest.raises(
        WeightsError, match=r"dtype: inner\.weight is I8 in the file, float32 in the model; quantized"
    ):
        load_hf_folder(Net(), write(tmp_path / "w", state))
    raw = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"1")
    module = nn.Module()
    module.a = nn.Parameter(torch.zeros(2))
    with pytest.raises(WeightsError, match="dtype: a is F4 in the file, which is not read here"):
        load_hf_folder(module, tmp_path / "f")


def test_tensors_of_other_stages_may_be_there(tmp_path: Path) -> None:
    state = Net().state_dict() | {"blocks.7.weight": torch.ones(2)}
    load_hf_folder(Net(), write(tmp_path / "w", state), elsewhere={"blocks.7.weight"})
    with pytest.raises(WeightsError, match=r"unexpected: blocks\.7\.weight"):
        load_hf_folder(Net(), tmp_path / "w")


@pytest.mark.parametrize("indexed", [False, True])
def test_links_out_are_refused_but_for_the_hubs_cache(indexed: bool, tmp_path: Path) -> None:
    home = write(tmp_path / "home", Net().state_dict())
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123" / "transformer"
    for folder, target in (
        (tmp_path / "w", home / "model.safetensors"),
        (snapshot, Path("../../../blobs/abcd")),
    ):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(target)
        if indexed:
            index = {"weight_map": dict.fromkeys(Net().state_dict(), "model.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abcd").write_bytes((home / "model.safetensors").read_bytes())
    load_hf_folder(Net(), snapshot)
    (tmp_path / "beside").symlink_to(home)
    load_hf_folder(Net(), tmp_path / "beside")
    with pytest.raises(
        WeightsError, match=r"leads to .*/home/model\.safetensors, outside the folder; refused"
    ):
        load_hf_folder(Net(), tmp_path / "w")


def test_an_absurd_index_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "w", Net().state_dict())
    with (folder / "model.safetensors.index.json").open("wb") as out:
        out.truncate(1 << 40)
    with pytest.raises(WeightsError, match="it has 1099511627776 bytes, and 100000000 are the most"):
        load_hf_folder(Net(), folder)
