"""What a user lives through: build the wheels, install them, look, train, uninstall, ask again. And two wheels that
claim one id.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = Path("examples/tiny/wan22-t2v")
pytestmark = pytest.mark.timeout(240)

#: The three installed for this tour; wan22 brings the predictor, haar the autoencoder.
TOUR = ("mmzoo-registry", "mmzoo-core", "mmzoo-plugin-wan22", "mmzoo-plugin-haar")


def clean_environ(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MM_", "PIP_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def mm(environment: Any, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command from the repository's root, where the tiny job's files are."""
    return subprocess.run(
        [environment.root / "bin" / "mm", *map(str, arguments)],
        cwd=ROOT, env=clean_environ(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_install_list_train_uninstall(
    wheels: dict[str, Path], make_environment: Callable[..., Any], tmp_path: Path
) -> None:
    environment = make_environment(*(wheels[name] for name in TOUR))
    entries = {entry["id"]: entry for entry in json.loads(mm(environment, "list", "--format", "json").stdout)}
    haar = entries["haar_video"]
    assert (haar["distribution"], haar["version"], haar["status"]) == (
        "mmzoo-plugin-haar",
        "0.1.0",
        "available",
    )
    assert haar["origin"] == f"wheel {wheels['mmzoo-plugin-haar']}"
    assert Path(haar["path"]).is_relative_to(environment.root)

    run = tmp_path / "run"
    flags = [
        "--mm-model", TINY / "model.json", "--mm-data", TINY / "data.json", "--mm-tool", TINY / "tools.json",
        "--fsdp2-config-path", TINY / "fsdp2.yaml", "--lr", "1e-3", "--num-workers", "0", "--micro-batch-size", "1",
        "--global-batch-size", "1", "--save", run,
    ]  # fmt: skip
    trained = mm(environment, "train", *flags, "--train-iters", "2")
    assert trained.returncode == 0, trained.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["loss"] < 100 for record in records)

    environment.pip("uninstall", "-y", "mmzoo-plugin-haar")
    back = "pip install ./examples/plugins/mmzoo-plugin-haar"
    entries = {entry["id"]: entry for entry in json.loads(mm(environment, "list", "--format", "json").stdout)}
    assert "haar_video" not in entries
    assert entries["wandit"]["status"] == "available"
    for arguments in (
        ("show", "haar_video"),
        ("check", TINY / "model.json"),
        ("train", *flags, "--train-iters", "3"),
    ):
        asked = mm(environment, *arguments)
        assert asked.returncode == 2, arguments
        assert back in asked.stdout + asked.stderr, arguments
    assert back in mm(environment, "plugin", "explain", "haar_video").stdout
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2  # refused before the run was touched


RIVAL = """\
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "mmzoo-plugin-{name}"
version = "{version}"
dependencies = ["mmzoo-core>=0.1,<0.2", "mmzoo-registry>=0.1,<0.2"]

[project.entry-points."mm_core.ae_models"]
contested = "mm_plugin_{name}:Part"

[tool.setuptools]
packages = ["mm_plugin_{name}"]
"""
ASK = """\
import sys
from mm_registry import AmbiguousIdError, default_manager
try:
    default_manager().resolve("mm_core.ae_models", "contested")
except AmbiguousIdError as error:
    sys.stdout.write(str(error))
"""


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders, each with one of two wheels that claim `contested` installed by pip."""
    sources = tmp_path_factory.mktemp("rivals")
    for name, version in (("ash", "1.0"), ("birch", "0.9")):
        package = sources / name / f"mm_plugin_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("class Part: pass\n", encoding="utf-8")
        (sources / name / "pyproject.toml").write_text(
            RIVAL.format(name=name, version=version), encoding="utf-8"
        )

    def pip(*arguments: str | Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "pip", *map(str, arguments)],
            env=clean_environ(), capture_output=True, text=True, timeout=200, check=True,
        )  # fmt: skip

    quiet = ("-q", "--no-deps", "--no-index")
    pip("wheel", *quiet, "--no-build-isolation", "-w", sources / "wheels", sources / "ash", sources / "birch")
    folders = []
    for wheel in sorted((sources / "wheels").glob("*.whl")):
        folders.append(sources / "sites" / wheel.name.split("-")[0])
        pip("install", *quiet, "--target", folders[-1], wheel)
    return folders


def test_a_contested_id_is_one_error_whatever_the_order(rivals: list[Path]) -> None:
    assert len(rivals) == 2
    said = set()
    count = 0
    for order, seed in itertools.product(itertools.permutations(rivals), range(10)):
        environ = clean_environ(PYTHONPATH=os.pathsep.join(map(str, order)), PYTHONHASHSEED=str(seed))
        asked = subprocess.run(
            [sys.executable, "-c", ASK],
            cwd=rivals[0], env=environ, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        said.add(asked.stdout)
        count += 1
    assert count == 20
    (message,) = said
    assert "mmzoo-plugin-ash 1.0 and mmzoo-plugin-birch 0.9" in message
    assert '"mmzoo-plugin-ash/contested" or "mmzoo-plugin-birch/contested"' in message
    assert "prefer" in message


def test_what_the_message_says_settles_it(rivals: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mmzoo.toml").write_text(
        '[plugins.prefer]\n"ae/contested" = "mmzoo-plugin-birch"\n', encoding="utf-8"
    )
    environ = clean_environ(PYTHONPATH=os.pathsep.join(map(str, rivals)))

    def ask(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "mm_core", *arguments, "--format", "json"],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    statuses = {entry["distribution"]: entry["status"] for entry in ask("show", "contested")}
    assert statuses == {"mmzoo-plugin-ash": "shadowed", "mmzoo-plugin-birch": "available"}
    (explained,) = ask("plugin", "explain", "contested")
    assert explained["chosen"]["distribution"] == "mmzoo-plugin-birch"
    (tmp_path / "mmzoo.toml").unlink()
    assert {entry["status"] for entry in ask("show", "contested")} == {"ambiguous"}
