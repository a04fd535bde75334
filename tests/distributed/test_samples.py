"""Sample videos while a model trains: they are `mm generate`'s of the same weights, on any ranks, and leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_core.config import load_training_job
from mm_core.config.document import read_document
from mm_core.config.findings import ConfigError
from mm_core.config.flag_parsing import parse_train_flags
from mm_core.config.generation_job import load_generation_job
from mm_core.generation import generate, read_video
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import ROOT, TINY, outcome, trainer_of

pytestmark = pytest.mark.timeout(200)
INFERENCE = TINY / "inference_model.json"
SHORT = ("--train-iters", "2", "--save-interval", "2", "--ema-decay", "0.5", "--no-async-save")


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny inference file with two steps of denoising, and three prompts."""
    text = INFERENCE.read_text().replace('"num_inference_timesteps": 30', '"num_inference_timesteps": 2')
    text = text.replace(
        '"prompt": "examples/tiny/wan22-t2v/prompts.txt"', '"prompt": ["a bunny", "a tower", "grass"]'
    )
    path = tmp_path_factory.mktemp("samples") / "inference_model.json"
    path.write_text(text)
    return path


def trained(run: Path, *more: str) -> dict[str, Any]:
    trainer = trainer_of(run, *SHORT, *more)
    trainer.train(lambda: False)
    return outcome(trainer)


def videos(run: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(run / "samples")): read_video(p) for p in sorted((run / "samples").rglob("*.mp4"))
    }


def test_videos_are_those_of_the_checkpoints_and_leave_no_trace(tmp_path: Path, inference: Path) -> None:
    flags = ("--sample-config", str(inference), "--sample-interval", "2", "--eval-ema")

    def both() -> Any:
        return trained(tmp_path / "with", *flags), trained(tmp_path / "without")

    ((with_samples, without),) = run_ranks(both, 1, timeout=150)
    assert with_samples == without
    found = videos(tmp_path / "with")
    folders = ["step-0000000", "step-0000002", "step-0000002-ema"]
    names = [name for name in found if name.startswith("step-0000002/")]
    assert sorted({name.split("/")[0] for name in found}) == folders
    assert [name.split("/")[1] for name in names] == ["000-a-bunny.mp4", "001-a-tower.mp4", "002-grass.mp4"]
    assert (tmp_path / "with/samples" / names[0]).with_suffix(".png").exists()
    record = json.loads((tmp_path / "with/samples" / names[0]).with_suffix(".json").read_text())
    assert (record["step"], record["prompt"], record["fps"]) == (2, "a bunny", 4)

    job = load_generation_job(inference, {"load": str(tmp_path / "with/checkpoints/iter_0000002")})
    for folder, ema in (("step-0000002", False), ("step-0000002-ema", True)):
        paths = generate(job, save_path=tmp_path / folder, ema=ema)
        for path in paths:
            np.testing.assert_array_equal(read_video(path), found[f"{folder}/{path.name}"])


@pytest.mark.slow
def test_two_ranks_make_the_videos_of_one(tmp_path: Path, inference: Path) -> None:
    flags = ("--sample-config", str(inference), "--train-iters", "1", "--eval-ema")

    def sampled(run: Path) -> None:
        trained(run, *flags)

    for ranks in (1, 2):
        run_ranks(sampled, ranks, tmp_path / str(ranks), timeout=150)
    one, two = videos(tmp_path / "1"), videos(tmp_path / "2")
    assert one.keys() == two.keys()
    assert len(one) == 9
    for name, frames in one.items():  # the weights were summed in another order
        assert close(frames, two[name]), name
    job = load_generation_job(inference, {"load": str(tmp_path / "2/checkpoints/iter_0000001")})
    for path in generate(job, save_path=tmp_path / "averaged", ema=True):
        assert close(read_video(path), two[f"step-0000001-ema/{path.name}"]), path.name
    assert not close(one["step-0000000/002-grass.mp4"], one["step-0000001/002-grass.mp4"])


def close(one: Any, other: Any) -> bool:
    """Whether two videos are alike but for what H.264 makes of the last digits."""
    difference = np.abs(one.astype(int) - other.astype(int))
    return bool(difference.max() <= 12 and difference.mean() < 0.05)


@pytest.mark.slow
def test_both_experts(tmp_path: Path, inference: Path) -> None:
    model = read_document(TINY / "model.json").data
    model["low_noise_predictor"] = model["predictor"]
    model["diffusion"]["boundary"] = 0.6
    (tmp_path / "model.json").write_text(json.dumps(model))
    file = read_document(inference).data
    file |= {"boundary_ratio": 0.6, "low_noise_predictor": file["predictor"]}
    (tmp_path / "two.json").write_text(json.dumps(file))
    flags = ("--mm-model", str(tmp_path / "model.json"), "--sample-config", str(tmp_path / "two.json"))
    flags += ("--train-iters", "2", "--lr-scale-modules", "low_noise_predictor:0.5")
    run_ranks(trained, 1, tmp_path / "run", *flags, timeout=150)
    found = videos(tmp_path / "run")
    job = load_generation_job(tmp_path / "two.json", {"load": str(tmp_path / "run/checkpoints/iter_0000002")})
    for path in generate(job, save_path=tmp_path / "by_checkpoint"):
        np.testing.assert_array_equal(read_video(path), found[f"step-0000002/{path.name}"])


WRONG = [
    (("--sample-interval", "5"), "--sample-interval", "needs --sample-config"),
    (("--sample-config", str(INFERENCE)), "--sample-config", "needs --save"),
    (("--eval-ema",), "--eval-ema", "needs --ema-decay"),
    (("--sample-config", "nowhere.json", "--save", "x"), "", "nowhere.json"),
]


@pytest.mark.parametrize(("words", "path", "message"), WRONG)
def test_mistakes_are_found_without_a_model(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], path: str, message: str
) -> None:
    monkeypatch.chdir(ROOT)
    files = ("--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"))
    with pytest.raises(ConfigError) as caught:
        load_training_job(parse_train_flags([*files, "--train-iters", "1", "--lr", "1", *words]))
    assert path in caught.value.findings[0].path
    assert message in str(caught.value)


def test_another_expert_or_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inference: Path
) -> None:
    monkeypatch.chdir(ROOT)
    two = tmp_path / "two.json"
    two.write_text(
        inference.read_text().replace(
            '"fps": 4,', '"fps": 4, "boundary_ratio": 0.9, "low_noise_predictor": "x",'
        )
    )
    files = (
        "--mm-model",
        str(TINY / "model.json"),
        "--mm-data",
        str(TINY / "data.json"),
        "--save",
        str(tmp_path / "run"),
    )
    with pytest.raises(
        ConfigError, match='the file has "low_noise_predictor", and the job trains no such expert'
    ):
        load_training_job(
            parse_train_flags([*files, "--train-iters", "1", "--lr", "1", "--sample-config", str(two)])
        )
