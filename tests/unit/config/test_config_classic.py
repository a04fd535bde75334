"""MindSpeed-MM's way to the configuration from code: `MMConfig`, `ConfigReader`, `merge_mm_args`, `get_args`."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_core
from mm_core.config import (
    ConfigError,
    ConfigReader,
    MMConfig,
    get_args,
    load_training_job,
    merge_mm_args,
    parse_train_flags,
)
from mm_core.config.args import clear_args, set_args
from mm_registry.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
MODEL = """\
{
  "$schema": "model.schema.json",
  "task": "t2v",  // a comment
  "predictor": {"model_id": "wandit", "dtype": "bf16", "patch_size": [1, 2, 2]},
  "text_encoder": [
    {"model_id": "UMT5", "dtype": "float32"},
    {"model_id": "CLIP", "sub": {"dtype": "half"}},
  ],
}
"""
SECTIONS = {
    "task": "t2v",
    "predictor": {"model_id": "wandit", "dtype": "bf16", "patch_size": [1, 2, 2]},
    "text_encoder": [
        {"model_id": "UMT5", "dtype": "float32"},
        {"model_id": "CLIP", "sub": {"dtype": "half"}},
    ],
}
Write = Callable[[str, str], str]


@pytest.fixture
def model(write: Write) -> ConfigReader:
    return MMConfig({"model": write("model.json", MODEL)}).model


@pytest.fixture(autouse=True)
def no_job() -> Iterator[None]:
    yield
    clear_args()


# -- ConfigReader


def test_keys_are_attributes_at_any_depth(model: ConfigReader) -> None:
    assert model.task == "t2v"
    assert model.predictor.patch_size == [1, 2, 2]
    assert [encoder.model_id for encoder in model.text_encoder] == ["UMT5", "CLIP"]
    assert list(model) == model.keys() == ["task", "predictor", "text_encoder"]
    assert len(model) == 3
    assert "task" in model
    assert "$schema" not in model
    assert "tasks" not in model
    assert model.get("task", "x") == model["task"] == "t2v"
    assert model.get("tasks", "x") == "x"
    assert model.get("tasks") is None
    assert not hasattr(model, "tasks")
    assert dict(model.items())["predictor"] is model.predictor
    assert {**model.predictor}["dtype"] is torch.bfloat16
    assert "predictor" in dir(model)


def test_to_dict_is_a_plain_copy(model: ConfigReader) -> None:
    plain = model.to_dict()
    assert plain == SECTIONS
    assert type(plain["predictor"]) is type(plain["text_encoder"][0]) is dict
    plain["predictor"]["patch_size"].append(3)
    plain["text_encoder"][0]["model_id"] = "T5"
    assert model == SECTIONS
    source = copy.deepcopy(SECTIONS)
    reader = ConfigReader(source)
    reader.predictor.patch_size.append(3)
    reader.predictor.model_id = "other"
    assert source == SECTIONS


def test_dtype_is_torchs(model: ConfigReader) -> None:
    assert model.predictor.dtype is torch.bfloat16
    assert model.text_encoder[0].dtype is torch.float32
    assert model.text_encoder[1].sub.dtype is torch.float16
    assert model.predictor.get("dtype", None) is torch.bfloat16
    for name, dtype in {
        "int32": torch.int32, "float64": torch.float64, "float16": torch.float16, "fp32": torch.float32,
        "fp16": torch.float16, "bfloat16": torch.bfloat16, "torch.bfloat16": torch.bfloat16,
    }.items():  # fmt: skip
        assert ConfigReader({"dtype": name}).dtype is dtype
    assert ConfigReader({"dtype": None, "param_dtype": "bf16"}).to_dict() == {
        "dtype": None,
        "param_dtype": "bf16",
    }
    assert ConfigReader({"dtype": None}).dtype is None
    assert ConfigReader({"param_dtype": "bf16"}).param_dtype == "bf16"


@pytest.mark.parametrize("name", ["bf61", "nn", "Tensor", ""])
def test_a_wrong_dtype_is_told_with_its_place(write: Write, name: str) -> None:
    path = write("model.json", json.dumps({"ae": {"dtype": name}}, indent=1))
    with pytest.raises(ConfigError, match=rf'model\.json:2:8 ae\.dtype: "{name}" is no number format'):
        _ = MMConfig({"model": path}).model.ae.dtype


def test_a_missing_key_names_the_file_and_the_nearest(model: ConfigReader) -> None:
    with pytest.raises(AttributeError) as raised:
        _ = model.predictor.model_di
    assert str(raised.value) == (
        'model.json:4:16 predictor: there is no key "model_di". Did you mean "model_id"?'
    )
    with pytest.raises(
        AttributeError, match=r'model\.json:7:33 text_encoder\[1\]\.sub: there is no key "xyz"'
    ):
        _ = model.text_encoder[1].sub.xyz
    with pytest.raises(KeyError, match="Did you mean"):
        _ = model["taks"]
    with pytest.raises(AttributeError, match="this configuration: there is no key"):
        _ = ConfigReader({}).task


def test_attributes_can_be_set(model: ConfigReader) -> None:
    model.predictor.model_id = "other"
    model.extra = {"dtype": "fp16", "items": [{"a": 1}]}
    assert model.to_dict()["predictor"]["model_id"] == "other"
    assert model.extra.dtype is torch.float16
    assert model.extra["items"][0].a == 1
    model.predictor.dtype = torch.float64
    assert model.predictor.dtype is torch.float64
    del model.extra
    assert "extra" not in model
    with pytest.raises(AttributeError, match="there is no key"):
        del model.extra
    with pytest.raises(AttributeError, match=r'reader\["get"\] = '):
        model.get = 1
    model["get"] = 1
    assert model["get"] == 1
    assert model.get("task") == "t2v"
    assert model.predictor.update_unuse(model_id="wandit", nothing=2) == {"nothing": 2}
    assert model.predictor.model_id == "wandit"
    assert "nothing" not in model.predictor


def test_copies_are_equal_and_apart(model: ConfigReader) -> None:
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied == model
        assert repr(copied) == repr(model)
        copied.predictor.model_id = "other"
        assert copied != model
        assert model.predictor.model_id == "wandit"
        with pytest.raises(AttributeError, match=r"model\.json:4:16 predictor"):
            _ = copied.predictor.nothing
    assert model == SECTIONS
    assert model != {**SECTIONS, "task": "i2v"}
    assert model != 3


def test_repr_shows_the_place_and_the_values(model: ConfigReader) -> None:
    assert repr(model.predictor) == (
        "<ConfigReader model.json:4:16 predictor\n"
        "{'model_id': 'wandit', 'dtype': 'bf16', 'patch_size': [1, 2, 2]}>"
    )
    assert repr(ConfigReader({"a": 1})) == "<ConfigReader\n{'a': 1}>"
    assert "\x1b" not in repr(ConfigReader({"a": "\x1b[31m"}))


# -- MMConfig and merge_mm_args


def test_every_file_that_cannot_be_read_is_told(write: Write) -> None:
    model = write("model.json", '{\n  "task": "t2v"\n  "predictor": {}\n}\n')
    with pytest.raises(ConfigError) as raised:
        MMConfig({"model": model, "data": "data.json", "tools": "tools.json"})
    text = str(raised.value)
    assert "model.json:2:16: " in text  # where the comma belongs
    assert "data.json: no such file" in text
    assert 'there is no file "tools". Did you mean "tool"?' in text


def test_files_that_are_not_given_are_not_there(write: Write) -> None:
    config = MMConfig({"model": write("model.json", MODEL), "data": "", "tool": None})
    assert not hasattr(config, "data")
    with pytest.raises(AttributeError, match="the job has no tool file; --mm-tool FILE names one"):
        _ = config.tool
    with pytest.raises(AttributeError, match='Did you mean "model"'):
        _ = config.modle
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert config != MMConfig({})
    assert repr(config).startswith("model: <ConfigReader model.json")


def test_the_sections_of_a_combined_yaml_are_read(write: Write) -> None:
    path = write("job.yaml", "gpt_args: {lr: 1.0e-5}\nmodel:\n  model_id: qwen3_vl\ndata: {a: [{b: 1}]}\n")
    config = MMConfig({"model": path, "data": path})
    assert config.model.model_id == "qwen3_vl"
    assert config.data.a[0].b == 1
    with pytest.raises(AttributeError, match=r"job\.yaml:3:3 model: there is no key"):
        _ = config.model.gpt_args
    assert MMConfig({"tool": write("tools.yaml", "profile: {enable: false}\n")}).tool.profile.enable is False


def test_merge_mm_args_reads_once(write: Write) -> None:
    args = argparse.Namespace(mm_model=write("model.json", MODEL), mm_data="", mm_tool="")
    merge_mm_args(args)
    first = args.mm
    assert first.model.task == "t2v"
    merge_mm_args(args)
    assert args.mm is first
    with pytest.raises(UserError, match="none of mm_model, mm_data, mm_tool"):
        merge_mm_args(argparse.Namespace(model="x"))


# -- get_args


def test_without_a_job_get_args_says_how_to_get_them() -> None:
    with pytest.raises(
        UserError, match=r"no job runs in this process; `mm train`.*MMConfig.*parse_train_flags"
    ):
        get_args()


def test_a_checked_job_is_what_get_args_returns(files: Any) -> None:
    flags = parse_train_flags([*_words(files), "--micro-batch-size", "3"])
    job = load_training_job(flags)
    set_args(job)
    args = mm_core.get_args()
    assert args is get_args()
    assert (args.micro_batch_size, args.global_batch_size, args.mm_model) == (3, 3, "model.json")
    assert args.mm.model.predictor.num_heads == 40
    assert args.mm.data.dataset_param.dataset_type == "t2v"
    assert args.mm.tool.profile.enable is False
    with pytest.raises(AttributeError, match='no argument "micro_batch": did you mean "micro_batch_size"'):
        _ = args.micro_batch
    args.mm.model.predictor.num_heads = 1
    assert job.documents["model"].data["predictor"]["num_heads"] == 40
    set_args(load_training_job(flags))
    assert get_args().mm.model.predictor.num_heads == 40
    clear_args()
    with pytest.raises(UserError):
        get_args()


def _words(files: Any) -> list[str]:
    files.write()
    given = files.flags().given
    return [word for name, flag in given.items() for word in (flag, str(getattr(files.flags(), name)))]


def test_importing_imports_neither_torch_nor_pydantic(write: Write) -> None:
    write("model.json", MODEL)
    code = (
        "import sys, mm_core\n"
        "heavy = lambda: sorted({'torch', 'pydantic', 'mm_core.config'} & set(sys.modules))\n"
        "assert 'get_args' in dir(mm_core) and not heavy(), heavy()\n"
        "mm_core.get_args\n"
        "from mm_core.config import MMConfig\n"
        "reader = MMConfig({'model': 'model.json'}).model\n"
        "assert heavy() == ['mm_core.config'], heavy()\n"
        "repr(reader), reader.to_dict(), reader == reader, reader.text_encoder[0].model_id\n"
        "assert heavy() == ['mm_core.config'], heavy()\n"
        "reader.predictor.dtype\n"
        "assert 'torch' in heavy()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


MEGATRON = {
    "__init__.py": "from megatron.training.global_vars import get_args\n",
    "global_vars.py": """
