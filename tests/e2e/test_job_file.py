"""One file for a whole job: `mm train job.yaml`, `mm check job.yaml`, `mm explain job.yaml`, with overrides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_core.config import read_document
from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, Job, Result, losses, metrics, run_mm, train

pytestmark = pytest.mark.timeout(300)
GPT_ARGS: dict[str, Any] = {
    "lr": 1e-3,
    "lr_decay_style": "constant",
    "seed": 7,
    "num_workers": 0,
    "train_iters": 2,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "save": "run",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a whole tiny job: job.yaml, and beside it what its paths mean."""
    sections = {name: read_document(ROOT / TINY / f"{name}.json").data for name in ("model", "data", "tools")}
    data = sections["data"]["dataset_param"]
    data["basic_parameters"]["data_path"] = "data.txt"
    data["tokenizer_config"]["from_pretrained"] = "tokenizer"
    fsdp2 = read_document(ROOT / TINY / "fsdp2.yaml").data
    (tmp_path / "tokenizer").symlink_to(ROOT / TINY / "tokenizer")
    clips = ROOT / TINY
    (tmp_path / "data.txt").write_text(
        f"{clips}/clips,{clips}/bunny.json\n{clips}/clips,{clips}/tower.json\n", encoding="utf-8"
    )
    write(tmp_path, {"gpt_args": GPT_ARGS, **sections, "fsdp2": fsdp2})
    return tmp_path


def write(folder: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False)
    (folder / "job.yaml").write_text(text, encoding="utf-8")


def change(folder: Path, old: str, new: str) -> None:
    text = (folder / "job.yaml").read_text()
    assert text.count(old) == 1
    (folder / "job.yaml").write_text(text.replace(old, new))


def succeeded(result: Result) -> None:
    assert result.code == 0, result.err


