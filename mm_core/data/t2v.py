"""`dataset_type: t2v`: videos with captions, decoded and tokenised one sample at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

from mm_core.config.dataset import T2VDatasetConfig
from mm_core.config.features import STORED
from mm_core.data.annotations import Annotation
from mm_core.data.bad_samples import BadSamples
from mm_core.data.buckets import ClipShape
from mm_core.data.clips import ClipReader
from mm_core.data.collate import collate
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_core.data.feature_store import FeatureStore
from mm_core.data.first_frame import first_frame_transform
from mm_core.data.held_back import split
from mm_core.data.inspection import Inspected
from mm_core.data.media_files import probe_file
from mm_core.data.selection import Refused, Sample, Unreadable
from mm_core.data.t2v_parts import (
    inspected_set,
    prompt_tokenizer,
    selection_rules,
    set_annotations,
    transform_steps,
)
from mm_core.data.transforms import build_pipeline
from mm_core.random import keyed_seed

logger = logging.getLogger(__name__)

# Files opened before training starts; enough to notice a wrong folder, few enough for a set of millions.
_PROBED_AT_START = 16

_Unreadables: TypeAlias = Sequence[tuple[int, UnreadableSampleError]]


class T2VDataset(Dataset[dict[str, Any]]):
    """Videos with captions. Map-style; `get(index, key)` keys all randomness by the consumed-sample index.

    An item is `video` float32 `[3, T, H, W]` in [−1, 1], `prompt_ids` and `prompt_mask` int64 `[L]`, and
    `file`. Which frames of a long video, which of several captions and whether the caption is dropped (`cfg`)
    depend on the seed and `key` alone. Of stored features (`sorafeatured`) it has `latents` `[C, T', h, w]` and conditions
    instead of `video`, `prompt` `[L, D]` instead of `prompt_ids`, or both.

    A sample that cannot be read is reported once, with path and reason, and another one of the set, which the
    seed and `key` determine, takes its place; beyond `max_bad_samples` it is an error.

    Args:
        seed: the run's seed.
        fields: the fields of `T2VDatasetConfig`, as in `dataset_param` of data.json.

    Attributes:
        dropped: how many annotations the rules for length and shape refused, by rule.
        store: the stored features, if `data_path` names some.
        validation: the set that is validated with (`val_data_path` or `val_rate`); else None.

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
        self.rules = selection_rules(video, seed)
        transform = build_pipeline(transform_steps(video), self.rules.resolution)
        self._clips = ClipReader(transform, config.clip_cache_bytes)
        steps = None if video.train_pipeline is None else video.train_pipeline.first_frame_vae
        self._first_frame = first_frame_transform(steps)
        stored = config.basic_parameters.data_storage_mode == STORED
        self.store = FeatureStore(config.basic_parameters.data_path) if stored else None
        self._tokenizer = None if self.store is not None and self.store.has_text else prompt_tokenizer(config)
        self.dropped: Counter[str] = Counter()
        self.samples, unreadable = self._all_samples()
        # Where each sample stands among all, which stored features are numbered by.
        self._places: Sequence[int] = range(len(self.samples))
        self.validation = self._validation(fields, unreadable)
        self._members: dict[ClipShape | None, list[int]] | None = None
        self.bad = self._bad_among(unreadable)
        if self.store is None or not self.store.has_video:
            self._probe_first()

    @staticmethod
    def inspected(seed: int = 0, **fields: Any) -> Inspected:
        """Return what `mm data inspect` looks at; no file of the set is opened yet.

        Raises:
            DataError: the lists cannot be read.
        """
        return inspected_set(T2VDatasetConfig.model_validate(fields), seed)

    def __len__(self) -> int:
        return len(self.samples)

    def bucket(self, index: int) -> ClipShape | None:
        """Return the shape of sample `index`'s clips; of one that cannot be read, that of those that replace it.

        Samples of one bucket can share a micro batch.
        """
        return self.samples[index].shape

    @property
    def tokenizer_size(self) -> int | None:
        """Number of ids that captions can have; the text encoder must embed them all. None if embeddings are stored."""
        return None if self._tokenizer is None else len(self._tokenizer)

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
                return self._load(candidate, key)
            except UnreadableSampleError as error:
                self.bad.add(candidate, error)
        raise DataError(f"{self.name}: none of its {len(self)} samples can be read")

    def frames_of(self, sample: Sample, draw: int) -> list[int]:
        """The frames of a sample's clip, counted from its beginning; of a longer video any number draws which."""
        return [0] if sample.image else self.rules.frames.choose(sample.frames, sample.fps, draw)

    def pixels(self, sample: Sample, frames: Sequence[int]) -> dict[str, Tensor]:
        """What the autoencoder and what makes conditions are given: `video` `[3, T, H, W]`, and `first_frame` `[3, H, W]`
        where `first_frame_vae` makes another one of it.

        Raises:
            UnreadableSampleError: the file cannot be read, or is not what its annotation says.
        """
        clip = self._clips.read(sample.annotation, frames)
        if sample.shape is not None and tuple(clip.shape[1:]) != sample.shape:
            made = "×".join(map(str, clip.shape[1:]))
            raise UnreadableSampleError(
                sample.annotation.path,
                f"its annotation ({sample.annotation.origin}) promises a clip of {sample.shape} (frames × height × width), "
                f"but it gives one of {made}; correct the resolution there, or leave it out",
            )
        if self._first_frame is None:
            return {"video": clip}
        return {"video": clip, "first_frame": self._first_frame(clip[:, :1].permute(1, 0, 2, 3))[0]}

    def text(self, caption: str) -> dict[str, Tensor]:
        """What the text encoder is given, `prompt_ids` and `prompt_mask`; of stored embeddings what it would return."""
        if self._tokenizer is None:
            assert self.store is not None, "without a tokenizer there are stored embeddings"
            return self.store.prompt(caption)
        ids, mask = self._tokenizer(caption)
        return {"prompt_ids": ids, "prompt_mask": mask}

    def _load(self, index: int, key: int) -> dict[str, Any]:
        sample, draw = self.samples[index], keyed_seed(self.seed, "frames", key)
        if self.store is not None and self.store.has_video:
            shown = self.store.clip(self._places[index], draw)
        else:
            shown = self.pixels(sample, self.frames_of(sample, draw))
        return {**shown, **self.text(self._caption(sample, key)), "file": str(sample.annotation.path)}

    def _caption(self, sample: Sample, key: int) -> str:
        dropout = self.config.preprocess_parameters.cfg
        if dropout and _chance(self.seed, "caption_dropout", key) < dropout:
            return ""
        captions = sample.annotation.captions
        return captions[keyed_seed(self.seed, "caption", key) % len(captions)]

    def _candidates(self, index: int, key: int) -> Iterator[int]:
        """The sample itself, then random others of its bucket, then all of it, then all."""
        yield index
        alike = self._alike(self.bucket(index))
        for attempt in range(8):
            yield alike[keyed_seed(self.seed, "replacement", key, attempt) % len(alike)]
        yield from alike
        yield from range(len(self))

    def _alike(self, bucket: ClipShape | None) -> Sequence[int]:
        """Indices of the samples of a bucket, in their order; made when first asked for: few sets need it."""
        if self._members is None:
            self._members = {}
            for index in range(len(self)):
                self._members.setdefault(self.bucket(index), []).append(index)
        return self._members[bucket]

    def _validation(self, fields: Mapping[str, Any], unreadable: _Unreadables) -> T2VDataset | None:
        """The set that is validated with, none of whose captions is dropped; samples of this one are taken out of it."""
        basic, video = self.config.basic_parameters, self.config.preprocess_parameters
        if basic.val_data_path is None and not basic.val_rate:
            return None
        if basic.val_data_path is not None:
            other_fields = {
                "basic_parameters": basic.of_validation(),
                "preprocess_parameters": {**fields.get("preprocess_parameters", {}), "cfg": 0.0},
            }
            other = T2VDataset(seed=self.seed, **{**fields, **other_fields})
            other._keep(range(len(other)), basic.val_max_samples, ())
            return other
        kept, held_back = split(len(self), basic.val_rate or 0.0, self.seed, self.name)
        other = copy(self)
        other.name = f"the validation samples of {self.name}"
        other.config = self.config.model_copy(
            update={"preprocess_parameters": video.model_copy(update={"cfg": 0.0})}
        )
        other._keep(held_back, basic.val_max_samples, unreadable)
        self._keep(kept, None, unreadable)
        return other

    def _keep(self, numbers: Sequence[int], most: int | None, unreadable: _Unreadables) -> None:
        """Have these samples only, or the first of them."""
        self.samples = [self.samples[number] for number in numbers[:most]]
        self._places = [self._places[number] for number in numbers[:most]]
        self._members, self.validation = None, None
        self.bad = self._bad_among(unreadable)

    def _bad_among(self, unreadable: _Unreadables) -> BadSamples:
        bad = BadSamples(len(self.samples), self.config.max_bad_samples, self.name)
        now = {place: index for index, place in enumerate(self._places)}
        for place, error in unreadable:
            if place in now:
                bad.add(now[place], error)
        return bad

    def _all_samples(self) -> tuple[list[Sample], list[tuple[int, UnreadableSampleError]]]:
        if self.store is None:
            return self._select(set_annotations(self.config.basic_parameters))
        if not self.store.has_video:
            return self._select([sample.annotation for sample in self.store.samples])
        return self.store.samples, []  # the rules were applied when the features were made

    def _select(
        self, annotations: list[Annotation]
    ) -> tuple[list[Sample], list[tuple[int, UnreadableSampleError]]]:
        """Apply the rules for length and shape.

        Also return the samples found unreadable on the way; they stay in the set, to be replaced.
        """
        samples: list[Sample] = []
        unreadable: list[tuple[int, UnreadableSampleError]] = []
        examples: dict[str, str] = {}
        for found in self.rules.judged(annotations):
            if isinstance(found, Refused):
                self.dropped[found.rule] += 1
                examples.setdefault(found.rule, f"{found.annotation.path}: {found.reason}")
            elif isinstance(found, Unreadable):
                unreadable.append((len(samples), found.error))
                samples.append(found.sample)
            else:
                samples.append(found)
        self._report_dropped(len(annotations), examples)
        readable = [sample.shape for sample in samples if sample.shape is not None] if unreadable else []
        if readable:  # as often as there are readable samples of a shape
            for index, _ in unreadable:
                shape = readable[keyed_seed(self.seed, "stand_in", index) % len(readable)]
                samples[index] = replace(samples[index], shape=shape)
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
                probe_file(sample.annotation.path)
                found = True
            except UnreadableSampleError as error:
                self.bad.add(index, error)


def _chance(seed: int, purpose: str, index: int) -> float:
    """A uniform number in [0, 1)."""
    return keyed_seed(seed, purpose, index) / 2**64
