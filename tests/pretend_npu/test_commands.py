"""The commands on the pretend NPU, as a user types them; and where torch_npu is installed and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import TINY, Job, losses, run_mm

# The device is compiled first, which takes a minute.
pytestmark = pytest.mark.slow

REASON = "libhccl.so: cannot open shared object file: No such file or directory"


def train(
    npu: dict[str, str], run: Path, *flags: str | Path, ranks: int = 2, **variables: str
) -> list[float]:
    """Train the tiny example with a global batch of 4, and return the losses."""
    result = run_mm(
        "train", *Job().flags("--save", run, "--micro-batch-size", "2", "--global-batch-size", "4", *flags),
        *(("--nproc-per-node", str(ranks)) if ranks > 1 else ()), timeout=500, **{**npu, "MM_DEVICE": "npu", **variables},
    )  # fmt: skip
    assert result.code == 0, result.err[-4000:]
    return losses(run)


def test_training_on_two_npus_is_training_on_the_cpu(npu: dict[str, str], tmp_path: Path) -> None:
    """With the checkpoint that it leaves, and on through it; `MindSpeed-MM`'s spelling of the backend included."""
    cpu = train({}, tmp_path / "cpu", "--train-iters", "4", ranks=1, MM_DEVICE="cpu")
    run = tmp_path / "npu"
    first = train(npu, run, "--train-iters", "2", "--save-interval", "2", PRETEND_NPU_REPORT=str(tmp_path))
    assert first == pytest.approx(cpu[:2], rel=1e-5)
    report = json.loads((tmp_path / "rank-1.json").read_text())
    assert report["asked"]["reduce_scatter_tensor SUM"] > 0
    assert report["peaks"][1] > 1_000_000

    both = train(npu, run, "--train-iters", "4", "--load", run, "--distributed-backend", "npu:hccl,cpu:gloo")
    assert both == pytest.approx(cpu, rel=1e-5)


@pytest.mark.slow
def test_generation(npu: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(npu, run, "--train-iters", "1", ranks=1)
    done = run_mm(
        "generate", "--mm-model", TINY / "inference_model.json", "--load", run, "--save-path", tmp_path / "out",
        "--num-inference-steps", "2", timeout=500, **npu, MM_DEVICE="npu",
    )  # fmt: skip
    assert done.code == 0, done.err[-4000:]
    assert list((tmp_path / "out").glob("*.mp4"))


def test_more_ranks_than_npus_are_refused_before_one_starts(npu: dict[str, str], tmp_path: Path) -> None:
    for ranks, variables, said in (
        ("3", {}, "3 processes on this machine, but it shows 2 npu devices: two"),
        (
            "2",
            {"ASCEND_RT_VISIBLE_DEVICES": "1"},
            "1 npu device (ASCEND_RT_VISIBLE_DEVICES=1 hides the others)",
        ),
    ):
        flags = Job().flags("--train-iters", "1", "--save", tmp_path / "run", "--nproc-per-node", ranks)
        done = run_mm("train", *flags, **npu, MM_DEVICE="npu", **variables)
        assert done.code == 2
        assert said in done.err
        assert "rank 1" not in done.err, "no rank was started"
        assert not (tmp_path / "run").exists()


def test_doctor_tells_the_npus(npu: dict[str, str]) -> None:
    done = run_mm("doctor", **npu)
    assert "devices: 2 npu (torch-npu 2.13.0)" in done.out
    rows = {
        row["type"]: row for row in json.loads(run_mm("doctor", "--format", "json", **npu).out)["devices"]
    }
    assert rows["npu"]["usable"] == 2
    hidden = run_mm("doctor", **npu, ASCEND_RT_VISIBLE_DEVICES="")
    assert "warning: torch-npu is installed, and finds no NPU" in hidden.out


# -- where CANN is missing


def broken(npu: dict[str, str], kind: str, **variables: str) -> dict[str, Any]:
    return {**npu, "PRETEND_NPU_BROKEN": kind, **variables}


@pytest.mark.parametrize("autoload", ["0", "1"])
@pytest.mark.parametrize("kind", [
    "ImportError", pytest.param("OSError", marks=pytest.mark.slow), pytest.param("RuntimeError", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_broken_torch_npu_is_one_sentence(
    npu: dict[str, str], tmp_path: Path, kind: str, autoload: str
) -> None:
    """Whatever the device: torch imports it at once, diffusers and transformers where they find it."""
    variables = broken(npu, kind, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    for device in ("npu", "cpu"):
        flags = Job().flags("--train-iters", "1", "--save", tmp_path / "run")
        done = run_mm("train", *flags, **variables, MM_DEVICE=device)
        assert done.code == 2, done.err[-3000:]
        assert (
            f"error: torch_npu is installed, but cannot be imported ({kind}: {REASON}): install the CANN"
            in done.err
        )
        assert "pip uninstall torch-npu" in done.err
        assert "Traceback" not in done.err
        assert not (tmp_path / "run").exists()


def test_doctor_tells_a_broken_torch_npu_and_how_to_mend_it(npu: dict[str, str]) -> None:
    done = run_mm("doctor", "--format", "json", **broken(npu, "OSError"))
    assert done.code == 2
    (found,) = [each for each in json.loads(done.out)["problems"] if each["code"] == "broken-torch-npu"]
    assert found["message"] == f"torch_npu is installed, but cannot be imported (OSError: {REASON})"
    assert found["mend"].startswith("Install the CANN that its version asks for and source its set_env.sh")
    assert "nothing that needs torch works" in found["why"]


def test_commands_without_torch_work_beside_a_broken_torch_npu(npu: dict[str, str]) -> None:
    done = run_mm("check", *Job().flags()[1:2], **broken(npu, "ImportError"))
    assert done.code == 0, done.err