@pytest.mark.slow
def test_training_is_that_of_the_classic_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    succeeded(run_mm("train", folder / "job.yaml", "--nproc-per-node", "2", cwd=elsewhere))
    succeeded(train(Job(), elsewhere / "classic", "--nproc-per-node", "2", steps=2, batch=(1, 4)))
    assert losses(folder / "run") == losses(elsewhere / "classic")
    origins = json.loads((folder / "run" / "config.json").read_text())["origins"]
    lines = (folder / "job.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip() == "hidden_size: 128")
    assert origins["model.predictor.hidden_size"] == f"{folder}/job.yaml:{line}:18"
    assert origins["flags.seed"] == f"{folder}/job.yaml:4:9"
    assert origins["flags.nproc_per_node"] == "--nproc-per-node"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_overrides_reach_every_rank(folder: Path, ranks: int) -> None:
    flags = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = ["model.predictor.num_layers=2", "gpt_args.train_iters=3", "fsdp2.sharding_size=1", *flags]
    succeeded(run_mm("train", *words[:1], "job.yaml", *words[1:], cwd=folder))
    assert [record["step"] for record in metrics(folder / "run")] == [1, 2, 3]
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["values"]["model"]["predictor"]["num_layers"] == 2
    assert config["origins"]["model.predictor.num_layers"] == "command line: model.predictor.num_layers=2"
    assert config["origins"]["flags.train_iters"] == "command line: gpt_args.train_iters=3"
    log = (folder / "run" / "logs" / f"rank-0000{ranks - 1}.log").read_text()
    assert "error" not in log.lower()


@pytest.mark.slow
def test_torchrun_takes_a_job_file(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "mm_core", "train", "job.yaml", "model.predictor.num_layers=1"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(folder / "run")) == 2


@pytest.mark.slow
def test_a_run_goes_on_from_the_same_job_file(folder: Path) -> None:
    succeeded(run_mm("train", "job.yaml", cwd=folder))
    succeeded(run_mm("train", "job.yaml", "--load", "run", "flags.train_iters=3", cwd=folder))
    assert [record["step"] for record in metrics(folder / "run")] == [1, 2, 3]


def test_classic_files_with_overrides(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeded(train(Job(), run, "model.predictor.num_layers=1", steps=1))
    config = json.loads((run / "config.json").read_text())
    assert config["values"]["model"]["predictor"]["num_layers"] == 1
    assert config["values"]["flags"]["mm_model"] == str(Job().model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.predictor.num_layer=2"],
         'error: command line: model.predictor.num_layer=2: unknown key "num_layer" in predictor (wandit). Did you mean '
         '"num_layers"?\n'),
        (["modl.x=2"], 'error: command line: modl.x=2: there is no section "modl". Did you mean "model"?\n'),
        (["model.task.x=2"],
         'error: command line: model.task.x=2: model.task is "t2v", no object, so nothing can be set in it\n'),
        (["gpt_args.lrr=2"], 'error: command line: gpt_args.lrr=2: there is no flag "lrr". Did you mean "lr"?\n'),
        (["--mm-model", "model.json"],
         "error: --mm-model: the model section is given twice: it is written at job.yaml:11:3 too. Keep one of them\n"),
        (["job.yaml"], "error: job.yaml: a second job file: job.yaml is given already. Keep one of them\n"),
        (["--lrr", "2"], "error: --lrr: there is no such flag. Did you mean --lr?\n"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence(folder: Path, words: list[str], message: str) -> None:
    (folder / "model.json").write_text((ROOT / TINY / "model.json").read_text())
    result = run_mm("train", "job.yaml", *words, cwd=folder)
    assert (result.code, result.err) == (2, message)
    assert not (folder / "run").exists()


def test_mistakes_of_the_file_are_told_at_once(folder: Path) -> None:
    change(folder, "  seed: 7\n", "  sed: 7\n  lr_decay_stile: x\n")
    change(folder, "    hidden_size: 128\n", "    hidden_sise: 128\n")
    change(folder, "\ntools:\n", "\nTOOLS:\n")
    for command in (
        ["train", "job.yaml"],
        ["check", "job.yaml"],
        ["check", "job.yaml", "--lr", "1"],
        ["explain", "job.yaml"],
    ):
        result = run_mm(*command, cwd=folder)
        assert result.code == 2
        text = result.out + result.err
        for place, message in (
            ("4:3", 'there is no flag "sed". Did you mean "seed"?'),
            ("5:3", 'there is no flag "lr_decay_stile". Did you mean "lr_decay_style"?'),
            ("hidden_sise", 'unknown key "hidden_sise" in predictor (wandit). Did you mean "hidden_size"?'),
            ("TOOLS", 'a name in capitals holds one plain value, for aliases. Did you mean "tools"?'),
        ):
            assert place in text, (command, text)
            assert message in text, (command, text)


def test_check_tells_a_file_by_itself_from_a_job(folder: Path) -> None:
    (folder / "data.txt").unlink()
    alone = run_mm("check", "job.yaml", cwd=folder)
    assert (alone.code, "note: dataset_param.basic_parameters.data_path" in alone.out) == (0, True), alone.out
    as_job = run_mm("check", "job.yaml", "flags.seed=1", cwd=folder)
    assert (as_job.code, "error: dataset_param.basic_parameters.data_path" in as_job.out) == (2, True), (
        as_job.out
    )
    found = json.loads(
        run_mm("check", "job.yaml", "model.predictor.num_layer=1", "--format", "json", cwd=folder).out
    )
    first = next(item for item in found["findings"] if item["code"] == "unknown-key")
    assert (first["file"], first["path"]) == (None, "command line: model.predictor.num_layer=1")


def test_explain_a_job_file(folder: Path) -> None:
    whole = run_mm("explain", "job.yaml", cwd=folder)
    succeeded(whole)
    assert "flags.micro_batch_size" in whole.out
    assert "job.yaml:7:21" in whole.out
    one = run_mm("explain", "predictor.num_layers", "job.yaml", "model.predictor.num_layers=2", cwd=folder)
    assert one.out.splitlines()[1].split() == [
        "model.predictor.num_layers", "2", "command", "line:", "model.predictor.num_layers=2"
    ]  # fmt: skip
    flag = run_mm("explain", "lr", "job.yaml", "--lr", "3", cwd=folder)
    assert flag.out.splitlines()[1].split() == ["flags.lr", "3.0", "--lr"]