_GLOBAL_ARGS = None

def get_args():
    assert _GLOBAL_ARGS is not None, "args is not initialized."
    return _GLOBAL_ARGS

def set_args(args):
    global _GLOBAL_ARGS
    _GLOBAL_ARGS = args
""",
}


def _stand_in(folder: Path) -> None:
    """The two modules of a Megatron-LM checkout that count here, with its own names and behaviour."""
    package = folder / "megatron" / "training"
    package.mkdir(parents=True)
    for name, text in MEGATRON.items():
        (package / name).write_text(text)


def _python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_megatrons_own_arguments_get_the_files(write: Write, tmp_path: Path) -> None:
    write("model.json", MODEL)
    _stand_in(tmp_path / "checkout")
    code = """
import argparse
from mm_core import get_args
from mm_registry.errors import UserError
try:
    get_args()
except UserError:
    pass
else:
    raise SystemExit("no error without arguments")
from megatron.training import get_args as megatron_args
from megatron.training.global_vars import set_args
args = argparse.Namespace(mm_model="model.json", mm_data="", mm_tool="")
set_args(args)
assert get_args() is megatron_args() is args
assert args.mm.model.predictor.model_id == "wandit"
"""
    done = _python(code, tmp_path / "checkout")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["broken", "taken"])
def test_a_megatron_that_cannot_take_the_job_is_told_and_left_alone(
    files: Any, tmp_path: Path, case: str
) -> None:
    words = _words(files)
    _stand_in(tmp_path / "checkout")
    if case == "broken":
        (tmp_path / "checkout/megatron/training/__init__.py").write_text("raise RuntimeError('no device')\n")
    before = "from megatron.training import global_vars\nglobal_vars.set_args(1)" if case == "taken" else ""
    code = f"""
