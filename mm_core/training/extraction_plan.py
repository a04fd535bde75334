"""What `mm extract-features` stores: which clips and captions there are, in which shards, and the index of it all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mm_core.config.extraction_job import ExtractionJob
from mm_core.config.features import FORMAT, INDEX, SAMPLES, VERSION, clip_settings, fingerprint, text_settings
from mm_core.data.errors import DataError
from mm_core.data.feature_store import CLIPS, PROMPTS, Place, sample_row, shard_name
from mm_core.data.selection import Sample
from mm_core.data.t2v import T2VDataset
from mm_core.data.t2v_parts import set_annotations
from mm_core.random import keyed_seed
from mm_core.weights.layout import sync_folder, write_text
from mm_registry.errors import UserError

UNREADABLE, LENGTHS = "unreadable", "lengths"
"""Keys of a shard's metadata, with JSON: items that could not be read, with the reason; how many tokens prompts have with what
follows them.
"""
_ATTEMPTS = 8
"""Draws for each of several clips of a video; a short one may not have so many."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A clip (`sample` and `frames` of it), or a caption.

    Attributes:
        key: a digest of what it is; equal ones are stored once.
        number: among those of its kind.
    """

    key: str
    number: int
    sample: int | None = None
    frames: tuple[int, ...] = ()
    caption: str = ""


@dataclass
class ExtractionPlan:
    """Everything that is to be stored, the same on every rank.

    Attributes:
        clips, prompts: items, each once.
        of_samples: for each sample, the keys of its clips.
        of_captions: caption -> key of its tokens.
        video, text: encoders with fingerprints, and settings; None where that half is not stored.
    """

    clips: list[Item]
    prompts: list[Item]
    of_samples: list[tuple[str, ...]]
    of_captions: dict[str, str]
    video: dict[str, Any] | None
    text: dict[str, Any] | None
    items_per_shard: int

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Kind and number of each shard."""
        return [
            (kind, number)
            for kind, items in ((CLIPS, self.clips), (PROMPTS, self.prompts))
            for number in range(-(-len(items) // self.items_per_shard))
        ]

    def items(self, kind: str, number: int) -> list[Item]:
        """What a shard holds."""
        items = self.clips if kind == CLIPS else self.prompts
        return items[number * self.items_per_shard : (number + 1) * self.items_per_shard]

    def as_json(self) -> dict[str, Any]:
        """What tells this plan from another."""
        keys = hashlib.blake2b(digest_size=16)
        for item in (*self.clips, *self.prompts):
            keys.update(item.key.encode())
        rows = hashlib.blake2b(json.dumps([self.of_samples, self.of_captions]).encode(), digest_size=16)
        return {
            "format": FORMAT,
            "version": VERSION,
            "video": self.video,
            "text": self.text,
            "videos and captions": [keys.hexdigest(), rows.hexdigest()],
            "items per shard": self.items_per_shard,
        }

    def differences(self, other: Any) -> list[str]:
        """In what another plan, as JSON, is not this one."""
        own = self.as_json()
        other = other if isinstance(other, dict) else {}
        return [name for name, value in own.items() if other.get(name) != value]

    @property
    def digest(self) -> str:
        """Of `as_json`."""
        return hashlib.blake2b(
            json.dumps(self.as_json(), sort_keys=True).encode(), digest_size=16
        ).hexdigest()


def plan_extraction(
    job: ExtractionJob, dataset: T2VDataset, clips_per_video: int, items_per_shard: int
) -> ExtractionPlan:
    """Find out which clips and captions a set has. The same video, cut and frames are one clip; captions of the same tokens
    one prompt, whose empty one (`cfg`) is always stored.
    """
    clips, of_samples = _clips(dataset, clips_per_video) if job.video else ([], [()] * len(dataset))
    prompts, of_captions = _prompts(dataset, job) if job.text else ([], {})
    section = job.components["dataset"]
    video = {"encoders": _prints(job, "ae"), "settings": clip_settings(section)} if job.video else None
    text = (
        {"encoders": _prints(job, "text_encoder"), "settings": text_settings(section)} if job.text else None
    )
    return ExtractionPlan(clips, prompts, of_samples, of_captions, video, text, items_per_shard)


def _prints(job: ExtractionJob, head: str) -> dict[str, str]:
    return {name: fingerprint(component) for name, component in sorted(job.encoders(head).items())}


def _clips(dataset: T2VDataset, clips_per_video: int) -> tuple[list[Item], list[tuple[str, ...]]]:
    items: dict[str, Item] = {}
    of_samples = []
    for index, sample in enumerate(dataset.samples):
        keys: dict[str, None] = {}
        for attempt in range(_ATTEMPTS * clips_per_video if clips_per_video > 1 else 1):
            draw = keyed_seed(dataset.seed, "stored_frames", index, attempt)
            frames = tuple(dataset.frames_of(sample, draw))
            annotation = sample.annotation
            # With its size, so that a video which is replaced between two attempts is not taken for the one before.
            size = annotation.path.stat().st_size if annotation.path.exists() else 0
            key = _key("clip", [str(annotation.path), size, annotation.first_frame, annotation.crop, frames])
            items.setdefault(key, Item(key, len(items), index, frames))
            keys[key] = None
            if len(keys) == clips_per_video:
                break
        of_samples.append(tuple(keys))
    return list(items.values()), of_samples


def _prompts(dataset: T2VDataset, job: ExtractionJob) -> tuple[list[Item], dict[str, str]]:
    captions = {"": None}
    for sample in dataset.samples if job.video else _annotated(dataset):
        captions |= dict.fromkeys(sample.annotation.captions)
    items: dict[str, Item] = {}
    of_captions = {}
    for caption in captions:
        tokens = dataset.text(caption)
        key = _key("prompt", [tokens["prompt_ids"].tolist(), tokens["prompt_mask"].tolist()])
        items.setdefault(key, Item(key, len(items), caption=caption))
        of_captions[caption] = key
    return list(items.values()), of_captions


def _annotated(dataset: T2VDataset) -> list[Sample]:
    """All annotations, also those that the rules refuse: with embeddings alone, training applies the rules itself."""
    return [
        Sample(annotation, annotation.num_frames or 0, annotation.fps or 0.0)
        for annotation in set_annotations(dataset.config.basic_parameters)
    ]


def _key(kind: str, parts: Sequence[Any]) -> str:
    return kind[0] + hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def write_index(folder: Path, plan: ExtractionPlan, dataset: T2VDataset) -> None:
    """Look through all shards, and write samples.jsonl, then index.json, which makes the folder complete.

    Raises:
        UserError: a shard is missing or unreadable, tensors do not go together, or no sample is left.
    """
    places: dict[str, Place] = {}
    tensors: dict[str, dict[str, tuple[str, tuple[int | None, ...]]]] = {CLIPS: {}, PROMPTS: {}}
    unreadable, lengths = 0, set()
    for kind, number in plan.shards:
        file = folder / shard_name(kind, number)
        try:
            with safe_open(file, framework="pt") as shard:
                metadata = shard.metadata() or {}
                unreadable += len(json.loads(metadata.get(UNREADABLE, "{}")))
                lengths.update(json.loads(metadata.get(LENGTHS, "[]")))
                for name in shard.keys():  # noqa: SIM118 - no mapping
                    key, _, what = name.rpartition("/")
                    places[key] = (key, number)
                    part = shard.get_slice(name)
                    _merge(
                        tensors[kind], what, _DTYPES.get(part.get_dtype(), "?"), tuple(part.get_shape()), file
                    )
        except Exception as error:  # safetensors has one class for all that may be wrong with a file
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{file}: cannot be read ({error}); remove it, and give the command again"
            ) from error
    if len(lengths) > 1:
        raise UserError(
            f"{folder}: embeddings have {sorted(lengths)} tokens with what follows them; they must have one length"
        )
    text = plan.text
    if text is not None:
        text = {**text, "settings": {**text["settings"], "length": lengths.pop()}}
    rows = _rows(plan, dataset, places)
    if not rows:
        raise DataError(f"{dataset.name}: none of its samples can be read")
    _write(folder, SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    index = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.digest,
        "samples": len(rows),
        "unreadable": unreadable,
        "video": _half(plan.video, tensors[CLIPS]),
        "text": _half(text, tensors[PROMPTS]),
        "empty": None if plan.text is None else list(places[plan.of_captions[""]]),
    }
    _write(folder, INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _half(
    described: dict[str, Any] | None, tensors: Mapping[str, tuple[str, tuple[int | None, ...]]]
) -> dict[str, Any] | None:
    if described is None:
        return None
    return {
        **described,
        "tensors": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in tensors.items()},
    }


def _rows(plan: ExtractionPlan, dataset: T2VDataset, places: Mapping[str, Place]) -> list[dict[str, Any]]:
    """The lines of samples.jsonl: samples of which a clip could be read, or all annotations without clips."""
    rows = []
    for number, sample in enumerate(dataset.samples if plan.video is not None else _annotated(dataset)):
        clips = (
            [places[key] for key in plan.of_samples[number] if key in places]
            if plan.video is not None
            else []
        )
        if plan.video is not None and not clips:
            continue
        captions = sample.annotation.captions if plan.text is not None else ()
        rows.append(sample_row(sample, clips, [places[plan.of_captions[caption]] for caption in captions]))
    return rows


def _merge(
    known: dict[str, tuple[str, tuple[int | None, ...]]],
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    file: Path,
) -> None:
    """Add the shape of one more item: a size is None as soon as two items differ in it, and for tokens always."""
    sizes: tuple[int | None, ...] = (None, *shape[1:]) if name == "prompt" else shape
    if name not in known:
        known[name] = (dtype, sizes)
        return
    before, shapes = known[name]
    if before != dtype or len(shapes) != len(sizes):
        raise UserError(
            f"{file}: {name} is {dtype} with {len(sizes)} dimensions, and {before} with {len(shapes)} elsewhere; remove the "
            "folder and give the command again"
        )
    known[name] = (dtype, tuple(a if a == b else None for a, b in zip(shapes, sizes, strict=True)))


def _write(folder: Path, name: str, text: str) -> None:
    temporary = folder / f".tmp-{name}"
    write_text(temporary, text)
    os.replace(temporary, folder / name)
    sync_folder(folder)
