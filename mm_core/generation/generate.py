"""`generate`: prompts in, video files out."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm_core.accelerator import Accelerator
from mm_core.generation.build import build_pipeline
from mm_core.generation.video import move_to_free_name, to_frames, write_video
from mm_core.models.protocols import Progress
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.generation_job import GenerationJob

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "diffusers", "transformers")


def generate(
    job: GenerationJob,
    *,
    prompts: Sequence[str] | None = None,
    load: str | Path | None = None,
    ema: bool = False,
    save_path: str | Path | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one MP4 for each prompt (times `num_inference_videos_per_sample`), and beside each a JSON that
    says how to make it again.

    The noise of a video depends on the seed and on its number alone, not on the batch. No existing file is
    overwritten.

    Args:
        job: a checked inference file.
        prompts: instead of the job's.
        load: training run, checkpoint or folder with the predictor's weights, instead of the job's.
        ema: use the averaged weights of that checkpoint.
        save_path: instead of the job's: a folder, or a name ending in .mp4 (numbered if there are several
            videos).
        seed: of noise, and of random weights where the file asks for them; else that of `pipeline_config`,
            else 0.
        steps, guidance_scale, negative_prompt: instead of what the file says.
        batch_size: videos that are made together.
        device: where to compute; the machine's accelerator by default.
        progress: called with (steps done, steps) over all videos.

    Returns:
        The videos' paths, in the order of prompts.

    Raises:
        UserError: weights are missing or do not fit, or a file cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least one video is made at a time")
    prompts = list(job.prompts if prompts is None else prompts)
    if not prompts:
        raise UserError('no prompt; give --prompt "…" or "prompt" in the inference file')
    texts = [prompt for prompt in prompts for _ in range(job.model.num_inference_videos_per_sample)]
    accelerator = Accelerator.current()
    device = accelerator.device if device is None else torch.device(device)
    seed = _seed(job, seed)
    save_path = Path(save_path or job.model.save_path).expanduser()
    targets = _targets(save_path, texts)
    with _folder_of_videos(targets[0].parent, save_path):  # hours of sampling end there: it comes first
        pipeline, sources = build_pipeline(job, device=device, seed=seed, load=load, ema=ema)
        record = {
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "fps": job.model.save_fps,
            "weights": sources,
            "ema": ema,
            "device": str(device),
            "versions": _versions(job),
            "config": job.resolved()["values"],
        }
        written: list[Path] = []
        batches = range(0, len(texts), batch_size)
        for number, start in enumerate(batches):
            batch = texts[start : start + batch_size]
            indices = list(range(start, start + len(batch)))
            videos = pipeline(
                batch,
                seed=seed,
                indices=indices,
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                progress=_within(progress, number, len(batches)),
            )  # [B, 3, T, H, W] in [-1, 1]
            for index, text, video in zip(indices, batch, videos, strict=True):
                written.append(_write(targets[index], video, {"prompt": text, "index": index, **record}))
    return written


@contextmanager
def _folder_of_videos(folder: Path, save_path: Path) -> Iterator[None]:
    """Make the folder and try to write into it; if what follows fails and leaves it empty, what was made of
    it is removed again.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileExistsError as error:
            raise UserError(
                f"save_path {save_path}: {folder} is a file; give a folder, or a name ending in .mp4"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a name with NUL
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"save_path {save_path}: videos cannot be written there: {reason.lower()}"
            ) from error
        yield
    except BaseException:
        for path in made:
            with suppress(OSError, ValueError):  # something is in it, or it was never made
                path.rmdir()
        raise


def _write(path: Path, video: torch.Tensor, record: dict[str, Any]) -> Path:
    """Write a video `[3, T, H, W]` in [-1, 1] and its record; return the path that it got."""
    frames = to_frames(video)
    path = write_video(path, frames, record["fps"])
    _write_record(path, {"video": path.name, "size": list(frames.shape[:3]), **record})
    logger.info("wrote %s", path)
    return path


def _seed(job: GenerationJob, seed: int | None) -> int:
    if seed is not None:
        return seed
    return int(job.components["pipeline"].fields.get("seed") or 0)


def _within(progress: Progress | None, number: int, batches: int) -> Progress | None:
    """Progress of one batch as progress of all."""
    if progress is None:
        return None
    return lambda step, steps: progress(number * steps + step, batches * steps)


def _targets(save_path: Path, texts: Sequence[str]) -> list[Path]:
    if save_path.suffix.lower() == ".mp4":
        if len(texts) == 1:
            return [save_path]
        return [save_path.with_name(f"{save_path.stem}-{index:03d}.mp4") for index in range(len(texts))]
    return [save_path / f"{index:03d}-{_slug(text)}.mp4" for index, text in enumerate(texts)]


def _slug(text: str) -> str:
    """A prompt as part of a file name; short in bytes too, for scripts of three bytes a letter."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-_")
    return words.encode()[:60].decode(errors="ignore").rstrip("-_") or "video"


def _versions(job: GenerationJob) -> dict[str, str]:
    return {name: version(name) for name in ("mmzoo-core", *_LIBRARIES)} | dict(job.plugins)


def _write_record(video: Path, record: dict[str, Any]) -> None:
    path = video.with_suffix(".json")
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        move_to_free_name(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
