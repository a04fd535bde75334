"""`mm explain`: the final value, where it came from, and every overwrite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli.main import main
from mm_core.config import load_generation_job, parse_train_flags
from mm_core.config.explain import Explained, explain_files, explain_flags, matching

ROOT = Path(__file__).resolve().parents[3]
LTX = ROOT / "examples/plugins/mmzoo-plugin-ltx/example"
JOB = ["--mm-model", "model.json", "--mm-data", "data.json", "--mm-tool", "tools.json"]
JOB += ["--fsdp2-config-path", "fsdp2.yaml"]


def one(field: str, explained: tuple[Explained, ...]) -> Explained:
    (item,) = [item for item in explained if item.field == field]
    return item


def test_every_value_has_its_place(files: Any) -> None:
    explained = explain_flags(parse_train_flags([*JOB, "--lr", "1e-4", "--bf16"]))
    layers = one("model.predictor.num_layers", explained)
    assert (layers.value, str(layers.origin)) == (40, files.find('"num_layers": ^40'))
    width = one("model.predictor.freq_dim", explained)
    assert (width.value, str(width.origin)) == (256, "default")
    lr = one("flags.lr", explained)
    assert (lr.value, str(lr.origin)) == (1e-4, "--lr")
    assert str(one("flags.seed", explained).origin) == "default"
    assert "flags.nproc_per_node" in {item.field for item in explained}
    patch = one("model.predictor.patch_size", explained)  # one field, although it is a list
    assert (patch.value, str(patch.origin)) == ([1, 2, 2], files.find('"patch_size": ^[\n'))
    step = one("data.dataset_param.preprocess_parameters.train_pipeline.video[0].param.mode", explained)
    assert (step.value, str(step.origin)) == ("shortside", files.find('"mode": ^"shortside"'))
    assert str(one("fsdp2.reduce_dtype", explained).origin) == files.find('reduce_dtype: ^"fp32"')
    assert len({item.field for item in explained}) == len(explained)


def test_a_flag_that_fills_a_file_is_its_origin(files: Any) -> None:
    files.fsdp2 = "sharding_size: auto\n"
    files.write()
    explained = explain_flags(parse_train_flags([*JOB, "--bf16"]))
    dtype = one("fsdp2.param_dtype", explained)
    assert (dtype.value, str(dtype.origin)) == ("bf16", "--bf16")


def test_a_value_under_an_old_spelling_has_the_place_of_that(files: Any) -> None:
    explained = explain_files(["inference.json"])
    steps = one("model.diffusion.num_train_timesteps", explained)
    text = (files.folder / "inference.json").read_text()
    line = text[: text.index('"num_train_steps"')].count("\n") + 1
    assert (steps.value, steps.origin.file, steps.origin.line) == (1000, "inference.json", line)
    assert "model.diffusion.num_train_steps" not in {item.field for item in explained}


def test_what_a_hook_wrote() -> None:
    explained = explain_files([str(LTX / "model.json")])
    width = one("model.predictor.cross_attention_dim", explained)
    assert (width.value, width.origin.kind) == (128, "hook")
    (overwrite,) = width.overwrites
    assert str(overwrite).startswith("predictor.cross_attention_dim: (not set) → 128, by mmzoo-plugin-ltx ")
    assert [item.field for item in explained if item.overwrites] == [width.field]
    assert json.loads(json.dumps(width.to_dict()))["origin"]["text"] == str(width.origin)


def test_files_alone_need_no_complete_job(files: Any) -> None:
    named = {item.field.split(".")[0] for item in explain_files(["fsdp2.yaml"])}
    assert named == {"fsdp2"}
    named = {item.field.split(".")[0] for item in explain_files(["model.json", "data.json"])}
    assert named == {"model", "data"}


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("predictor.num_layers", ["model.predictor.num_layers"]),
        ("model.predictor.num_layers", ["model.predictor.num_layers"]),
        ("num_layers", ["model.predictor.num_layers"]),
        ("flags.lr", ["flags.lr"]),
        (
            "video.0.param.mode",
            ["data.dataset_param.preprocess_parameters.train_pipeline.video[0].param.mode"],
        ),
        (
            "video[0].param.mode",
            ["data.dataset_param.preprocess_parameters.train_pipeline.video[0].param.mode"],
        ),
    ],
)
def test_fields(files: Any, field: str, found: list[str]) -> None:
    explained = explain_flags(parse_train_flags(JOB))
    assert [item.field for item in matching(field, explained)] == found


def test_a_section_is_all_its_values(files: Any) -> None:
    explained = explain_files(["model.json"])
    found = matching("ae.tiling_param", explained)
    assert len(found) >= 2
    assert all(item.field.startswith("model.ae.tiling_param.") for item in found)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["explain", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table_and_json(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("num_layers", *JOB, capsys=capsys)
    assert (code, [line.split() for line in out.splitlines()]) == (
        0,
        [["FIELD", "VALUE", "ORIGIN"], ["model.predictor.num_layers", "40", files.find('"num_layers": ^40')]],
    )
    _, out, _ = run("cross_attention_dim", str(LTX / "model.json"), capsys=capsys)
    assert out.splitlines()[2].startswith(
        "    predictor.cross_attention_dim: (not set) → 128, by mmzoo-plugin-ltx"
    )
    _, out, _ = run("num_layers", *JOB, "--format", "json", capsys=capsys)
    (item,) = json.loads(out)
    assert (item["field"], item["value"], item["overwrites"]) == ("model.predictor.num_layers", 40, [])
    place = item["origin"]
    assert f"{place['file']}:{place['line']}:{place['column']}" == place["text"]


def test_a_transformers_model_has_its_familys_keys(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ROOT / "tests" / "corpus"
    model = corpus / "qwen3vl" / "model_8B.json"
    explained = explain_files([str(model), str(corpus / "qwen3vl" / "data_8B.json")])
    frozen = one("model.image_encoder.vision_encoder.freeze", explained)
    assert (frozen.value, str(frozen.origin)) == (True, f"{model}:10:23")
    loss = one("model.loss_cfg.loss_type", explained)
    assert (loss.value, str(loss.origin)) == ("default", "default")
    assert one("data.dataset_param.basic_parameters.template", explained).value == "qwen3_vl_nothink"
    combined = corpus / "qwen3vl_yaml" / "qwen3vl_full_sft_8B.yaml"
    folder = one("model.init_from_hf_path", explain_files([str(combined)]))
    assert str(folder.origin) == f"{combined}:1:21"  # where the anchor is
    code, out, _ = run("freeze", str(model), str(corpus / "wan2.2/5B/t2v/pretrain_model.json"), capsys=capsys)
    assert (code, "cannot be explained together" in out) == (2, True)


def test_mistakes(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("num_layer", *JOB, capsys=capsys)
    assert (code, out) == (2, "")
    assert 'there is no field "num_layer" in this job. Did you mean model.predictor.num_layers' in err
    code, _, err = run("predictor", capsys=capsys)
    assert (code, "no file is named" in err) == (2, True)
    code, out, _ = run("x", "model.json", "inference.json", capsys=capsys)
    assert code == 2
    assert out.startswith(
        "inference.json error: it cannot be explained together with model.json. Name files of one"
    )
    files.model["predictor"]["num_layer"] = 3
    files.write()
    code, out, _ = run("num_layers", *JOB, capsys=capsys)
    assert code == 2
    main(["check", *JOB])
    assert out == capsys.readouterr().out
    code, out, _ = run("num_layers", *JOB, "--format", "json", capsys=capsys)
    assert "unknown-key" in {finding["code"] for finding in json.loads(out)["findings"]}
    (files.folder / "odd.yaml").write_text("colour: red\n")
    code, out, _ = run("colour", "odd.yaml", capsys=capsys)
    assert (code, "none of its keys is known" in out) == (2, True)


def test_no_torch_is_imported(files: Any) -> None:
    code = (
        "import sys; from mm_core.cli.main import main; main(['explain', *sys.argv[1:]])\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *JOB], cwd=files.folder, env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr.strip() == "[]"
    assert "flags.lr" in done.stdout


def test_the_output_on_the_page_is_what_mm_explain_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(LTX)
    _, out, _ = run("cross_attention_dim", "model.json", capsys=capsys)
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert f'```text title="mm explain cross_attention_dim model.json"\n{out}```\n' in page


def test_flags_that_do_nothing_are_told_if_given(files: Any) -> None:
    assert "flags.num_layers" not in {item.field for item in explain_flags(parse_train_flags(JOB))}
    given = explain_flags(parse_train_flags([*JOB, "--num-layers", "40"]))
    assert one("flags.num_layers", given).value == 40


def test_origins_of_old_spellings(files: Any) -> None:
    loaded = load_generation_job("inference.json")
    text = (files.folder / "inference.json").read_text().split("\n")
    line = next(number for number, line in enumerate(text, 1) if "num_train_steps" in line)
    resolved = loaded.resolved()
    assert resolved["values"]["diffusion"]["num_train_timesteps"] == 1000
    origins = resolved["origins"]
    assert origins["model.diffusion.num_train_timesteps"].startswith(f"inference.json:{line}:")
    assert origins["model.diffusion.num_train_steps"] == "default"
