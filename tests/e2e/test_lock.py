"""`mm plugin lock`, `mm plugin verify` and `mm train --locked`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Job, Result, run_mm
from tests.e2e.test_commands import HEAVY, imported

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """The lock of what is installed here, in a folder without selection files."""
    result = run_mm("plugin", "lock", "--output", tmp_path / "a.lock")
    assert result.code == 0, result.err
    return tmp_path / "a.lock"


def train_locked(lock: Path | None, run: Path, **variables: str) -> Result:
    flags = ["--lock-file", lock] if lock else ["--locked"]
    return run_mm("train", *Job().flags("--train-iters", "1", "--save", run, *flags), **variables)


def test_lock_and_verify_agree_and_import_nothing(lock: Path) -> None:
    content = json.loads(lock.read_text())
    entries = {entry["name"]: entry for entry in content["distributions"]}
    assert {"mmzoo-core", "mmzoo-registry", "mmzoo-plugin-wan22", "mmzoo-plugin-haar"} <= set(entries)
    assert list(entries) == sorted(entries)
    assert "wandit" in entries["mmzoo-plugin-wan22"]["ids"]["mm_core.predictor_models"]
    before = lock.read_bytes()
    again = run_mm("plugin", "lock", "--output", lock)
    assert "is up to date" in again.out
    assert lock.read_bytes() == before
    result = run_mm("plugin", "verify", "--lock-file", lock, "--files")
    assert result.code == 0, result.out
    assert f"{len(entries)} distributions as locked" in result.out
    for command in (("lock", "--output", str(lock)), ("verify", "--lock-file", str(lock), "--files")):
        names = imported("-m", "mm_core", "plugin", *command)
        assert not names & {*HEAVY, "pydantic", "mm_plugin_wan22", "mm_plugin_haar"}


def test_drift_is_told_in_words_and_as_json(lock: Path) -> None:
    content = json.loads(lock.read_text())
    for entry in content["distributions"]:
        if entry["name"] == "mmzoo-plugin-wan22":
            entry["version"], entry["editable"], entry["origin"] = "0.0.1", False, "wheel"
    content["distributions"].append({**content["distributions"][0], "name": "mmzoo-plugin-gone"})
    lock.write_text(json.dumps(content))
    result = run_mm("plugin", "verify", "--lock-file", lock)
    assert result.code == 2
    assert "the lock says 0.0.1; run: pip install 'mmzoo-plugin-wan22==0.0.1'" in result.out
    assert "mmzoo-plugin-gone" in result.out
    result = run_mm("plugin", "verify", "--lock-file", lock, "--format", "json")
    assert result.code == 2
    found = json.loads(result.out)
    assert found["ok"] is False
    assert {(d["kind"], d["distribution"]) for d in found["drift"]} == {
        ("version", "mmzoo-plugin-wan22"), ("missing", "mmzoo-plugin-gone"),
    }  # fmt: skip
    changed = json.loads(run_mm("plugin", "lock", "--output", lock, "--format", "json").out)
    assert changed["written"] is changed["replaced"] is True
    assert {d["kind"] for d in changed["changes"]} == {"version", "missing"}
    assert run_mm("plugin", "verify", "--lock-file", lock).code == 0


def test_train_refuses_drift_before_anything_is_built(lock: Path, tmp_path: Path) -> None:
    result = train_locked(lock, tmp_path / "run", MM_PLUGINS="mmzoo-plugin-wan22")
    assert result.code == 2
    assert f"--locked: the installed plugins are not those of {lock}" in result.err
    assert "mmzoo-plugin-haar is left out by MM_PLUGINS" in result.err
    assert f"mm plugin lock --output {lock}" in result.err
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_missing_or_garbled(lock: Path, tmp_path: Path) -> None:
    result = train_locked(None, tmp_path / "run")
    assert result.code == 2
    assert "mmzoo.lock: there is no such lock file; write it with `mm plugin lock" in result.err
    lock.write_text("{}")
    result = train_locked(lock, tmp_path / "run")
    assert result.code == 2
    assert f"{lock} is no lock file" in result.err
    assert run_mm("plugin", "verify", "--lock-file", lock).code == 2
    replaced = run_mm("plugin", "lock", "--output", lock)
    assert replaced.code == 0
    assert "was not usable and is replaced" in replaced.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_goes_on_where_nothing_differs(lock: Path, tmp_path: Path) -> None:
    from mm_registry import default_manager

    result = run_mm(
        "train", *Job().flags("--train-iters", "1", "--save", tmp_path / "run", "--locked", "--lock-file", lock),
        "--nproc-per-node", "2",
    )  # fmt: skip
    assert result.code == 0, result.err
    state = json.loads((tmp_path / "run" / "checkpoints" / "iter_0000001" / "state.json").read_text())[
        "state"
    ]
    assert state["config"]["fingerprint"] == json.loads(lock.read_text())["fingerprint"]
    assert state["config"]["fingerprint"] == default_manager().fingerprint()
    assert {"mmzoo-core", "mmzoo-plugin-wan22", "mmzoo-plugin-haar"} <= set(state["plugins"])


@pytest.mark.parametrize("command", ["lock", "verify"])
def test_help_and_stray_words(command: str) -> None:
    result = run_mm("plugin", command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: mm plugin {command}")
    result = run_mm("plugin", command, "everything")
    assert result.code == 2
    assert 'unexpected argument "everything"' in result.err
