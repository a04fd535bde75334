"""`dataset_type: t2v`: videos with captions, decoded and tokenised one sample at a time."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mm_core.config.dataset import T2VDatasetConfig
from mm_core.config.document import expanded
from mm_core.data.annotations import Annotation, read_annotations, read_data_list
from mm_core.data.bad_samples import BadSamples
from mm_core.data.cache import ClipCache
from mm_core.data.collate import collate
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_core.data.frames import FrameRule
from mm_core.data.resolution import ResolutionRule
from mm_core.data.text import PromptTokenizer
from mm_core.data.transforms import build_pipeline
from mm_core.data.video import probe, read_frames
from mm_core.random import keyed_seed

logger = logging.getLogger(__name__)

# Files opened before training starts; enough to notice a wrong folder, few enough for a set of millions.
_PROBED_AT_START = 16
# Frames transformed at once: bounds the memory of full-size float frames.
_FRAMES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Sample:
    """An annotation with what the file itself said where the annotation was silent."""

    annotation: Annotation
    frames: int  # from annotation.first_frame on
    fps: float


class T2VDataset(Dataset[dict[str, Any]]):
    """Videos with captions. Map-style; `get(index, key)` keys all randomness by the consumed-sample index.

    An item is `video` float32 `[3, T, H, W]` in [−1, 1], `prompt_ids` and `prompt_mask` int64 `[L]`, and
    `file`. Which frames of a long video, which of several captions and whether the caption is dropped (`cfg`)
    depend on the seed and `key` alone.

    A sample that cannot be read is reported once, with path and reason, and another one of the set, which the
    seed and `key` determine, takes its place; beyond `max_bad_samples` it is an error.

    Args:
        seed: the run's seed.
        fields: the fields of `T2VDatasetConfig`, as in `dataset_param` of data.json.

    Attributes:
        dropped: how many annotations the rules for length and shape refused, by rule.

    Raises:
        DataError: the lists or the tokenizer cannot be read, no sample is left, or none can be read.
        pydantic.ValidationError: the fields are not those of `T2VDatasetConfig`.
    """

    collate_fn = staticmethod(collate)

    def __init__(self, *, seed: int = 0, **fields: Any) -> None:
        config = T2VDatasetConfig.model_validate(fields)
        video = config.preprocess_parameters
        self.config = config
        self.seed = seed
        self.name = config.basic_parameters.data_path
        self.frame_rule = FrameRule(
            num_frames=video.num_frames,
            train_fps=video.train_fps,
            auto_interval=video.auto_interval,
            frame_interval=video.frame_interval,
            speed_factor=video.speed_factor,
            min_num_frames=video.min_num_frames,
            drop_short_ratio=video.drop_short_ratio,
            temporal_stride=video.vae_scale_factor[0],
        )
        self.resolution_rule = ResolutionRule(
            max_height=video.max_height,
            max_width=video.max_width,
            force_resolution=video.force_resolution,
            max_hxw=video.max_hxw,
            min_hxw=video.min_hxw,
            hw_stride=video.hw_stride,
            hw_aspect_thr=video.hw_aspect_thr,
        )
        steps = None if video.train_pipeline is None else video.train_pipeline.video
        self._transform = build_pipeline(steps, self.resolution_rule)
        self._tokenizer = PromptTokenizer(
            config.tokenizer_config.from_pretrained,
            config.tokenizer_config.model_max_length,
            methods=config.text_methods(),
            class_name=config.tokenizer_config.autotokenizer_name,
        )
        self.dropped: Counter[str] = Counter()
        self.samples, unreadable = self._select(_read_annotations(config))
        self.bad = BadSamples(len(self.samples), config.max_bad_samples, self.name)
        for index, error in unreadable:
            self.bad.add(index, error)
        self._probe_first()
        self._cache = ClipCache(config.clip_cache_bytes)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokenizer_size(self) -> int:
        """Number of ids that captions can have; the text encoder must embed them all."""
        return len(self._tokenizer)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index, index)

    def get(self, index: int, key: int) -> dict[str, Any]:
        """Return sample `index`, or its replacement, as the `key`-th sample that the run consumes.

        Raises:
            DataError: more samples than the limit are unreadable.
        """
        for candidate in self._candidates(index, key):
            if candidate in self.bad:
                continue
            try:
                return self._load(self.samples[candidate], key)
            except UnreadableSampleError as error:
                self.bad.add(candidate, error)
        raise DataError(f"{self.name}: none of its {len(self)} samples can be read")

    def _load(self, sample: _Sample, key: int) -> dict[str, Any]:
        frames = self.frame_rule.choose(sample.frames, sample.fps, keyed_seed(self.seed, "frames", key))
        ids, mask = self._tokenizer(self._caption(sample, key))
        return {
            "video": self._clip(sample.annotation, frames),
            "prompt_ids": ids,
            "prompt_mask": mask,
            "file": str(sample.annotation.path),
        }

    def _clip(self, annotation: Annotation, frames: list[int]) -> Tensor:
        """Decode and transform frames, counted from the annotated beginning, to `[3, T, H, W]`."""
        cache_key = (annotation.path, annotation.first_frame, annotation.crop, tuple(frames))
        cached = self._cache.get(cache_key)
        if cached is not None:
            return cached
        indices = [annotation.first_frame + frame for frame in frames]
        decoded = read_frames(annotation.path, indices, threads=_decoder_threads())
        clip: Tensor | None = None
        done = 0
        for frames_at_once in _stacked(decoded, _FRAMES_AT_ONCE):
            piece = self._transform(_crop(frames_at_once, annotation))  # [t, 3, H, W]
            if clip is None:
                clip = torch.empty(3, len(indices), *piece.shape[-2:])
            clip[:, done : done + len(piece)] = piece.permute(1, 0, 2, 3)
            done += len(piece)
        assert clip is not None, "a clip has at least one frame"
        self._cache.put(cache_key, clip)
        return clip

    def _caption(self, sample: _Sample, key: int) -> str:
        dropout = self.config.preprocess_parameters.cfg
        if dropout and _chance(self.seed, "caption_dropout", key) < dropout:
            return ""
        captions = sample.annotation.captions
        return captions[keyed_seed(self.seed, "caption", key) % len(captions)]

    def _candidates(self, index: int, key: int) -> Iterator[int]:
        """The sample itself, then random others, then all."""
        yield index
        for attempt in range(8):
            yield keyed_seed(self.seed, "replacement", key, attempt) % len(self)
        yield from range(len(self))

    def _select(
        self, annotations: list[Annotation]
    ) -> tuple[list[_Sample], list[tuple[int, UnreadableSampleError]]]:
        """Apply the rules for length and shape.

        Also return the samples found unreadable on the way; they stay in the set, to be replaced.
        """
        samples: list[_Sample] = []
        unreadable: list[tuple[int, UnreadableSampleError]] = []
        examples: dict[str, str] = {}
        for number, annotation in enumerate(annotations):
            frames, fps = annotation.num_frames, annotation.fps
            height, width = annotation.height, annotation.width
            if frames is None or fps is None or height is None or width is None:
                try:
                    info = probe(annotation.path)
                except UnreadableSampleError as error:
                    unreadable.append((len(samples), error))
                    samples.append(_Sample(annotation, frames or 1, fps or self.frame_rule.train_fps))
                    continue
                frames = frames or max(1, info.frames - annotation.first_frame)
                fps = fps or info.fps
                height, width = height or info.height, width or info.width
            if annotation.crop is not None:
                left, right, top, bottom = annotation.crop
                height, width = bottom - top, right - left
            chance = _chance(self.seed, "drop_short", number)
            for rule, reason in (
                ("too short", self.frame_rule.short_reason(frames, fps, chance)),
                ("wrong shape", self.resolution_rule.refusal(height, width)),
            ):
                if reason is not None:
                    self.dropped[rule] += 1
                    examples.setdefault(rule, f"{annotation.path}: {reason}")
                    break
            else:
                samples.append(_Sample(annotation, frames, fps))
        self._report_dropped(len(annotations), examples)
        return samples, unreadable

    def _report_dropped(self, total: int, examples: dict[str, str]) -> None:
        dropped = self.dropped.total()
        if not dropped:
            return
        reasons = "; ".join(f"{count} {rule} ({examples[rule]})" for rule, count in self.dropped.items())
        if dropped == total:
            raise DataError(f"{self.name}: none of its {total} samples fits the dataset's rules: {reasons}")
        logger.warning("%s: %d of %d samples are left out: %s", self.name, dropped, total, reasons)

    def _probe_first(self) -> None:
        """Open the first files, and go on until one of them can be read."""
        found = False
        for index, sample in enumerate(self.samples):
            if found and index >= _PROBED_AT_START:
                return
            if index in self.bad:
                continue
            try:
                probe(sample.annotation.path)
                found = True
            except UnreadableSampleError as error:
                self.bad.add(index, error)


def _read_annotations(config: T2VDatasetConfig) -> list[Annotation]:
    """Read a data list (combine) or one annotation file with its videos beside it (standard)."""
    path = expanded(config.basic_parameters.data_path)
    mode = config.basic_parameters.data_storage_mode
    if mode is None:
        mode = "standard" if path.suffix.lower() in (".json", ".jsonl") else "combine"
    return read_data_list(path) if mode == "combine" else read_annotations(path, path.parent)


def _chance(seed: int, purpose: str, index: int) -> float:
    """A uniform number in [0, 1)."""
    return keyed_seed(seed, purpose, index) / 2**64


def _stacked(frames: Iterator[Tensor], at_once: int) -> Iterator[Tensor]:
    """Stack frames `[3, H, W]` to pieces `[T, 3, H, W]` of at most `at_once`, channels last in memory."""
    while piece := list(islice(frames, at_once)):
        yield torch.stack([frame.permute(1, 2, 0) for frame in piece]).permute(0, 3, 1, 2)


def _crop(piece: Tensor, annotation: Annotation) -> Tensor:
    if annotation.crop is None:
        return piece
    left, right, top, bottom = annotation.crop
    height, width = piece.shape[-2:]
    if right > width or bottom > height:
        raise UnreadableSampleError(
            annotation.path,
            f"crop {list(annotation.crop)} ({annotation.origin}) lies outside its {height}×{width} pixels",
        )
    return piece[..., top:bottom, left:right]


def _decoder_threads() -> int:
    """FFmpeg's own choice in the main process; a fair share of the cores in a loader worker."""
    worker = get_worker_info()
    return 0 if worker is None else max(1, (os.cpu_count() or 1) // worker.num_workers)
