"""Weights adapters: found by the component's id, and what a folder becomes with one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm_core.config import ComponentConfig
from mm_core.models.pretrained import load_predictor_folder
from mm_core.weights import StateDictAdapter, WeightsError, find_adapter, load_hf_folder, save_hf_folder
from mm_registry import BrokenPluginError, PluginManager, default_manager, reset_default_manager
from mm_registry.errors import UserError

PREDICTORS, WEIGHTS = "mm_core.predictor_models", "mm_core.weights"


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.register_buffer("mean", torch.rand(4))
        self.scale = nn.Parameter(torch.rand(()))
        if tied:
            self.head.weight = self.embed.weight


class Renaming:
    """Upstream calls `inner` `transformer.proj`."""

    def __init__(self, fields: Mapping[str, Any] | None = None) -> None:
        self.fields = fields

    def to_module(self, key: str) -> str:
        return key.removeprefix("net.").replace("transformer.proj", "inner")

    def to_folder(self, key: str) -> str:
        return "net." + key.replace("inner", "transformer.proj")

    def config_to_folder(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"_class_name": "Upstream", "num_heads": fields["heads"]}

    def config_problems(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        theirs = config.get("num_heads")
        return (
            [] if theirs == fields["heads"] else [f"num_heads is {theirs} there and {fields['heads']} here"]
        )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# -- lookup


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ComponentConfig]]:
    """Install a plugin whose predictor `net` has the given weights adapter, and return the section of one."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(source: str, target: str = "acme_net_weights:adapter") -> ComponentConfig:
        info = site / "acme_net-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.4\nName: acme-net\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[{PREDICTORS}]\nnet = acme_net_weights:Net\n[{WEIGHTS}]\npredictor/net = {target}\n"
        )
        (site / "acme_net_weights.py").write_text(source)
        reset_default_manager()
        spec = default_manager().resolve(PREDICTORS, "net")
        return ComponentConfig("predictor", "net", spec, fields={"heads": 2}, path=("low_noise_predictor",))

    yield install
    reset_default_manager()
    sys.modules.pop("acme_net_weights", None)


FROM_HERE = f"from {__name__} import Net, Renaming\n"


@pytest.mark.parametrize(
    "source",
    ["adapter = Renaming()", "adapter = Renaming", "def adapter(fields):\n    return Renaming(fields)"],
    ids=["instance", "class", "function"],
)
def test_what_may_be_registered(plugin: Callable[..., ComponentConfig], source: str) -> None:
    component = plugin(FROM_HERE + source)
    adapter = find_adapter(component)
    assert isinstance(adapter, StateDictAdapter)
    assert adapter.to_module("net.transformer.proj.bias") == "inner.bias"
    assert isinstance(adapter, Renaming)
    assert adapter.fields == (None if source == "adapter = Renaming()" else {"heads": 2})


def test_without_one() -> None:
    spec = default_manager().resolve("mm_core.tasks", "diffusion")
    assert find_adapter(ComponentConfig("task", "diffusion", spec)) is None


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("adapter = {}", WeightsError, "dict has no to_module, to_folder, config_to_folder, config_problems"),
        ("class Half:\n    to_module = to_folder = str\nadapter = Half()", WeightsError,
         "Half has no config_to_folder, config_problems"),
        ("def adapter(fields):\n    return None", WeightsError, "NoneType has no to_module"),
        ("def adapter():\n    return Renaming()", WeightsError, "cannot be made from the section's fields: TypeError"),
        ("def adapter(fields):\n    return fields['absent']", WeightsError, "KeyError: 'absent'"),
        ("import absent_module", BrokenPluginError, "absent_module"),
    ],
    ids=["dict", "half", "nothing", "signature", "failure", "broken"],
)  # fmt: skip
def test_what_may_not(
    plugin: Callable[..., ComponentConfig], source: str, error: type[Exception], said: str
) -> None:
    component = plugin(FROM_HERE + source)
    with pytest.raises(error) as caught:
        find_adapter(component)
    assert said in str(caught.value)
    assert "predictor/net" in str(caught.value)
    assert "acme-net 1.0" in str(caught.value)


def test_looking_for_one_imports_no_torch() -> None:
    code = "import sys\nfrom mm_core.weights import StateDictAdapter, find_adapter\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_another_manager_may_be_asked(plugin: Callable[..., ComponentConfig], tmp_path: Path) -> None:
    component = plugin(FROM_HERE + "adapter = Renaming()")
    assert find_adapter(component, manager=PluginManager([str(tmp_path / "nowhere")])) is None


# -- folders


