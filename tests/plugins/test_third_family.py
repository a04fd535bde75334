"""A whole model family that the core has never heard of: installed as a wheel, trained, removed, the core untouched."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path("examples/plugins/mmzoo-plugin-ltx/example")
PLUGIN = "mmzoo-plugin-ltx"
CORE = ("mmzoo-core", "mmzoo-registry")
pytestmark = pytest.mark.timeout(300)


def mm(environment: Any, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command from the root of the repository, where the clips are."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MM_", "PIP_"))}
    return subprocess.run(
        [environment.root / "bin" / "mm", *map(str, arguments)],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def job() -> list[str | Path]:
    return [
        "--mm-model", EXAMPLE / "model.json", "--mm-data", EXAMPLE / "data.json", "--mm-tool", EXAMPLE / "tools.json",
        "--fsdp2-config-path", EXAMPLE / "fsdp2.yaml", "--lr", "1e-3", "--lr-decay-style", "constant", "--seed", "7",
        "--num-workers", "0", "--train-iters", "2", "--global-batch-size", "2",
    ]  # fmt: skip


def train(environment: Any, run: Path, ranks: int = 1) -> list[float]:
    """Two steps of the plugin's example; the losses."""
    result = mm(
        environment, "train", *job(), "--nproc-per-node", str(ranks), "--micro-batch-size", str(2 // ranks), "--save", run
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def family(wheels: dict[str, Path], make_environment: Callable[..., Any]) -> Any:
    """The registry, the core and this plugin, and no other."""
    return make_environment(*(wheels[name] for name in (*CORE, PLUGIN)))


def installed_files(environment: Any) -> dict[str, str]:
    """Path -> hash of each file of the core and the registry, after a comparison with what pip recorded of it."""
    (site,) = environment.root.glob("lib/python*/site-packages")
    found: dict[str, str] = {}
    for name in CORE:
        (info,) = site.glob(f"{name.replace('-', '_')}-*.dist-info")
        for path, digest, _ in csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines()):
            if not digest:  # RECORD itself and what was compiled
                continue
            kind, _, expected = digest.partition("=")
            value = hashlib.new(kind, (site / path).read_bytes()).digest()
            assert base64.urlsafe_b64encode(value).rstrip(b"=").decode() == expected, path
            found[path] = expected
        package = name.replace("mmzoo-", "mm_")
        files = {p for p in (site / package).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert files == {site / path for path in found if path.startswith(f"{package}/")}
    assert len(found) > 100
    return found


def test_it_trains_and_leaves_no_trace_in_the_core(family: Any, tmp_path: Path) -> None:
    before = installed_files(family)
    listed = json.loads(mm(family, "list", "--format", "json").stdout)
    assert {entry["id"] for entry in listed if entry["distribution"] == PLUGIN} == {
        "ltx_dit", "ltx_flow_match", "ltx_video_vae", "LTXPipeline",
    }  # fmt: skip
    assert {entry["distribution"] for entry in listed} == {PLUGIN, "mmzoo-core"}
    checked = mm(family, "check", *job())
    assert (checked.returncode, checked.stdout) == (0, "nothing to say: no errors, warnings or notes\n")

    losses = train(family, tmp_path / "run")
    assert len(losses) == 2
    assert all(0.1 < loss < 10 for loss in losses)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (overwrite,) = config["overwrites"]
    assert (overwrite["path"], overwrite["new"]) == ("predictor.cross_attention_dim", 128)
    assert overwrite["by"] == f"{PLUGIN} 0.1.0"
    assert installed_files(family) == before


@pytest.mark.parametrize("package", ["mm_core", "registry/mm_registry"])
def test_no_line_of_the_core_names_it(package: str) -> None:
    files = [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 10
    for file in files:
        text = file.read_text(encoding="utf-8").lower()
        assert not any(word in text for word in ("ltx", "lightricks")), file


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_and_videos_come_out(family: Any, tmp_path: Path) -> None:
    one, two = train(family, tmp_path / "1"), train(family, tmp_path / "2", ranks=2)
    assert two == pytest.approx(one, rel=1e-5)
    made = mm(
        family, "generate", "--mm-model", EXAMPLE / "inference_model.json", "--load", tmp_path / "1",
        "--save-path", tmp_path / "out",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (video,) = (tmp_path / "out").glob("*.mp4")
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["size"] == [9, 64, 64]
    assert record["versions"][PLUGIN] == "0.1.0"


def test_removed_it_is_gone_and_the_messages_say_so(
    wheels: dict[str, Path], make_environment: Callable[..., Any], tmp_path: Path
) -> None:
    environment = make_environment(*(wheels[name] for name in (*CORE, PLUGIN)))
    assert mm(environment, "show", "ltx_dit").returncode == 0
    before = installed_files(environment)
    environment.pip("uninstall", "-y", PLUGIN)
    assert installed_files(environment) == before
    assert "ltx" not in mm(environment, "list").stdout.lower()
    assert mm(environment, "doctor").returncode == 0
    asked = mm(environment, "check", *job())
    assert asked.returncode == 2
    for role, id in (
        ("predictor", "ltx_dit"),
        ("diffusion model", "ltx_flow_match"),
        ("ae", "ltx_video_vae"),
    ):
        assert f"no installed distribution offers the {role} '{id}'" in asked.stdout
    refused = mm(environment, "train", *job(), "--micro-batch-size", "2", "--save", tmp_path / "run")
    assert refused.returncode == 2
    assert "model.json" in refused.stderr
    assert not (tmp_path / "run").exists()

    # The core's own table of providers cannot know it; any installed distribution can.
    (site,) = environment.root.glob("lib/python*/site-packages")
    info = site / "zoo_catalogue-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: zoo-catalogue\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        "[mm_core.providers]\npredictor/ltx_dit = mmzoo_plugin_ltx\n", encoding="utf-8"
    )
    assert "pip install mmzoo-plugin-ltx" in mm(environment, "check", *job()).stdout
    environment.install(wheels[PLUGIN])
    assert mm(environment, "check", *job()).returncode == 0
