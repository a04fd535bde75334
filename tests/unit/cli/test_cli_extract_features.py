"""`mm extract-features`: what the command line may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
JOB = "examples/tiny/wan22-t2v/job.yaml"
STORED = "data.dataset_param.basic_parameters.data_storage_mode=sorafeatured"
WRONG = {
    "--outptu x": "--outptu: there is no such flag of mm extract-features; did you mean --output?",
    "--what latents --output x": "--what latents: 'latents' cannot be extracted; write video, text or video,text",
    f"{JOB} --output x --items_per_shard 0": "argument --items-per-shard: '0' is no whole number from 1 to 100000",
    "--mm-model examples/tiny/wan22-t2v/model.json --output x": "--mm-data: it is required: it says what is encoded",
    JOB: "nothing says where features go; add --output FOLDER, or sorafeature.save_path to tools.json",
    f"{JOB} --output x {STORED} data.dataset_param.basic_parameters.data_path=a.json": "features that were extracted before",
    f"{JOB} --output examples": "examples: holds something else than features; choose another --output",
}


@pytest.mark.parametrize("words", WRONG)
def test_mistakes_are_told(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["extract-features", *words.split()]) == 2
    assert WRONG[words] in capsys.readouterr().err


def test_a_file_of_tools_may_name_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    place = f'tools.sorafeature={{"save_path": "{tmp_path}/made"}}'
    assert main(["extract-features", JOB, place, "--what", "text", "--format", "json"]) == 0
    told = capsys.readouterr().out
    assert f'"index": "{tmp_path}/made/index.json"' in told
    assert '"made": 3' in told