@pytest.mark.parametrize("adapter", [None, Renaming()], ids=["plain", "renaming"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [10**9, 60], ids=["one-file", "several"])
def test_a_saved_folder_comes_back(tmp_path: Path, adapter: Any, tied: bool, limit: int) -> None:
    source, target = Net(tied=tied), Net(tied=tied)
    target.mean.zero_()
    folder = save_hf_folder(source, tmp_path / "a" / "w", adapter, {"b": 1, "a": 2}, max_file_bytes=limit)
    assert folder == tmp_path / "a" / "w"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (len(files) > 1) == (limit < 100) == bool(list(folder.glob("*.index.json")))
    stored = {key for name in files for key in load_file(folder / name)}
    assert all(key.startswith("net.") for key in stored) == (adapter is not None)
    assert len(stored) == len(source.state_dict()) - tied
    assert json.loads((folder / "config.json").read_text()) == {"a": 2, "b": 1}
    assert not list(folder.parent.glob(".tmp-*"))
    load_hf_folder(target, folder, adapter)
    assert same(source, target)


def test_a_folder_is_as_the_upstream_libraries_write_it(tmp_path: Path) -> None:
    """diffusers reads it, its index and its config.json."""
    from diffusers import AutoencoderTiny

    sizes: dict[str, Any] = {
        "encoder_block_out_channels": [8], "decoder_block_out_channels": [8], "num_encoder_blocks": [1],
        "num_decoder_blocks": [1], "latent_channels": 4,
    }  # fmt: skip
    source = AutoencoderTiny(**sizes)
    config = {"_class_name": "AutoencoderTiny", **sizes}
    folder = save_hf_folder(source, tmp_path / "w", config=config, max_file_bytes=4000)
    assert list(folder.glob("*.index.json"))
    again, info = AutoencoderTiny.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not info["missing_keys"]
    assert same(source, again)


def test_a_folder_is_not_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folder = save_hf_folder(Net(), tmp_path / "w")
    before = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match="exists already and is not overwritten"):
        save_hf_folder(Net(), folder)
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    save_hf_folder(Net(), tmp_path / "empty")
    with pytest.raises(WeightsError, match=r"config\.json cannot be written"):
        save_hf_folder(Net(), tmp_path / "x", config={"a": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        save_hf_folder(Net(), tmp_path / "file" / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "w"]


class Merging(Renaming):
    def to_module(self, key: str) -> str:
        return "head.weight"

    def to_folder(self, key: str) -> str:
        return "w"


class Lost(Renaming):
    """Not the inverse: what it writes it cannot read."""

    def to_folder(self, key: str) -> str:
        return "other." + key


class Nameless(Renaming):
    def to_module(self, key: str) -> Any:
        return None


class Failing(Renaming):
    def to_module(self, key: str) -> str:
        raise KeyError(key)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (Merging(), "Merging.to_module gives 'embed.weight' and 'head.weight' one name, 'head.weight'"),
        (Nameless(), "Nameless.to_module('embed.weight') returned None; it must return the name of a tensor"),
        (Failing(), "Failing.to_module('embed.weight') failed: KeyError: 'embed.weight'"),
    ],
)
def test_an_adapter_that_cannot_be_used_for_reading(tmp_path: Path, adapter: Any, said: str) -> None:
    folder = save_hf_folder(Net(), tmp_path / "w")
    with pytest.raises(WeightsError) as caught:
        load_hf_folder(Net(), folder, adapter)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (Merging(), "Merging.to_folder gives 'scale' and 'mean' one name, 'w'"),
        (Lost(), "to_folder('scale') is 'other.scale', but to_module of that is 'other.scale'"),
    ],
)
def test_an_adapter_that_cannot_be_used_for_writing(tmp_path: Path, adapter: Any, said: str) -> None:
    with pytest.raises(WeightsError) as caught:
        save_hf_folder(Net(), tmp_path / "w", adapter)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_that_the_module_does_not_have_are_told_with_those_of_the_folder(tmp_path: Path) -> None:
    state = {Renaming().to_folder(key): value for key, value in Net().state_dict().items()}
    state["net.transformer.projj.weight"] = state.pop("net.transformer.proj.weight")
    (tmp_path / "w").mkdir()
    save_file(state, tmp_path / "w" / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_hf_folder(Net(), tmp_path / "w", Renaming())
    message = str(caught.value)
    assert "missing: inner.weight" in message
    assert "unexpected: innerj.weight (closest missing: inner.weight)" in message
    assert (
        "renamed: net.transformer.projj.weight of the folder is innerj.weight to the weights adapter"
        in message
    )
    assert "net.transformer.proj.bias" not in message


# -- where predictors are loaded


def test_a_predictors_folder_is_read_with_its_adapter(
    plugin: Callable[..., ComponentConfig], tmp_path: Path
) -> None:
    component = plugin(FROM_HERE + "adapter = Renaming")
    source, target = Net(), Net()
    adapter = find_adapter(component)
    assert adapter is not None
    config = adapter.config_to_folder(component.fields)
    folder = save_hf_folder(source, tmp_path / "w", adapter, config)
    load_predictor_folder(target, folder, component)
    assert same(source, target)
    with pytest.raises(UserError, match=r"unexpected: net\.embed\.weight"):
        load_predictor_folder(Net(), folder)
    other = save_hf_folder(source, tmp_path / "other", adapter, {**config, "num_heads": 3})
    with pytest.raises(UserError) as caught:
        load_predictor_folder(target, other, component)
    assert str(caught.value) == (
        f"low_noise_predictor: the section does not describe the network in {str(other)!r}: "
        "num_heads is 3 there and 2 here"
    )


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config_beside_the_weights(
    plugin: Callable[..., ComponentConfig], tmp_path: Path, text: str
) -> None:
    component = plugin(FROM_HERE + "adapter = Renaming")
    folder = save_hf_folder(Net(), tmp_path / "w", Renaming())
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_predictor_folder(Net(), folder, component)