from mm_core.config import load_training_job, parse_train_flags, get_args
from mm_core.config.args import set_args, clear_args
{before}
set_args(load_training_job(parse_train_flags({words!r})))
assert get_args().mm.model.task == "t2v"
clear_args()
{"assert global_vars.get_args() == 1" if case == "taken" else ""}
"""
    done = _python(code, tmp_path / "checkout")
    assert done.returncode == 0, done.stderr
    assert ("RuntimeError: no device" if case == "broken" else "has arguments already") in done.stderr


TELLER = """
import json, os, pathlib
from megatron.training import get_args as megatron_args
from mm_core import get_args
from mm_core.observe.callback import BaseCallback
from mm_registry import ConfigPatch, hookimpl

class Teller(BaseCallback):
    def on_train_start(self, context):
        args = get_args()
        told = {
            "shift": args.mm.model.diffusion.shift,
            "batch": [args.micro_batch_size, args.global_batch_size],
            "data": args.mm.data.dataset_param.dataset_type,
            "tool": args.mm.tool.to_dict() == json.loads(open(args.mm_tool).read()),
            "same": megatron_args() is args,
        }
        place = pathlib.Path(__file__).with_name("rank" + os.environ.get("RANK", "0") + ".json")
        place.write_text(json.dumps(told))
