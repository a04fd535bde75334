"""`generate` from an inference file to MP4s, and the video helpers."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN

from mm_core.config import load_generation_job
from mm_core.config.generation_job import GenerationJob
from mm_core.generation import generate
from mm_core.generation.build import build_pipeline
from mm_core.generation.video import (
    contact_sheet,
    move_to_free_name,
    psnr,
    read_video,
    side_by_side,
    to_frames,
    write_video,
)
from mm_core.training.ema import ExponentialAverage
from mm_core.weights import materialize, save_checkpoint
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError

PROMPTS = ["a red ball", "two cats watch the grass"]


def clip(frames: int = 6, height: int = 32, width: int = 48, seed: int = 0) -> Any:
    """A smooth moving picture."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float32)
    waves = [np.sin((x * a + y * b) / 9 + t * 0.7 + seed) for a, b in ((1, 0), (0, 1), (1, 1))]
    return ((np.stack(waves, axis=-1) + 1) * 127.5).round().astype(np.uint8)


@pytest.fixture
def write_file(tmp_path: Path, tokenizer_folder: Path) -> Any:
    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "pipeline_class": "WanPipeline",
            "prompt": PROMPTS,
            "save_path": str(tmp_path / "out"),
            "fps": 8,
            "pipeline_config": {"input_size": [5, 32, 48], "seed": 3},
            "predictor": {"model_id": "wandit", "init": "random", **TINY_WAN},
            "ae": {"model_id": "wan_video_vae", "init": "random", "do_sample": False, **TINY_VAE},
            "text_encoder": {"model_id": "UMT5", "init": "random", "config": TINY_T5},
            "tokenizer": {"from_pretrained": str(tokenizer_folder), "model_max_length": 16},
            "diffusion": {
                "model_id": "UniPCMultistepScheduler",
                "num_inference_steps": 3,
                "guidance_scale": 2.0,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 3.0,
            },
        }
        for key, value in changes.items():
            partial = isinstance(value, dict) and "model_id" not in value
            content[key] = {**content[key], **value} if partial else value
        path = tmp_path / "inference_model.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def job(write_file: Any) -> GenerationJob:
    return load_generation_job(write_file())


