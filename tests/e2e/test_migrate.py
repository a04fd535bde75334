"""`mm migrate` as people use it: a launch script becomes a job file, which trains as the script's flags do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, TINY, losses, run_mm

pytestmark = pytest.mark.timeout(300)
SCRIPT = """\
#!/bin/bash
export TASK_QUEUE_ENABLE=2
STEPS=2
MBS=2
GBS=$((MBS * 1))
GPT_ARGS="
    --micro-batch-size $MBS \\
    --global-batch-size $GBS \\
    --lr 1e-3 \\
    --lr-decay-style constant \\
    --train-iters $STEPS \\
    --num-workers 0 \\
    --seed 7 \\
    --fsdp2-config-path tiny/fsdp2.yaml
"
MM_ARGS="
    --mm-model tiny/model.json \\
    --mm-data tiny/data.json \\
    --mm-tool tiny/tools.json
"
torchrun --nproc_per_node 1 pretrain_sora.py $GPT_ARGS $MM_ARGS --save ${1:-runs} 2>&1 | tee "log_$(date +%s)"
"""
FLAGS = [
    "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--lr-decay-style", "constant",
    "--train-iters", "2", "--num-workers", "0", "--seed", "7", "--fsdp2-config-path", "tiny/fsdp2.yaml",
    "--mm-model", "tiny/model.json", "--mm-data", "tiny/data.json", "--mm-tool", "tiny/tools.json", "--save", "original",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the tiny job, seen from there as people's jobs are, and a launch script."""
    (tmp_path / "examples").mkdir()
    shutil.copytree(ROOT / TINY, tmp_path / TINY, copy_function=shutil.copyfile)
    os.symlink(TINY, tmp_path / "tiny")
    (tmp_path / "pretrain.sh").write_text(SCRIPT)
    return tmp_path


@pytest.mark.slow
def test_a_migrated_script_trains_as_its_flags_do(project: Path) -> None:
    (project / "jobs").mkdir()
    done = run_mm("migrate", "pretrain.sh", "1=run", "--output", "jobs/job.yaml", cwd=project)
    assert done.code == 0, done.out + done.err
    assert "4 files became sections" in done.out
    assert "-pretrain.sh:21" in done.out
    assert "The check of jobs/job.yaml says:" in done.out
    data = yaml.safe_load((project / "jobs" / "job.yaml").read_text())
    assert data["gpt_args"]["save"] == "../run"
    assert [name for name in os.listdir(project / "jobs") if name.startswith(".")] == []

    original = run_mm("train", *FLAGS, cwd=project)
    assert original.code == 0, original.err
    migrated = run_mm("train", "jobs/job.yaml", cwd=project)
    assert migrated.code == 0, migrated.err
    assert len(losses(project / "run")) == 2
    assert losses(project / "run") == losses(project / "original")


def test_dry_run_writes_nothing(project: Path) -> None:
    before = sorted(os.listdir(project))
    done = run_mm("migrate", "pretrain.sh", "--dry-run", cwd=project)
    assert done.code == 0
    assert done.out.startswith("# Written by `mm migrate` from pretrain.sh, ")
    assert "The check of job.yaml (not written) says:" in done.out
    assert sorted(os.listdir(project)) == before


def test_what_exists_is_not_overwritten(project: Path) -> None:
    (project / "job.yaml").write_text("mine")
    done = run_mm("migrate", "pretrain.sh", cwd=project)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: job.yaml: it exists, and is not overwritten. "
        "Name another with --output, or see what it would be with --dry-run\n"
    )
    assert (project / "job.yaml").read_text() == "mine"


def test_errors_of_the_new_file_end_in_2_and_the_file_stays(project: Path) -> None:
    done = run_mm("migrate", "pretrain.sh", "--no-such-flag", cwd=project)
    assert done.code == 2
    assert "job.yaml is written; mend what the check calls an error" in done.out
    assert yaml.safe_load((project / "job.yaml").read_text())["gpt_args"]["no_such_flag"] is True


def test_an_unreadable_script_writes_nothing(project: Path) -> None:
    (project / "pretrain.sh").write_text(SCRIPT.replace("${1:-runs}", "$(rm -rf tiny)"))
    done = run_mm("migrate", "pretrain.sh", cwd=project)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: pretrain.sh:21: --save is $(rm -rf tiny), which cannot be known: ")
    assert done.err.count("\n") == 1
    assert (project / "tiny" / "model.json").exists()
    assert not (project / "job.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--output", "job.json"], '--output: "job.json" is no name of a YAML file. End it in .yaml'),
        (["--output"], "--output: a value is missing"),
        (
            ["--dry-run"],
            "mm migrate: nothing to migrate: name a launch script, files or flags. See mm migrate --help",
        ),
        (["pretrain.sh", "--output", "no/job.yaml"], "no/job.yaml: there is no folder no"),
    ],
)
def test_mistakes_on_the_command_line(project: Path, arguments: list[str], wanted: str) -> None:
    done = run_mm("migrate", *arguments, cwd=project)
    assert (done.code, done.out, done.err) == (2, "", f"error: {wanted}\n")
    assert run_mm("migrate", "--help").out.startswith("usage: mm migrate SOURCE... ")
