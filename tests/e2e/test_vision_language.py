"""A vision-language model as a user trains it: a run, its folder for others, and a question to that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Result

HERE = ROOT / "examples/tiny/qwen3vl"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_folder_of_a_run_can_be_asked_by_itself(tmp_path: Path, mm: Callable[..., Result]) -> None:
    """With tokenizer, chat template and settings of images; what `mm convert` makes of the run is the same."""
    run = tmp_path / "run"
    trained = mm(
        "train", HERE / "job.yaml", "--train-iters", "1", "--lr-warmup-iters", "0", "--save", run, "--save-interval", "1",
        "--save-hf",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    (folder,) = (run / "hf").glob("*/model")
    converted = tmp_path / "converted"
    done = mm("convert", "--from", run, "--to", converted)
    assert done.code == 0, done.err
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in converted.iterdir()}
    published = {path.name for path in (HERE / "model").iterdir()}
    assert published <= names
    for name in published - {"config.json"}:
        assert (folder / name).read_bytes() == (HERE / "model" / name).read_bytes()
    answers = [
        mm("generate", "--model", place, "--image", HERE / "photos/cat.jpg", "--prompt", "What is this?",
           "--max-new-tokens", "2")
        for place in (folder, converted)
    ]  # fmt: skip
    assert [one.code for one in answers] == [0, 0], answers[0].err + answers[1].err
    assert answers[0].out == answers[1].out
