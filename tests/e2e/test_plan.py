"""`mm plan` as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mm_core.planning.devices import DEVICES, find_device
from mm_core.planning.roofline import PUBLISHED
from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, run_mm
from tests.e2e.pages import blocks, titled

pytestmark = pytest.mark.timeout(240)

FILES = (
    "--mm-model",
    TINY / "model.json",
    "--mm-data",
    TINY / "data.json",
    "--fsdp2-config-path",
    TINY / "fsdp2.yaml",
)
A14B = (
    "--mm-model", "examples/wan2.2/A14B/t2v/pretrain_model_high.json",
    "--mm-data", "examples/wan2.2/A14B/t2v/data.json",
    "--fsdp2-config-path", "examples/wan2.2/A14B/fsdp2.yaml",
)  # fmt: skip


def plan(*arguments: str | Path, **limits: Any) -> dict[str, Any]:
    done = run_mm("plan", *arguments, "--format", "json", **limits)
    assert done.code == 0, done.err
    data: dict[str, Any] = json.loads(done.out)
    return data


def test_tiny(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    data = plan(*FILES, "--world-size", "2", "--device", "cpu", "--png", picture)
    check = run_mm("check", *FILES, "--nproc-per-node", "2", "--build", "--format", "json")
    (sharding,) = json.loads(check.out)["sharding"]
    assert data["parameters"] == sum(unit["numel"] for unit in sharding["units"])
    assert data["peak_bytes"] > data["memory"]["steady"]["total"] > 0
    stored = sharding["memory"]
    assert data["memory"]["steady"]["optimizer"] == pytest.approx(stored["optimizer"], rel=0.01)
    assert data["fits"] is True
    assert data["sizes"]["dp"] == 2
    assert {one["kind"] for one in data["collectives"]} == {"all-gather", "reduce-scatter"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_text() -> None:
    done = run_mm("plan", *FILES, "--world-size", "2", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.startswith("2 ranks of ")
    for title in (
        "memory of the fullest rank",
        "one unit of each kind",
        "collectives of a rank",
        "roofline at",
    ):
        assert f"\n{title}" in done.out
    assert "It fits: the peak is" in done.out


@pytest.mark.slow
def test_more_memory_than_there_is(tmp_path: Path) -> None:
    """A device of 11 MiB: what is advised lowers the peak, and is planned like the job."""
    numbers = {
        "name": "a small device", "memory_bytes": 11 * 2**20, "bf16_flops": 1e12, "fp32_flops": 1e12,
        "memory_bandwidth": 1e11, "host_bandwidth": 1e10, "node_size": 8, "node_bandwidth": 1e10,
        "network_bandwidth": 1e9, "matmul_efficiency": 0.5, "attention_efficiency": 0.5,
    }  # fmt: skip
    device = tmp_path / "small.json"
    device.write_text(json.dumps(numbers))
    data = plan(*FILES, "--world-size", "2", "--device", device)
    assert data["fits"] is False
    changes = {one["change"]: one for one in data["advice"]}
    offload = changes["offload_to_cpu: true in the sharding file"]
    assert offload["peak_bytes"] < data["peak_bytes"]
    sharding = tmp_path / "fsdp2.yaml"
    sharding.write_text((ROOT / TINY / "fsdp2.yaml").read_text() + "\noffload_to_cpu: true\n")
    other = plan(
        *FILES[:4], "--fsdp2-config-path", sharding, "--world-size", "2", "--device", device, "--no-advice"
    )
    assert other["peak_bytes"] == offload["peak_bytes"]
    assert other["time"]["total"] == pytest.approx(offload["seconds"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*FILES, "--world-size", "2"), "--device: it is required. Write one of h100, "),
        ((*FILES, "--device", "h1000"), "--device h1000: there is no such device; did you mean h100?"),
        ((*FILES, "--device", "cpu", "--world-size", "two"), '--world-size: "two" is no number of ranks'),
        ((*FILES, "--device", "cpu", "--png", "memory.jpg"), '--png: "memory.jpg" is no PNG file'),
        ((*FILES[:2], "--device", "cpu"), "--mm-data: it is required: it says how large a sample is"),
        (
            (*FILES, "--device", "cpu", "--world-size", "3", "--global-batch-size", "4"),
            "--global-batch-size: 4 is no multiple",
        ),
        ((*FILES, "--device", "nowhere.json"), "nowhere.json"),
        ((*FILES, "--world-sise", "2"), "--world-sise: there is no such flag. Did you mean --world-size?"),
    ],
)
def test_mistakes(arguments: tuple[str | Path, ...], said: str) -> None:
    done = run_mm("plan", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_wrong_file_of_a_device(tmp_path: Path) -> None:
    device = tmp_path / "mine.yaml"
    device.write_text("name: mine\nmemory_bytes: 80 GB\nbf16_flop: 1.0\n")
    done = run_mm("plan", *FILES, "--device", device)
    assert done.code == 2
    assert f"{device}:2:15: " in done.err
    assert 'Did you mean "bf16_flops"?' in done.err


def large(arguments: tuple[str, ...], ranks: int) -> tuple[dict[str, Any], float, float]:
    """Plan in a process of its own: the plan, its seconds, and its GiB."""
    code = (
        "import resource, sys; from mm_core.cli.main import main; code = main(sys.argv[1:]); sys.stdout.flush(); "
        "sys.stderr.write(f'RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n'); raise SystemExit(code)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *arguments, "--world-size", str(ranks), "--device", "h100", "--format", "json"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=230, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kib = int(done.stderr.rsplit("RSS ", 1)[1])
    return json.loads(done.stdout), time.perf_counter() - started, kib / 2**20


@pytest.mark.slow
def test_a14b_on_64_ranks() -> None:
    data, _, gib = large(A14B, 64)
    assert data["parameters"] == 14_288_491_584
    assert gib < 8
    assert data["fits"] is True
    assert any(
        one["code"] == "missing-path" and one["level"] == "note" for one in data["findings"]
    )  # its weights


@pytest.mark.slow
def test_235b_on_128_ranks() -> None:
    folder = "examples/qwen3vl"
    files = ("--mm-model", f"{folder}/235B-A22B/model.json", "--mm-data", f"{folder}/data.json")
    data, _, gib = large((*files, "--fsdp2-config-path", f"{folder}/fsdp2.yaml"), 128)
    assert 234e9 < data["parameters"] + data["frozen_parameters"] < 238e9
    assert gib < 8


@pytest.mark.slow
def test_published_points() -> None:
    """The part of the roofline that a published run reaches is what the plan of the same work says."""
    done = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--only", "none"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=230, check=True,
    )  # fmt: skip
    reached = [int(share) / 100 for share in re.findall(r"(\d+)% \|$", done.stdout, re.MULTILINE)]
    assert reached == [pytest.approx(point.reached, abs=0.03) for point in PUBLISHED]


PAGE = ROOT / "docs/choose-a-parallelism.md"


def test_devices_of_the_page(tmp_path: Path) -> None:
    rows = dict(
        re.findall(r"^\| `(\w+)`: [^|]*\| (\d+) GiB \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {name: str(round(find_device(name).memory_bytes / 2**30)) for name in DEVICES} == rows
    mine = tmp_path / "mine.yaml"
    mine.write_text(titled(PAGE, "mine.yaml"))
    assert find_device(str(mine)).name == "my machines"


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints() -> None:
    (command,) = (line for block in blocks(PAGE) for line in block.commands)
    done = run_mm(*command.split()[1:])
    assert done.code == 0, done.err
    assert titled(PAGE, "the plan").strip() in done.out
