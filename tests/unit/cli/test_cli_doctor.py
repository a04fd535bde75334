"""What `mm doctor` says about environment variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli.main import main
from mm_core.config.environment import VARIABLES


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)

    def run(form: str = "json", **variables: str) -> tuple[int, Any]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code = main(["doctor", "--format", form])
        out = capsys.readouterr().out
        return code, json.loads(out) if form == "json" else out

    return run


def test_variables_that_are_set_are_told_with_reader_and_meaning(doctor: Any) -> None:
    _, page = doctor(NON_MEGATRON="true", HCCL_EXEC_TIMEOUT="1800", OMP_NUM_THREADS="1")
    rows = {row["variable"]: row for row in page["environment"]}
    assert list(rows) == ["OMP_NUM_THREADS", "HCCL_EXEC_TIMEOUT", "NON_MEGATRON"]
    assert rows["OMP_NUM_THREADS"]["effective"] is True
    assert rows["HCCL_EXEC_TIMEOUT"]["read_by"] == "torch_npu (HCCL)"
    assert (rows["NON_MEGATRON"]["read_by"], rows["NON_MEGATRON"]["effective"]) == ("", False)
    assert all(row["meaning"] and not row["problem"] for row in rows.values())


def test_wrong_values_are_problems(doctor: Any) -> None:
    code, page = doctor(HCCL_CONNECT_TIMEOUT="10", MULTI_STREAM_MEMORY_REUSE="2")
    assert code == 0, "a library's variable stops nothing by itself"
    found = [problem for problem in page["problems"] if problem["code"] == "environment-variable"]
    assert [(problem["level"], problem["mend"]) for problem in found] == [
        ("warning", "Unset it for the default, 120")
    ]
    (row,) = [row for row in page["environment"] if row["variable"] == "MULTI_STREAM_MEMORY_REUSE"]
    assert row["problem"].startswith("2 is no documented value")

    code, page = doctor(MM_DEVICE="tpu")
    assert code == 2
    assert page["problems"][0]["message"] == 'MM_DEVICE: "tpu" must be cpu, cuda or npu', (
        "the worst comes first"
    )


def test_secrets_are_hidden(doctor: Any) -> None:
    _, text = doctor("table", HF_TOKEN="hf_verysecret", HF_ENDPOINT="https://me:pass@hub.example")
    assert "HF_TOKEN" in text
    assert "verysecret" not in text
    assert "me:pass" not in text


def test_an_escape_code_in_a_value_is_not_obeyed(doctor: Any) -> None:
    _, text = doctor("table", HF_HOME="/home/\x1b[31mred")
    assert "\x1b" not in text
    assert "red" in text


def test_nothing_set_is_said(doctor: Any) -> None:
    _, text = doctor("table")
    assert "environment variables: none is set that matters here" in text


def test_optional_packages_are_told(doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, page = doctor()
    rows = {row["name"]: row for row in page["optional"]}
    assert list(rows) == ["megatron-core", "megatron.training", "mindspeed"]
    assert all(row["meaning"] for row in rows.values())
    assert rows["mindspeed"]["version"] is None
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed" / "__init__.py").write_text("raise SystemExit('the doctor imports nothing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, text = doctor("table")
    line = next(line for line in text.splitlines() if line.startswith("optional: "))
    assert line.partition("; ")[0] == "optional: mindspeed source checkout"