@pytest.mark.timeout(120)
def test_videos_and_records_are_written_and_never_overwritten(job: GenerationJob, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    paths = generate(job, progress=lambda done, total: steps.append((done, total)))
    assert [path.name for path in paths] == ["000-a-red-ball.mp4", "001-two-cats-watch-the-grass.mp4"]
    assert steps == [(i, 6) for i in range(1, 7)]
    assert all(read_video(path).shape == (5, 32, 48, 3) for path in paths)
    record = json.loads(paths[1].with_suffix(".json").read_text())
    assert record["prompt"] == PROMPTS[1]
    assert (record["seed"], record["index"], record["fps"], record["size"]) == (3, 1, 8, [5, 32, 48])
    assert record["weights"] == {"predictor": "random"}
    assert record["config"]["diffusion"]["num_inference_steps"] == 3
    assert {"mmzoo-core", "mmzoo-plugin-wan22", "torch"} <= set(record["versions"])

    kept = paths[0].read_bytes()
    again = generate(job, prompts=PROMPTS[:1], batch_size=2)
    assert [path.name for path in again] == ["000-a-red-ball-1.mp4"]
    assert paths[0].read_bytes() == kept
    assert np.array_equal(read_video(again[0]), read_video(paths[0]))  # seed and number make the video
    other = generate(
        job, prompts=PROMPTS[:1], seed=4, save_path=tmp_path / "x.mp4", steps=1, guidance_scale=1.0
    )
    assert other == [tmp_path / "x.mp4"]
    assert not np.array_equal(read_video(other[0]), read_video(paths[0]))
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_batches_do_not_change_videos(job: GenerationJob, tmp_path: Path) -> None:
    single = generate(job, save_path=tmp_path / "single")
    together = generate(job, save_path=tmp_path / "together", batch_size=2)
    for a, b in zip(single, together, strict=True):
        assert a.name == b.name
        assert psnr(read_video(a), read_video(b)) > 45


def test_weights_come_from_a_run_a_folder_or_not_at_all(write_file: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    trained = WanDiT(**TINY_WAN)
    run = tmp_path / "run"
    save_checkpoint(run, 7, {"predictor": trained}, None, {"step": 7, "consumed_samples": 7, "seed": 0})
    trained.save_pretrained(tmp_path / "folder")
    path = write_file(predictor={"init": "pretrained"})

    def weights(**overrides: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        loaded = load_generation_job(path, overrides)
        pipeline, sources = build_pipeline(loaded, device=torch.device("cpu"), seed=0)
        assert not any(p.requires_grad for p in pipeline.model.parameters())
        return pipeline.model.predictor.state_dict(), sources

    for source in (run, run / "checkpoints" / "iter_0000007", tmp_path / "folder"):
        state, sources = weights(load=str(source))
        assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
        assert Path(sources["predictor"]).is_dir()
        assert str(source) in sources["predictor"]
    state, sources = weights(**{"predictor.from_pretrained": str(tmp_path / "folder")})
    assert torch.equal(state["proj_out.weight"], trained.proj_out.weight)
    with pytest.raises(UserError, match="predictor"):
        weights()
    with pytest.raises(UserError, match="folder"):
        weights(load=str(tmp_path / "rnu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        weights(load=str(tmp_path / "empty"))


def test_averaged_weights_of_a_checkpoint_are_used_when_they_are_asked_for(
    write_file: Any, tmp_path: Path
) -> None:
    trained = WanDiT(**TINY_WAN)
    average = ExponentialAverage({"predictor": trained}, 0.5)
    with torch.no_grad():
        trained.proj_out.weight += 1.0
    average.update()
    state = {"step": 7, "consumed_samples": 7, "seed": 0}
    save_checkpoint(tmp_path / "run", 7, {"predictor": trained, **average.modules()}, None, state)
    save_checkpoint(tmp_path / "plain", 7, {"predictor": trained}, None, state)
    trained.save_pretrained(tmp_path / "folder")
    path = write_file(predictor={"init": "pretrained"})

    def weight(load: str, *, ema: bool) -> torch.Tensor:
        job = load_generation_job(path, {"load": str(tmp_path / load)})
        pipeline, _ = build_pipeline(job, device=torch.device("cpu"), seed=0, ema=ema)
        return pipeline.model.predictor.proj_out.weight.detach()

    assert torch.equal(weight("run", ema=False), trained.proj_out.weight)
    assert torch.equal(weight("run", ema=True), average.tensors("predictor")["proj_out.weight"])
    with pytest.raises(UserError, match="saved without --ema-decay"):
        weight("plain", ema=True)
    with pytest.raises(UserError, match="give a run or a checkpoint"):
        weight("folder", ema=True)


@pytest.mark.parametrize("name", ["file", "file/x", "file/x.mp4", "a\0b", "n" * 300])
def test_a_folder_that_cannot_be_written_is_refused_first(
    job: GenerationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("kept")

    def build(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("built before the folder was tried")

    monkeypatch.setattr(importlib.import_module("mm_core.generation.generate"), "build_pipeline", build)
    with pytest.raises(UserError, match=r"^save_path .*(is a file|cannot be written there)"):
        generate(job, save_path=tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_left_where_the_model_cannot_be_built(job: GenerationJob, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for name in ("new", "new/er/x.mp4"):
        with pytest.raises(UserError, match="no such folder"):
            generate(job, load=tmp_path / "none", save_path=tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        generate(job, load=tmp_path / "none", save_path=tmp_path / "there")
    assert (tmp_path / "there").is_dir()
    assert not list((tmp_path / "there").iterdir())


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(write_file: Any) -> None:
    path = write_file(text_encoder={"config": {**TINY_T5, "vocab_size": 10}})
    with pytest.raises(
        UserError, match=r"text_encoder: its vocabulary has 10 entries \(config.vocab_size"
    ) as caught:
        build_pipeline(load_generation_job(path), device=torch.device("cpu"), seed=0)
    assert "the tokenizer of tokenizer.from_pretrained has" in str(caught.value)


def test_prompts_are_cleaned_as_the_file_says(write_file: Any) -> None:
    def ids(**keys: Any) -> list[int]:
        loaded = load_generation_job(write_file(**keys))
        pipeline, _ = build_pipeline(loaded, device=torch.device("cpu"), seed=0)
        return pipeline.tokenizer("A  &amp; B")[0].tolist()

    plain, cleaned = ids(), ids(use_prompt_preprocess=True)
    steps = [{"method": "basic_clean"}, {"method": "whitespace_clean"}]
    assert ids(text_preprocess_methods=steps) == cleaned != plain


def test_random_weights_are_those_that_training_starts_from(job: GenerationJob) -> None:
    pipeline, _ = build_pipeline(job, device=torch.device("cpu"), seed=11)
    with torch.device("meta"):
        start = WanDiT(**TINY_WAN)
    materialize(start, "cpu", 11)
    for (name, value), (_, other) in zip(
        start.state_dict().items(), pipeline.model.predictor.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name
    for name, table in WanDiT(**TINY_WAN).named_buffers():
        assert torch.equal(table, start.get_buffer(name)), name


@pytest.mark.timeout(120)
def test_two_experts_in_half_precision_with_offloading(write_file: Any, tmp_path: Path) -> None:
    WanDiT(**TINY_WAN).save_pretrained(tmp_path / "low")
    path = write_file(
        low_noise_predictor=str(tmp_path / "low"),
        boundary_ratio=0.8,
        dtype="bf16",
        pipeline_config={"cpu_offload": True},
        diffusion={"guidance_scale": [3.0, 2.0]},
        num_inference_videos_per_sample=2,
    )
    loaded = load_generation_job(path)
    pipeline, sources = build_pipeline(loaded, device=torch.device("cpu"), seed=0)
    assert sources == {"predictor": "random", "low_noise_predictor": str(tmp_path / "low")}
    assert pipeline.model.predictor.proj_out.weight.dtype is torch.bfloat16
    assert pipeline.model.predictor.blocks[0].scale_shift_table.dtype is torch.float32
    assert pipeline.model.predictor.rope.freqs_cos.dtype is torch.float32
    paths = generate(loaded, prompts=["a red ball"])
    assert len(paths) == 2
    assert psnr(read_video(paths[0]), read_video(paths[1])) < 40  # two videos of one prompt differ


def test_haar_and_the_training_scheduler(write_file: Any) -> None:
    path = write_file(
        prompt="a red ball",
        predictor={"in_dim": 24, "out_dim": 24},
        ae={"model_id": "haar_video"},
        diffusion={"model_id": "wan_flow_match_scheduler", "num_inference_timesteps": 2, "shift": 5.0},
        pipeline_config={"input_size": [8, 32, 48]},
    )
    (video,) = generate(load_generation_job(path))
    assert read_video(video).shape == (8, 32, 48, 3)


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_written_videos_are_close_to_their_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = clip(6, *size)
    path = write_video(tmp_path / "clip.mp4", frames, 24)
    decoded = read_video(path)
    assert decoded.shape == (6, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert psnr(decoded[:, : size[0], : size[1]], frames) > 30
    assert read_video(path, max_frames=2).shape[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_fps_of_written_videos(tmp_path: Path) -> None:
    import av

    for fps in (4, 23.976, 30):
        with av.open(str(write_video(tmp_path / f"{fps}.mp4", clip(4), fps))) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_broken_and_missing_videos_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="cannot be read"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder cannot be made"):
        write_video(tmp_path / "file" / "x.mp4", clip(), 8)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "x.mp4", clip().astype(np.float32), 8)


def test_free_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        (tmp_path / "t").write_text("x")
        names.append(move_to_free_name(tmp_path / "t", tmp_path / "a.mp4").name)
    assert names == ["a.mp4", "a-1.mp4", "a-2.mp4"]


def test_psnr_and_frames() -> None:
    frames = clip()
    assert psnr(frames, frames) == math.inf
    noisy = frames.astype(np.int32)
    noisy[..., 0] += np.where(noisy[..., 0] > 127, -3, 3)
    expected = 10 * math.log10(255**2 / (9 / 3))
    assert psnr(frames, noisy.astype(np.uint8)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="compared"):
        psnr(frames, frames[1:])
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 5).expand(3, 2, 4, 5)
    assert to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_frames(video).shape == (2, 4, 5, 3)


def test_pictures(tmp_path: Path) -> None:
    from PIL import Image

    frames = clip(9)
    sheet = contact_sheet(frames, columns=3)
    assert np.array_equal(sheet, np.concatenate([frames[0], frames[4], frames[8]], axis=1))
    path = side_by_side(
        tmp_path / "p" / "a.png", {"before": frames, "after": clip(9, seed=1)}, columns=3, scale=2
    )
    with Image.open(path) as image:
        assert image.size == (3 * 48 * 2, 2 * (32 * 2 + 18))
        below = np.asarray(image)[18 : 18 + 64, :]
    assert np.array_equal(below[::2, ::2], sheet)


_WRITE = """
import sys, numpy as np
from mm_core.generation.video import write_video
y, x = np.mgrid[:64, :64]
base = np.stack([128 + 90 * np.sin((x + 3 * t) / 9) * np.cos(y / 7) for t in range(9)])
noise = np.random.default_rng(0).normal(0, 12, (9, 64, 64, 3))
write_video(sys.argv[1], (base[..., None] + noise).clip(0, 255).astype(np.uint8), 4)
"""


def test_the_same_frames_are_the_same_file(tmp_path: Path) -> None:
    """Whatever lies in memory that the encoder is given: x264's AVX-512 code reads some of it."""
    written = set()
    for filled in ("1", "170"):
        file = tmp_path / f"{filled}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": filled}
        subprocess.run([sys.executable, "-c", _WRITE, str(file)], env=environment, check=True, timeout=60)
        written.add(file.read_bytes())
    assert len(written) == 1
