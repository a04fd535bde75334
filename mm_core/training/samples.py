"""Videos of the model as it is, while it trains (`--sample-config`, `--sample-interval`).

    <run>/samples/step-0001000/000-a-rabbit.mp4     and beside it .png, a contact sheet, and .json
    <run>/samples/step-0001000-ema/…                with the averaged weights (`--eval-ema`)

The network that denoises is the one that is trained, sharded as it is: all ranks make videos together, those that share a
model each part of one, the others other videos. A run with samples trains as one without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.accelerator import Accelerator
from mm_core.config import TrainingJob
from mm_core.generation.build import build_tokenizer
from mm_core.generation.records import image_record, targets_of, write_record
from mm_core.generation.requests import VideoRequest, given_frames, requests_of, seed_of, sized
from mm_core.generation.video import side_by_side, to_frames, write_video
from mm_core.models.factory import build_component
from mm_core.models.sora import SoRAModel
from mm_core.models.text_encoders import check_vocabulary
from mm_core.sharding.mesh import ParallelMesh
from mm_core.training.validation import left_as_it_was
from mm_core.weights.agreement import everywhere, ranks_agree
from mm_registry import default_manager
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.generation_job import GenerationJob

log = logging.getLogger(__name__)

INTERVAL = 1000
"""Steps between sample videos without --sample-interval: that of validations."""


class SampleVideos:
    """Makes the videos of an inference file with the networks that are trained.

    Autoencoder, text encoders and the processor of given frames are those of the training job where its sections say the
    same; else they are built from the inference file, and wait in host memory. A text encoder of the file's own is there for
    the first videos only, whose embeddings are kept.

    Args:
        job: with `samples`.
        model: of the job, sharded.
        mesh: of the model.
        accelerator: of this rank.
        run: the run's folder.

    Raises:
        UserError: the pipeline refuses the parts, or the ranks see different inference files; on all ranks.
    """

    def __init__(
        self, job: TrainingJob, model: SoRAModel, mesh: ParallelMesh, accelerator: Accelerator, run: Path
    ) -> None:
        assert job.samples is not None
        self.job, self.file = job, job.samples
        self.model, self.mesh, self.accelerator, self.folder = model, mesh, accelerator, run / "samples"
        self.interval, self.last_step = job.flags.sample_interval or INTERVAL, job.flags.train_iters
        self._agree()
        with ranks_agree(f"preparing the videos of --sample-config {job.flags.sample_config}"):
            parts = _Parts(job, self.file, model)
            self.view = parts.view
            self.remembered = parts.remembered
            tokenizer = build_tokenizer(self.file)
            if parts.vocabulary is not None:
                check_vocabulary(parts.vocabulary, len(tokenizer))
            pipeline = self.file.components["pipeline"]
            cls: Any = default_manager().load(pipeline.spec)
            self.pipeline = cls(self.view, tokenizer, device=accelerator.device, **pipeline.fields)
            requests = requests_of(
                self.file.prompts, self.file.images, self.file.model.num_inference_videos_per_sample
            )
            self.requests = sized(self.file, self.pipeline, requests)
        log.info(
            "%d sample videos every %d steps and after the last one, of %s",
            len(self.requests), self.interval, job.flags.sample_config,
        )  # fmt: skip

    def _agree(self) -> None:
        """Ranks that make other videos would wait for each other for ever."""
        text = json.dumps(self.file.resolved()["values"], sort_keys=True, default=str)
        told = [text, *self.file.prompts, *self.file.images.first, *self.file.images.last]
        digests = everywhere(hashlib.sha256("\0".join(told).encode()).hexdigest())
        if len(set(digests)) > 1:
            raise UserError(
                f"--sample-config {self.job.flags.sample_config}: the file, or its prompts, are others on rank "
                f"{next(r for r, digest in enumerate(digests) if digest != digests[0])} than on rank 0; give all machines "
                "the same"
            )

    def due(self, step: int) -> bool:
        """Whether there are videos after this step; 0 is before the first one."""
        return step % self.interval == 0 or step == self.last_step

    def run(self, step: int, stop_requested: Callable[[], bool] = lambda: False, suffix: str = "") -> None:
        """Make the videos; all ranks call this.

        Args:
            step: after which.
            stop_requested: true after SIGTERM. As soon as one rank says so, what is left is given up.
            suffix: of the folder.

        Raises:
            UserError: a video cannot be made or written, on all ranks.
        """
        started = time.perf_counter()
        folder = self.folder / f"step-{step:07d}{suffix}"
        targets = targets_of(folder, [request.prompt for request in self.requests])
        groups, place = self.mesh.dp_size, self.mesh.dp_rank
        count = len(self.requests)
        here = self.model.encoders_on_device()
        with torch.no_grad(), here, left_as_it_was(self.model, self.accelerator), self._where_they_were():
            for first in range(0, count, groups):
                if any(everywhere(stop_requested())):
                    log.info("the sample videos after step %d are given up: the run was asked to stop", step)
                    return
                # All ranks run the network equally often; one that has nothing to do repeats the last video.
                number = min(first + place, count - 1)
                request = self.requests[number]
                video = self.pipeline(
                    [request.prompt],
                    seed=seed_of(self.file),
                    indices=[request.index],
                    **given_frames(self.file, [request]),
                )[0]
                with ranks_agree(f"writing the sample videos of step {step}"):
                    if first + place < count and self._writes:
                        self._write(targets[number], video, request, step)
        for text in self.remembered:
            text.forget_encoder()
        seconds = time.perf_counter() - started
        log.info("%d sample videos after step %d: %s (%.1f s)", count, step, folder, seconds)

    @property
    def _writes(self) -> bool:
        """Whether this rank is the first of those that share a model."""
        return all(mesh is None or mesh.get_local_rank() == 0 for mesh in (self.mesh.cp, self.mesh.tp))

    @contextmanager
    def _where_they_were(self) -> Iterator[None]:
        """Encoders may have been offloaded, and a pipeline moves them as it needs them."""
        modules = [m for m in (self.view.ae, self.view.i2v_processor) if isinstance(m, nn.Module)]
        before = [(m, p.device) for m in modules if (p := next(m.parameters(), None)) is not None]
        try:
            yield
        finally:
            for module, device in before:
                module.to(device)

    def _write(self, path: Path, video: torch.Tensor, request: VideoRequest, step: int) -> None:
        """Write a video `[3, T, H, W]` in [-1, 1], over one that is there: of a run that was continued from before."""
        for old in (path, path.with_suffix(".png"), path.with_suffix(".json")):
            old.unlink(missing_ok=True)
        frames = to_frames(video)
        write_video(path, frames, self.file.model.save_fps)
        side_by_side(path.with_suffix(".png"), {f"step {step}: {request.prompt[:80]}": frames}, scale=1)
        write_record(
            path,
            {
                "video": path.name,
                "step": step,
                "prompt": request.prompt,
                "image": image_record(request.first),
                "last_image": image_record(request.last),
                "index": request.index,
                "seed": seed_of(self.file),
                "size": list(frames.shape[:3]),
                "fps": self.file.model.save_fps,
                "inference_file": str(self.job.flags.sample_config),
            },
        )


class _Parts:
    """The model as a pipeline sees it: the trained networks, and the parts around them.

    Attributes:
        view: what the pipeline is given.
        remembered: its text encoders.
        vocabulary: a text encoder, for the check of the tokenizer; None if there is none now.
    """

    def __init__(self, job: TrainingJob, file: GenerationJob, model: SoRAModel) -> None:
        self.job, self.file, self.model = job, file, model
        names = [name for name in file.components if name.split(".")[0] == "text_encoder"]
        self.remembered = [
            RememberedText(self._shared(name), partial(self._built, name))
            for name in sorted(names, key=_place)
        ]
        self.vocabulary = model.text_encoder if all(text.is_live for text in self.remembered) else None
        processor = "ae.i2v_processor"
        self.view = SoRAModel(
            **{name: Live(module) for name, module in model.trained.items()},
            diffusion=build_component(file.components["diffusion"], "cpu", hooks=file.hooks),
            ae=self._shared("ae") or self._built("ae"),
            text_encoder=self.remembered,
            i2v_processor=(self._shared(processor) or self._built(processor))
            if processor in file.components
            else None,
        ).eval()

    def _shared(self, name: str) -> Any:
        """A part of the training job that the file describes alike; None if there is none."""
        ours, theirs = self.job.components.get(name), self.file.components[name]
        if ours is None or not _alike(ours, theirs):
            return None
        head, _, rest = name.partition(".")
        if head == "text_encoder":
            encoders = self.model.text_encoders
            return encoders[_place(name)] if _place(name) < len(encoders) else None
        return getattr(self.model, rest or head)

    def _built(self, name: str) -> Any:
        log.info(
            "%s of --sample-config is not the training job's, and is built beside it, in host memory", name
        )
        return build_component(self.file.components[name], "cpu", hooks=self.file.hooks)


class Live(nn.Module):
    """A network that is trained, seen from a pipeline: it can be called and asked, and moving or switching this moves and
    switches nothing.

    Args:
        module: sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._live = (module,)  # not registered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._live[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._live[0], name)


