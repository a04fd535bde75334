"""`mm check` and `mm list` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)

_PROBE = """
import sys
from mm_core.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "diffusers", "numpy"} & set(sys.modules)
plugins = [name for name in sys.modules if name.startswith("mm_plugin")]
print(f"heavy={sorted(heavy)} plugins={plugins}", file=sys.stderr)
sys.exit(code)
"""


def mm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RANK": "", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "MM_PLUGINS"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_of_a_job_prints_everything_and_exits_2_on_errors(files: Any) -> None:
    job = ["check", "--mm-model", "model.json", "--mm-data", "data.json", "--mm-tool", "tools.json"]
    job += ["--fsdp2-config-path", "fsdp2.yaml"]
    good = mm(*job, cwd=files.folder)
    assert good.returncode == 0, good.stdout
    assert good.stdout.splitlines()[-1].endswith("notes")
    assert "error" not in good.stdout
    assert "heavy=[]" in good.stderr
    files.model["predictor"]["num_layer"] = 40
    files.data["dataset_param"]["preprocess_parameters"]["num_frames"] = "49"
    files.write()
    bad = mm(*job, cwd=files.folder)
    assert bad.returncode == 2
    lines = bad.stdout.splitlines()
    assert (
        files.find('^"num_layer":')
        + ' error: unknown key "num_layer" in predictor (wandit). Did you mean "num_layers"?'
        in lines
    )
    assert (
        files.find('"num_frames": ^"49"')
        + (' error: "num_frames" is "49", expected a whole number. Remove the quotes: 49')
        in lines
    )
    assert lines[-1].startswith("2 errors, ")


def test_check_as_json(files: Any) -> None:
    files.tools["profile"]["enabel"] = True
    files.write()
    result = mm("check", "tools.json", "--format", "json", cwd=files.folder)
    assert result.returncode == 2
    findings = json.loads(result.stdout)["findings"]
    assert [finding for finding in findings if finding["level"] == "error"] == [
        {
            "level": "error",
            "code": "unknown-key",
            "message": 'unknown key "enabel" in profile of tools.json',
            "file": "tools.json",
            "line": int(files.find('^"enabel"').split(":")[1]),
            "column": 9,
            "path": "profile.enabel",
            "suggestion": 'Did you mean "enable"?',
        }
    ]


def test_check_leaves_out_what_is_not_asked_for(files: Any) -> None:
    files.tools["profile"]["enabel"] = True
    files.write()
    whole = mm("check", "model.json", "tools.json", cwd=files.folder).stdout.splitlines()
    assert any(" note: " in line for line in whole)
    for level, left in (
        ("note", ("note", "warning", "error")),
        ("warning", ("warning", "error")),
        ("error", ("error",)),
    ):
        result = mm("check", "model.json", "tools.json", "--level", level, cwd=files.folder)
        shown = [line for line in whole[:-1] if any(f" {kind}: " in line for kind in left)]
        assert (result.returncode, result.stdout.splitlines()) == (2, [*shown, whole[-1]])
    result = mm("check", "tools.json", "--level", "warn", cwd=files.folder)
    said = 'error: --level: "warn" is no level. Write note or warning or error'
    assert (result.returncode, result.stderr.splitlines()[0]) == (2, said)


def test_check_tells_single_files_by_their_keys(files: Any) -> None:
    (files.folder / "odd.yaml").write_text("colour: red\n")
    for name in ("model.json", "data.json", "tools.json", "inference.json", "fsdp2.yaml"):
        result = mm("check", name, cwd=files.folder)
        assert (result.returncode, " error: " in result.stdout) == (0, False), result.stdout
    result = mm("check", "odd.yaml", "mising.json", cwd=files.folder)
    assert result.returncode == 2
    assert result.stdout.splitlines() == [
        "odd.yaml:1:1 error: none of its keys is known, so it cannot be told what it configures. "
        "Known are: model file, "
        "inference file, data file, tools file, sharding file, "
        "transformers model file, job file",
        "mising.json error: no such file. Nothing in " + str(files.folder) + " has a similar name",
        "2 errors",
    ]


def test_check_without_its_weights_is_no_error_for_a_single_file(files: Any) -> None:
    files.model["ae"]["from_pretrained"] = "elsewhere/vae"
    files.write()
    result = mm("check", "model.json", cwd=files.folder)
    assert result.returncode == 0
    assert 'note: ae.from_pretrained is "elsewhere/vae": there is no such folder' in result.stdout


def test_bad_command_lines(tmp_path: Path) -> None:
    result = mm("check", "--mm-modl", "x.json", cwd=tmp_path)
    assert (result.returncode, result.stdout.splitlines()[0]) == (
        2,
        "--mm-modl error: there is no such flag. Did you mean --mm-model?",
    )
    result = mm("check", "x.json", "--format", "xml", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        2,
        'error: --format: "xml" is no format. Write text or json',
    )
    result = mm("list", "--group", "predictr", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        2,
        'error: --group: there is no group "predictr". Did you mean "predictor"?',
    )


def test_list_imports_neither_torch_nor_a_plugin(tmp_path: Path) -> None:
    result = mm("list", cwd=tmp_path)
    assert result.returncode == 0
    assert "heavy=[] plugins=[]" in result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["ID", "GROUP", "DISTRIBUTION", "VERSION", "ORIGIN", "STATUS"]
    assert any(
        row.split()[:3] == ["wandit", "mm_core.predictor_models", "mmzoo-plugin-wan22"] for row in rows
    )
    as_json = json.loads(mm("list", "--group", "predictor", "--format", "json", cwd=tmp_path).stdout)
    (wandit,) = [entry for entry in as_json if entry["id"] == "wandit"]
    assert (wandit["distribution"], wandit["status"]) == ("mmzoo-plugin-wan22", "available")
    assert {entry["group"] for entry in as_json} == {"mm_core.predictor_models"}


def test_a_check_of_nothing_does_not_pass(tmp_path: Path) -> None:
    result = mm("check", "--build", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        2,
        "error: mm check: no file is named, so there is nothing to check. Name the files, or see mm check --help",
    )
    result = mm("check", "--format", "json", cwd=tmp_path)
    assert (result.returncode, json.loads(result.stdout)["findings"][0]["code"]) == (2, "missing-argument")


def test_json_of_words_that_are_no_text_and_of_what_a_terminal_obeys(tmp_path: Path) -> None:
    for command in ("check", "explain"):
        result = mm(command, "--format", "json", "\udcff\x9b\u202e.json", cwd=tmp_path)
        assert result.returncode == 2
        assert json.loads(result.stdout)["findings"][0]["file"] == "\udcff\x9b\u202e.json"
        assert result.stdout.isascii()


def test_explain_of_an_unknown_field_as_json(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('{"profile": {"enable": false}}')
    result = mm("explain", "nonsense", "tools.json", "--format", "json", cwd=tmp_path)
    assert (result.returncode, len(json.loads(result.stdout)["findings"])) == (2, 1)