"""
HOOKS = """
from mm_registry import ConfigPatch, hookimpl

@hookimpl
def overwrite_config(role, model_id, config):
    if role == "diffusion":
        return ConfigPatch({"shift": 7.5}, reason="a test", required=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_rank_of_a_real_run_has_them_after_the_hooks(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "teller-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: teller\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mm_core.callbacks]\nteller = teller:Teller\n[mm_core.hooks]\nhooks = teller_hooks\n"
    )
    (site / "teller.py").write_text(TELLER)
    (site / "teller_hooks.py").write_text(HOOKS)
    _stand_in(site)
    tiny = Path("examples/tiny/wan22-t2v")
    text = (ROOT / tiny / "model.json").read_text()
    (tmp_path / "model.json").write_text(
        text.replace('"task": "t2v",', '"task": "t2v", "callbacks": ["teller"],', 1)
    )
    (tmp_path / "tools.json").write_text('{"profile": {"enable": false}}')
    done = subprocess.run(
        [sys.executable, "-m", "mm_core", "train", "--mm-model", tmp_path / "model.json", "--mm-data", tiny / "data.json",
         "--mm-tool", tmp_path / "tools.json", "--fsdp2-config-path", tiny / "fsdp2.yaml", "--lr", "1e-3", "--num-workers",
         "0", "--train-iters", "1", "--nproc-per-node", "2"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "MM_DEVICE": "cpu"},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((site / f"rank{rank}.json").read_text()) == {
            "shift": 7.5, "batch": [1, 2], "data": "t2v", "tool": True, "same": True,
        }  # fmt: skip
