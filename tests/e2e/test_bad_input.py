"""A mistake ends in one clear message that says where, what and how to mend it, exit code 2, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import TINY, Job, Result, edited, run_mm

pytestmark = pytest.mark.timeout(120)

FLAGS = ["--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "2"]


def train_with(tmp_path: Path, job: Job, *more: str | Path) -> Result:
    run = tmp_path / "run"
    result = run_mm("train", *job.flags(*FLAGS), "--save", run, *more)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert not run.exists(), "a refused job must leave nothing behind"
    return result


def model(tmp_path: Path, edit: Callable[[str], str]) -> Job:
    return Job(model=edited(TINY / "model.json", tmp_path / "model.json", edit))


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_misspelt_model_id(tmp_path: Path) -> None:
    job = model(tmp_path, lambda text: text.replace('"wandit"', '"wandti"'))
    err = train_with(tmp_path, job).err
    assert f"model.json:{line_of(job.model, 'wandti')}:" in err
    assert "wandti" in err
    assert "wandit" in err
    assert "mmzoo-plugin-wan22" in err


def test_an_id_of_another_role(tmp_path: Path) -> None:
    err = train_with(tmp_path, model(tmp_path, lambda text: text.replace('"haar_video"', '"wandit"'))).err
    assert "predictor" in err


def test_misspelt_key(tmp_path: Path) -> None:
    job = model(tmp_path, lambda text: text.replace('"hidden_size"', '"hiden_size"'))
    err = train_with(tmp_path, job).err
    assert f"model.json:{line_of(job.model, 'hiden_size')}:" in err
    assert "hidden_size" in err


def test_wrong_type(tmp_path: Path) -> None:
    job = model(tmp_path, lambda text: text.replace('"num_layers": ', '"num_layers": "4", "num_heads_": '))
    err = train_with(tmp_path, job).err
    assert f"model.json:{line_of(job.model, 'num_layers')}:" in err
    assert "num_heads_" in err, "all findings are shown at once"


def test_missing_comma(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / TINY / "model.json").read_text()
    line = next(n for n, content in enumerate(text.splitlines(), 1) if content.rstrip().endswith(","))
    content = text.splitlines()[line - 1].rstrip()
    job = model(tmp_path, lambda text: text.replace(content, content[:-1], 1))
    err = train_with(tmp_path, job).err
    assert f"model.json:{line}:{len(content)}" in err
    assert "comma" in err


def test_missing_file(tmp_path: Path) -> None:
    err = train_with(tmp_path, Job(model=TINY / "modle.json")).err
    assert "modle.json" in err
    assert "model.json" in err.replace("modle.json", "")


def test_pattern_that_matches_no_module(tmp_path: Path) -> None:
    fsdp2 = edited(TINY / "fsdp2.yaml", tmp_path / "fsdp2.yaml", lambda text: text.replace("blocks", "bloks"))
    err = train_with(tmp_path, Job(fsdp2=fsdp2)).err
    assert "predictor.bloks.{*}" in err
    assert "blocks" in err


def test_unknown_key_in_the_yaml(tmp_path: Path) -> None:
    fsdp2 = edited(
        TINY / "fsdp2.yaml", tmp_path / "fsdp2.yaml", lambda text: text + "reshard_after_forwrd: true\n"
    )
    err = train_with(tmp_path, Job(fsdp2=fsdp2)).err
    assert f"fsdp2.yaml:{len(fsdp2.read_text().splitlines())}:1" in err
    assert "reshard_after_forward" in err


def test_unknown_flag(tmp_path: Path) -> None:
    err = train_with(tmp_path, Job(), "--micro-batch-sise", "2").err
    assert "--micro-batch-sise" in err
    assert "--micro-batch-size" in err


def test_flag_of_the_wrong_type(tmp_path: Path) -> None:
    assert "--lr" in train_with(tmp_path, Job(), "--lr", "fast").err


def test_missing_load_folder(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    err = train_with(tmp_path, Job(), "--load", tmp_path / "runs" / "frist").err
    assert "frist" in err
    assert "first" in err.replace("frist", "")


def test_load_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in train_with(tmp_path, Job(), "--load", tmp_path / "empty").err


def test_no_readable_video(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"")
    (clips / "b.mp4").write_text("this is no video")
    (tmp_path / "annotation.json").write_text(
        '[{"path": "a.mp4", "cap": "x"}, {"path": "b.mp4", "cap": "y"}]'
    )
    (tmp_path / "data.txt").write_text(f"{clips},{tmp_path / 'annotation.json'}\n")
    data = edited(
        TINY / "data.json", tmp_path / "data.json",
        lambda text: text.replace(str(TINY / "data.txt"), str(tmp_path / "data.txt")),
    )  # fmt: skip
    result = run_mm("train", *Job(data=data).flags(*FLAGS))
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert "a.mp4" in result.err


def test_batch_sizes_that_do_not_divide(tmp_path: Path) -> None:
    err = train_with(tmp_path, Job(), "--global-batch-size", "3").err
    assert "3" in err
    assert "micro" in err


def test_something_that_does_not_work_yet_is_an_error_when_enabled(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('{"memory_profile": {"enable": true}}')
    assert "tools.json:1:" in train_with(tmp_path, Job(tools=tools)).err
    assert "tensor" in train_with(tmp_path, Job(), "--tensor-model-parallel-size", "2").err


def test_generate_needs_weights(tmp_path: Path) -> None:
    result = run_mm(
        "generate",
        "--mm-model",
        TINY / "inference_model.json",
        "--prompt",
        "a tram",
        "--save-path",
        tmp_path / "out",
    )
    assert result.code == 2, result.err
    assert "--load" in result.err
    assert not (tmp_path / "out").exists()


def test_generate_with_a_mistyped_prompt_file(tmp_path: Path) -> None:
    result = run_mm(
        "generate",
        "--mm-model",
        TINY / "inference_model.json",
        "--prompt",
        TINY / "promts.txt",
        "--load",
        tmp_path,
    )
    assert result.code == 2, result.err
    assert "promts.txt" in result.err


def test_a_command_that_does_not_exist() -> None:
    result = run_mm("trian")
    assert result.code == 2
    assert "mm train" in result.err


def test_a_broken_plugin_is_one_clear_message(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "mmzoo_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmzoo-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mm_core.ae_models]\nbroken_ae = mmzoo_broken:Broken\n")
    (site / "mmzoo_broken.py").write_text("import a_package_that_is_not_installed\n")
    listed = run_mm("list", PYTHONPATH=str(site))
    assert listed.code == 0, listed.err
    assert "broken_ae" in listed.out
    job = model(tmp_path, lambda text: text.replace('"haar_video"', '"broken_ae", "init": "random"'))
    result = run_mm("train", *job.flags(*FLAGS), PYTHONPATH=str(site))
    assert result.code == 2, result.err
    assert "mmzoo-broken" in result.err