class RememberedText(nn.Module):
    """A text encoder that encodes each text once, wherever it is, and keeps what it made on the CPU.

    Args:
        encoder: of the training job; None: it is built when it is needed.
        build: makes one.
    """

    def __init__(self, encoder: Any, build: Callable[[], Any]) -> None:
        super().__init__()
        self.is_live = encoder is not None
        self._encoder: tuple[Any, ...] = () if encoder is None else (encoder,)
        self._build = build
        self._known: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    def forget_encoder(self) -> None:
        """Give back the memory of an encoder that was built here."""
        if not self.is_live:
            self._encoder = ()

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, L]` to embeddings `[B, L, D]` and their mask `[B, L]`, on the device of the ids."""
        made = [self._encode(ids, mask) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        embeddings, masks = (torch.stack(parts).to(input_ids.device) for parts in zip(*made, strict=True))
        return embeddings, masks

    def _encode(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = torch.stack([ids, mask]).cpu().numpy().tobytes()
        if key not in self._known:
            if not self._encoder:
                self._encoder = (self._build(),)
            encoder = self._encoder[0]
            device = next(encoder.parameters()).device
            embedding, own_mask = encoder.encode(ids[None].to(device), mask[None].to(device))
            self._known[key] = (embedding[0].cpu(), own_mask[0].cpu())
        return self._known[key]


def _alike(one: ComponentConfig, other: ComponentConfig) -> bool:
    """Whether two sections describe the same part; the number format is the training job's."""
    return (one.spec.id, one.from_pretrained, one.init, dict(one.fields)) == (
        other.spec.id, other.from_pretrained, other.init, dict(other.fields),
    )  # fmt: skip


def _place(name: str) -> int:
    return int(name.partition(".")[2] or 0)


def build_samples(
    job: TrainingJob, model: nn.Module, mesh: ParallelMesh, accelerator: Accelerator, run: Path | None
) -> SampleVideos | None:
    """The sample videos of a job; None where there are none. All ranks call this."""
    if job.samples is None or run is None:
        return None
    assert isinstance(model, SoRAModel)
    return SampleVideos(job, model, mesh, accelerator, run)
