"""Encoders of a training job: away, shared among ranks, or replaced by what `mm extract-features` stored. The losses are the
same to the last bit. Real jobs in ranks that are forked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mm_core.config.extraction_job import load_extraction_job
from mm_core.training.extraction import extract
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import ROOT, TINY, trainer_of

pytestmark = pytest.mark.timeout(120)

DROPPED = "data.dataset_param.preprocess_parameters.cfg=0.5"
RATE = "data.dataset_param.basic_parameters.val_rate=0.5"
FILES = ("--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"))


def extracted(folder: Path, *more: str, what: Sequence[str] = ("video", "text"), items: int = 1) -> Any:
    os.chdir(ROOT)
    return extract(load_extraction_job([*FILES, *more], what), folder, items_per_shard=items)


def stored(folder: Path, *, video: bool = True, text: bool = True) -> tuple[str, ...]:
    """Overrides that let a job read features."""
    return (
        f"model.load_video_features={str(video).lower()}",
        f"model.load_text_features={str(text).lower()}",
        f"data.dataset_param.basic_parameters.data_path={folder / 'index.json'}",
        "data.dataset_param.basic_parameters.data_storage_mode=sorafeatured",
    )


def losses(run: Path, *more: str | Path) -> list[float]:
    trainer = trainer_of(run, DROPPED, *more)
    trainer.train(lambda: False)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def with_features(folder: Path) -> dict[str, Any]:
    for name, what in (("both", ("video", "text")), ("video", ("video",)), ("text", ("text",))):
        extracted(folder / name, what=what)
    both = trainer_of(None, *stored(folder / "both"))
    return {
        "encoded": losses(folder / "encoded"),
        "both": losses(folder / "run-both", *stored(folder / "both")),
        "workers": losses(folder / "run-workers", *stored(folder / "both"), "--num-workers", "2"),
        "video": losses(folder / "run-video", *stored(folder / "video", text=False)),
        "text": losses(folder / "run-text", *stored(folder / "text", video=False)),
        "built": [both.model.ae, both.model.text_encoder],
    }


@pytest.mark.slow
def test_a_job_on_stored_features_has_the_same_losses(tmp_path: Path) -> None:
    found = run_ranks(with_features, 1, tmp_path, timeout=100)[0]
    assert len(found["encoded"]) == 4
    for name in ("both", "workers", "video", "text"):
        assert found[name] == found["encoded"], name
    assert found["built"] == [None, None]


def with_given_frames(folder: Path, example: str) -> tuple[list[float], list[float], set[str]]:
    """Losses of an image-conditioned job without and with features; what is stored of a clip."""
    os.chdir(ROOT)
    tiny = ROOT / "examples/tiny"
    files = ("--mm-model", str(tiny / example / "model.json"), "--mm-data", str(tiny / "wan22-vae/data.json"))
    files = (
        *files,
        "data.dataset_param.preprocess_parameters.train_fps=4.2",
    )  # the whole clip: nothing is drawn
    extract(load_extraction_job([*files, "--num-workers", "1"], ("video",)), folder / "features")
    short = (*files, "--train-iters", "2")
    names = {name.split("/")[2] for name in tensors_of(folder / "features")}
    index = ("model.load_video_features=true", *stored(folder / "features")[2:])
    return losses(folder / "encoded", *short), losses(folder / "stored", *short, *index), names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "condition"), [("wan22-i2v", "i2v_vae_feature"), ("wan22-ti2v", "first_frame_latents")]
)
def test_conditions_of_given_frames_are_stored_too(example: str, condition: str, tmp_path: Path) -> None:
    encoded, from_store, names = run_ranks(with_given_frames, 1, tmp_path, example, timeout=100)[0]
    assert from_store == encoded
    assert names == {"latents", f"conditions.{condition}"}


def away(folder: Path) -> dict[str, Any]:
    """Losses with encoders that come to the device for three micro batches at once, in one go and resumed."""
    away = "model.encoder_offload_interval=3"
    trainer = trainer_of(folder / "away", DROPPED, away)
    trips = trainer.model._parked
    trainer.train(lambda: False)
    losses(folder / "resumed", away, "--train-iters", "2")
    return {
        "here": losses(folder / "here"),
        "away": losses_of(folder / "away"),
        "resumed": losses(folder / "resumed", away, "--load", folder / "resumed"),
        "trips": trips.trips,
    }


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_encoders_that_are_away_between_micro_batches_change_no_loss(tmp_path: Path) -> None:
    found = run_ranks(away, 1, tmp_path, timeout=100)[0]
    assert found["away"] == found["here"]
    assert found["resumed"][-2:] == found["here"][2:]
    assert found["trips"] == 3  # eight micro batches, across steps


def shared(folder: Path) -> dict[str, Any]:
    """Losses with context parallelism; which samples this rank encoded itself."""
    both = ("--context-parallel-size", "2", "--global-batch-size", "2")
    each = losses(folder / "each", *both)
    trainer = trainer_of(folder / "shared", DROPPED, *both, "model.enable_encoder_dp=true")
    encoders, seen = trainer.task.encoders, []
    encode = encoders._encode

    def noted(batch: dict[str, Any]) -> Any:
        seen.extend(batch["sample_index"].tolist())
        return encode(batch)

    encoders._encode = noted  # type: ignore[method-assign]
    trainer.train(lambda: False)
    return {"each": each, "shared": losses_of(folder / "shared"), "seen": seen}


@pytest.mark.slow
def test_ranks_that_share_sequences_share_the_encoding(tmp_path: Path) -> None:
    first, second = run_ranks(shared, 2, tmp_path, timeout=100)
    assert first["shared"] == first["each"]
    assert (first["seen"], second["seen"]) == ([0, 2, 4, 6], [1, 3, 5, 7])


def tensors_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                found[f"{file.name}/{name}"] = shard.get_tensor(name).view(torch.uint8).numpy().tobytes()
    return found


def killed_and_resumed(folder: Path) -> Any:
    """Extract with two ranks, lose a shard and the index, and go on; then with another set of samples."""
    first = extracted(folder)
    before = tensors_of(folder)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "index.json").unlink()
        (folder / "clips-000001.safetensors").unlink()
        (folder / ".tmp-1-clips-000001.safetensors").write_bytes(b"half")
    torch.distributed.barrier()
    second, third = extracted(folder), extracted(folder)
    if torch.distributed.get_rank() == 0:  # lost, and cut off, after all was done
        shards = sorted(folder.glob("*.safetensors"))
        shards[0].unlink()
        shards[-1].write_bytes(shards[-1].read_bytes()[:-4])
    torch.distributed.barrier()
    assert extracted(folder).made == 2
    with pytest.raises(UserError, match=r"other encoders \(text differ\); choose another --output"):
        extracted(folder, "model.text_encoder.config.d_ff=64")
    return (first.made, second.made, third.made), before, tensors_of(folder)


def test_an_extraction_goes_on_after_a_kill_on_any_number_of_ranks(tmp_path: Path) -> None:
    (made, before, after), _ = run_ranks(killed_and_resumed, 2, tmp_path / "two", timeout=100)
    assert made == (5, 1, 0)  # two clips, two captions and the empty one
    assert after == before
    assert not list((tmp_path / "two").glob(".tmp-*"))
    # Those who share the folder can read all of it.
    assert len({file.stat().st_mode for file in (tmp_path / "two").iterdir()}) == 1
    run_ranks(extracted, 1, tmp_path / "one", timeout=100)
    assert tensors_of(tmp_path / "one") == before
    assert (tmp_path / "one/index.json").read_text() == (tmp_path / "two/index.json").read_text()


def of_a_list(folder: Path) -> Any:
    """A set with a video twice, a caption twice and a file that is no video."""
    clips = TINY / "clips"
    bunny = json.loads((TINY / "bunny.json").read_text())[0]
    bad = {**bunny, "path": "bad.mp4", "cap": ["other", bunny["cap"]]}
    again = {**bunny, "cap": [bunny["cap"], "  " + bunny["cap"] + " "]}
    (folder / "videos").mkdir()
    shutil.copy(clips / bunny["path"], folder / "videos")
    (folder / "videos/bad.mp4").write_bytes(b"no video")
    (folder / "videos/set.json").write_text(json.dumps([bunny, bad, again]))
    data = f"data.dataset_param.basic_parameters.data_path={folder / 'videos/set.json'}"
    mode = "data.dataset_param.basic_parameters.data_storage_mode=standard"
    extracted(folder / "out", data, mode, "data.dataset_param.max_bad_samples=1", items=8)
    job = load_extraction_job(
        [*FILES, "data.dataset_param.preprocess_parameters.num_frames=4", RATE], ("video",)
    )
    extract(job, folder / "several", clips_per_video=5)  # those that are held back too
    return (folder / "out/samples.jsonl").read_text()


def test_what_is_there_twice_is_stored_once_and_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run_ranks(of_a_list, 1, tmp_path, timeout=100)[0].splitlines()]
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert (index["samples"], index["unreadable"]) == (2, 1)
    assert [row["path"] for row in rows] == [str(tmp_path / "videos/bunny.mp4")] * 2
    assert rows[0]["clips"] == rows[1]["clips"]
    several = [
        json.loads(line)["clips"] for line in (tmp_path / "several/samples.jsonl").read_text().splitlines()
    ]
    assert [len(clips) for clips in several] == [5, 5]  # of longer videos, at five different beginnings
    # Cleaning makes one prompt of both captions.
    assert rows[1]["prompts"] == rows[0]["prompts"] * 2
