"""Transformers model files: the keys of every such model, the family's, and the folder's config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import ConfigError, check_file, load_training_job

CORPUS = Path(__file__).resolve().parents[2] / "corpus"
FOLDER = "./ckpt/hf_path/Qwen3-VL-8B-Instruct"
# What a folder of the 8B model says of itself.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "vision_config": {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304},
}

Write = Callable[[str, str], str]


def model(**text_decoder: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CORPUS / "qwen3vl/model_8B.json").read_text())
    data["text_decoder"].update(text_decoder)
    return data


def check(write: Write, data: dict[str, Any]) -> list[str]:
    """Errors and warnings of a file."""
    found = check_file(write("model.json", json.dumps(data, indent=1)))
    return [str(f) for f in found if f.level != "note"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / FOLDER
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_correct_file_fits_its_folder(write: Write, folder: Path) -> None:
    assert check(write, model(num_query_groups=8, ffn_hidden_size=12288)) == []
    (said,) = (f for f in check_file("model.json") if f.path == "init_from_hf_path")
    assert (said.level, said.code) == ("note", "no-weights")
    (folder / "model.safetensors").touch()
    assert not any(f.path == "init_from_hf_path" for f in check_file("model.json"))


def test_the_folder_says_which_model_it_is_of(write: Write, folder: Path) -> None:
    data = model()
    del data["model_id"]
    assert check(write, data) == []
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen9_vl"}))
    (said,) = check(write, data)
    assert 'needs "model_id", and ' in said
    assert "names none that is installed (Qwen3VLForConditionalGeneration, qwen9_vl)" in said
    assert 'Add "model_id", such as "qwen3_vl"' in said


def test_numbers_that_differ_from_the_folder_are_told(write: Write, folder: Path) -> None:
    # As MindSpeed-MM's file of the 32B model does, which names the width of the feed-forward layers.
    (said,) = check(write, model(hidden_size=12288))
    assert said == (
        "model.json:21:18 warning: text_decoder.hidden_size is 12288, but ckpt/hf_path/Qwen3-VL-8B-Instruct/config.json has "
        "text_config.hidden_size 4096, which is what is built. Write 4096 (12288 is its intermediate_size)"
    )
    data = model(num_layers=35)
    data["image_encoder"]["vision_encoder"]["num_layers"] = 26
    said_of_both = check(write, data)
    assert ["vision_config.depth 27" in said for said in said_of_both] == [True, False]
    assert "text_config.num_hidden_layers 36" in said_of_both[1]


def test_the_published_file_of_the_32b_model_is_told_what_it_says_wrong(write: Write, folder: Path) -> None:
    """`hidden_size: 25600` is the width inside its feed-forward layers; nothing is built from it, there as here."""
    real = {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    }
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "text_config": {**CONFIG["text_config"], **real}})
    )
    (said,) = check(write, model(hidden_size=25600, num_layers=64, num_attention_heads=64))
    assert "text_decoder.hidden_size is 25600, but " in said
    assert said.endswith("Write 5120 (25600 is its intermediate_size)")


@pytest.mark.parametrize(
    ("fused", "way"), [(True, "eager"), (True, "batched_mm"), (False, "eager"), (True, "grouped_mm")]
)
def test_two_keys_ask_for_one_way_of_experts(fused: bool, way: str, write: Write) -> None:
    data: dict[str, Any] = json.loads((CORPUS / "qwen3vl/model_30B.json").read_text())
    data["text_decoder"] |= {"use_npu_fused_moe": fused, "experts_implementation": way}
    said = [text for text in check(write, data) if "experts_implementation" in text]
    if fused and way != "grouped_mm":
        assert f"is {way}, but use_npu_fused_moe insists on grouped_mm" in said[0]
    else:
        assert said == []


def test_a_folder_of_another_family_is_an_error(write: Write, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen2_5_vl"}))
    (said,) = check(write, model(hidden_size=1))
    assert said.startswith('model.json:2:14 error: "model_id" is "qwen3_vl", but ')
    assert 'of a model of type "qwen2_5_vl"' in said


def test_a_folder_without_a_readable_config_is_told(write: Write, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3_vl",}}')
    (said,) = check(write, model())
    assert "config.json:1:" in said
    (folder / "config.json").unlink()
    assert check(write, model()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d.pop("init_from_hf_path"),
            'model.json needs "init_from_hf_path". Add "init_from_hf_path"',
        ),
        (lambda d: d.pop("model_id"), 'model.json needs "model_id"'),
        (lambda d: d.update(model_id=3), '"model_id" is 3, expected a text in quotes'),
        (lambda d: d.update(model_id="qwen3_vll"), "no installed distribution offers the transformers model"),
        (lambda d: d.pop("text_decoder"), 'model.json (qwen3_vl) needs "text_decoder"'),
        (lambda d: d["text_decoder"].pop("freeze"), 'text_decoder of model.json (qwen3_vl) needs "freeze"'),
        (
            lambda d: d.update(text_decodr={}),
            'unknown key "text_decodr" in model.json. Did you mean "text_decoder"?',
        ),
        (lambda d: d.update(plugins=["nowhere"]), "nowhere"),
        (
            lambda d: d.update(callbacks=["nothing"]),
            "no installed distribution offers the callback 'nothing'",
        ),
    ],
)
def test_mistakes(write: Write, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    data = model()
    change(data)
    found = check(write, data)
    assert any(" error: " in text and said in text for text in found), found


def test_a_job_with_it_is_refused(files: Any, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(model(activation_offload=True), indent=1))
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags())
    errors = {f.path: f.code for f in caught.value.findings if f.level == "error"}
    assert errors["init_from_hf_path"] == "missing-path"
    assert "text_decoder.activation_offload" not in errors


def test_a_job_with_it(files: Any, tmp_path: Path, folder: Path) -> None:
    data = {**model(), "init_from_hf_path": str(folder)}
    (tmp_path / "model.json").write_text(json.dumps(data, indent=1))
    flags = files.flags().model_copy(update={"load": None})
    with pytest.raises(ConfigError) as caught:
        load_training_job(flags)
    assert [f.code for f in caught.value.findings if f.level == "error"] == ["no-weights"]
    data["init"] = "random"
    (tmp_path / "model.json").write_text(json.dumps(data, indent=1))
    job = load_training_job(flags)
    network, task = job.components["model"], job.components["task"]
    assert (network.role, network.model_id, network.from_pretrained) == (
        "transformers_model",
        "qwen3_vl",
        str(folder),
    )
    assert network.weights_path == ("init_from_hf_path",)
    assert task.model_id == "language"
    values = job.resolved()["values"]["model"]
    assert (values["text_decoder"]["freeze"], values["patch"]["clip_grad_async"]) == (False, True)
    assert job.resolved()["origins"]["model.text_decoder.freeze"].startswith("model.json:")
    assert dict(job.plugins)["mmzoo-plugin-qwen3vl"]


def test_no_torch_and_no_transformers_is_imported() -> None:
    code = (
        "import sys; from mm_core.cli.main import main; main(['check', sys.argv[1], sys.argv[2]])\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))"
    )
    files = [str(CORPUS / "qwen3vl" / name) for name in ("model_30B.json", "data_30B.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "[]"
