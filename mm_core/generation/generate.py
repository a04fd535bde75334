"""`generate`: prompts in, video files out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm_core.accelerator import Accelerator
from mm_core.config.given_frames import Images
from mm_core.generation.build import build_pipeline
from mm_core.generation.records import (
    folder_of_videos,
    image_record,
    targets_of,
    versions_of,
    write_record,
)
from mm_core.generation.requests import VideoRequest, batches_of, given_frames, requests_of, seed_of, sized
from mm_core.generation.sharing import Sharing, share_videos
from mm_core.generation.video import to_frames, write_video
from mm_core.models.protocols import Progress
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.generation_job import GenerationJob

logger = logging.getLogger(__name__)


def generate(
    job: GenerationJob,
    *,
    prompts: Sequence[str] | None = None,
    images: Images | None = None,
    indices: Sequence[int] | None = None,
    load: str | Path | Sequence[str | Path] | None = None,
    lora: Sequence[str | Path] = (),
    ema: bool = False,
    save_path: str | Path | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    sharing: Sharing | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one MP4 for each prompt (times `num_inference_videos_per_sample`), and beside each a JSON that
    says how to make it again.

    The noise of a video depends on the seed and on its number alone, not on the batch or the rank. No existing file is
    overwritten.

    Args:
        job: a checked inference file.
        prompts: instead of the job's.
        images: first and last frames, as many as prompts; instead of the job's if prompts are given.
        indices: numbers of the videos; 0, 1, … by default.
        load: training run, checkpoint or folder with the predictor's weights, or two, of both experts; instead of the
            job's.
        lora: adapters to add to the experts: PEFT's folders or runs.
        ema: use the averaged weights of that checkpoint.
        save_path: instead of the job's: a folder, or a name ending in .mp4 (numbered if there are several
            videos).
        seed: of noise, and of random weights where the file asks for them; else that of `pipeline_config`,
            else 0.
        steps, guidance_scale, negative_prompt: instead of what the file says.
        batch_size: videos that are made together.
        device: where to compute; the machine's accelerator by default.
        sharing: which of the videos this rank makes; all by default.
        progress: called with (steps done, steps) over all videos of this rank.

    Returns:
        The paths of the videos that this rank wrote, in the order of prompts.

    Raises:
        UserError: weights are missing or do not fit, an image cannot be read, or a file cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least one video is made at a time")
    if images is None:
        images = job.images if prompts is None else Images()
    prompts = list(job.prompts if prompts is None else prompts)
    if not prompts:
        raise UserError('no prompt; give --prompt "…" or "prompt" in the inference file')
    sharing = sharing or Sharing()
    requests = requests_of(prompts, images, job.model.num_inference_videos_per_sample, indices)
    accelerator = Accelerator.current()
    device = accelerator.device if device is None else torch.device(device)
    seed = seed_of(job, seed)
    save_path = Path(save_path or job.model.save_path).expanduser()
    files = targets_of(save_path, [request.prompt for request in requests])
    targets = {request.index: file for request, file in zip(requests, files, strict=True)}
    with folder_of_videos(files[0].parent, save_path):  # hours of sampling end there: it comes first
        pipeline, sources = build_pipeline(job, device=device, seed=seed, load=load, lora=lora, ema=ema)
        if sharing.mesh is not None:
            share_videos(pipeline.model, job.components, sharing.mesh)
        if negative_prompt is None:  # told in the record: a default may be another one some day
            negative_prompt = getattr(pipeline, "negative_prompt", None)
        record = {
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "fps": job.model.save_fps,
            "weights": sources,
            # The places that were read: a run may go on. One run serves both experts.
            "lora": [place for name, place in sources.items() if name.endswith(" lora")][: len(lora)],
            "ema": ema,
            "device": str(device),
            "versions": versions_of(job),
            "config": job.resolved()["values"],
            "inference_file": job.source,
        }
        requests = sized(job, pipeline, requests)
        batches = list(batches_of(requests, batch_size))[sharing.place :: sharing.groups]
        written: list[Path] = []
        for number, batch in enumerate(batches):
            videos = pipeline(
                [request.prompt for request in batch],
                seed=seed,
                indices=[request.index for request in batch],
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                progress=_within(progress, number, len(batches)),
                **given_frames(job, batch),
            )  # [B, 3, T, H, W] in [-1, 1]
            for request, video in zip(batch, videos, strict=True):
                if sharing.writes:
                    written.append(_write(targets[request.index], video, request, record))
    return written


def _write(path: Path, video: torch.Tensor, request: VideoRequest, record: dict[str, Any]) -> Path:
    """Write a video `[3, T, H, W]` in [-1, 1] and its record; return the path that it got."""
    frames = to_frames(video)
    path = write_video(path, frames, record["fps"])
    own = {
        "video": path.name,
        "size": list(frames.shape[:3]),
        "prompt": request.prompt,
        "image": image_record(request.first),
        "last_image": image_record(request.last),
        "index": request.index,
    }
    write_record(path, {**own, **record})
    logger.info("wrote %s", path)
    return path


def _within(progress: Progress | None, number: int, batches: int) -> Progress | None:
    """Progress of one batch as progress of all."""
    if progress is None:
        return None
    return lambda step, steps: progress(number * steps + step, batches * steps)
