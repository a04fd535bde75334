"""`dataset_type: huggingface`: conversations with images and videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm_core.config.dataset_huggingface import ConversationParameters, HuggingFaceDatasetConfig
from mm_core.data.bad_samples import BadSamples
from mm_core.data.chat.cache import Prepared, PreparedCache
from mm_core.data.chat.collate import ChatCollate, join
from mm_core.data.chat.files import ChatRows, find_files
from mm_core.data.chat.labels import ChatEncoder
from mm_core.data.chat.packing import pack
from mm_core.data.chat.prepare import ConversationSource, prepare
from mm_core.data.chat.protocol import ChatTemplate
from mm_core.data.chat.rows import ConversationReader
from mm_core.data.chat.streaming import ChatStream
from mm_core.data.chat.template import build_template
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_core.random import keyed_generator, keyed_seed

_FORMAT = 1  # of prepared conversations; goes up when what is prepared changes
_DEFAULT_LENGTH = 1024
# Conversations read before training starts; enough to notice wrong keys, few enough for a set of millions.
_READ_AT_START = 16
_BAD_LOOKED_AT = 256  # of those that a cache has as unusable, at most


class ChatDataset(Dataset[dict[str, Tensor]]):
    """Conversations, one to a sequence or several. Map-style; `get(index, key)` names the consumed-sample index.

    An item is `input_ids` and `labels` int64 `[S]` and, with pictures, `mm_token_type_ids`, `pixel_values`,
    `image_grid_thw`, `pixel_values_videos`, `video_grid_thw` (see `ChatInputs`); with `neat_packing` also `document_ids`.

    A conversation that cannot be used is reported once, with file, line, number and the reason. Another one of the set, which
    the seed and `key` determine, takes its place, and a sequence of several does without it; beyond the limit it is an error.

    Args:
        source: all conversations.
        numbers: those of this set.
        encoder: makes samples of them.
        prepared: what is known of `source` beforehand, or None.
        sequences: of each, the places in `numbers` of its conversations; None: each has one.
        documents: whether conversations of one sequence are kept apart.
        limit: `max_bad_samples`.
        name: of the set, for messages.
        seed: the run's seed.

    Attributes:
        validation: the dataset to validate with, or None.
        bad: conversations that cannot be used.
        notes: what is worth a line in the log of a run.

    Raises:
        DataError: more than the limit cannot be used, as far as is known.
    """

    def __init__(
        self,
        source: ConversationSource,
        numbers: np.ndarray,
        encoder: ChatEncoder,
        collate_fn: ChatCollate,
        *,
        prepared: Prepared | None = None,
        sequences: Sequence[Sequence[int]] | None = None,
        documents: bool = True,
        limit: int | float = 0.01,
        name: str = "conversations",
        seed: int = 0,
    ) -> None:
        self.source, self.numbers, self.encoder, self.collate_fn = source, numbers, encoder, collate_fn
        self.prepared, self.documents, self.name, self.seed = prepared, documents, name, seed
        self.sequences = sequences
        self.validation: Dataset[dict[str, Tensor]] | None = None
        self.notes: list[str] = []
        self.bad = BadSamples(len(numbers), limit, name)
        if prepared is not None:
            for place in np.flatnonzero(prepared.lengths[numbers] == 0).tolist():
                where, why = prepared.bad[int(numbers[place])]
                self.bad.add(place, UnreadableSampleError(where, why))
        else:
            self._read_first()

    def __len__(self) -> int:
        return len(self.numbers) if self.sequences is None else len(self.sequences)

    @property
    def tokenizer_size(self) -> int:
        """Number of ids that texts can have; the network must embed them all."""
        return len(self.encoder.template.tokenizer)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.get(index, index)

    def get(self, index: int, key: int) -> dict[str, Tensor]:
        """Return sequence `index`, or its replacement, as the `key`-th that the run consumes.

        Raises:
            DataError: more conversations than the limit cannot be used.
        """
        for candidate in self._candidates(index, key):
            if self.sequences is None:
                sample = self._sample(candidate)
                if sample is not None:
                    return sample
                continue
            samples = list(filter(None, map(self._sample, self.sequences[candidate])))
            if samples:
                return join(samples, documents=self.documents)
        raise DataError(f"{self.name}: none of its {len(self.numbers)} conversations can be read")

    def _sample(self, place: int) -> dict[str, Tensor] | None:
        if place in self.bad:
            return None
        number = int(self.numbers[place])
        try:
            if self.prepared is None:
                return self.encoder.encode(self.source[number])
            kept = self.prepared.kept(number)
            sample = self.prepared.sample(number) or self.encoder.encode(self.source[number], kept)
            if self.sequences is not None and len(sample["input_ids"]) > kept.length:
                raise UnreadableSampleError(
                    self.source.rows.origin(number),
                    "its pictures are larger than when it was prepared; set overwrite_cache: true",
                )
            return sample
        except UnreadableSampleError as error:
            self.bad.add(place, error)
            return None

    def _candidates(self, index: int, key: int) -> Iterator[int]:
        """The sequence itself, then random others, then all."""
        yield index
        for attempt in range(8):
            yield keyed_seed(self.seed, "replacement", key, attempt) % len(self)
        yield from range(len(self))

    def _read_first(self) -> None:
        """Read the first conversations, and go on until one of them can be used; no pixel is read."""
        found = False
        for place, number in enumerate(self.numbers.tolist()):
            if found and place >= _READ_AT_START:
                return
            try:
                self.encoder.fit(self.source[number])
                found = True
            except UnreadableSampleError as error:
                self.bad.add(place, error)


def chat_dataset(
    *, seed: int = 0, sequence_length: int | None = None, **fields: Any
) -> ChatDataset | ChatStream:
    """Build the dataset that `dataset_param` describes.

    Args:
        seed: the run's seed.
        sequence_length: `--seq-length`; None: `cutoff_len`, or 1024.
        fields: those of `HuggingFaceDatasetConfig`.

    Returns:
        A map-style dataset, or with `streaming` an iterable one; its `validation` is a map-style one or None.

    Raises:
        DataError: files, template or cache cannot be used, or none of the conversations.
        pydantic.ValidationError: the fields are not those of `HuggingFaceDatasetConfig`.
    """
    config = HuggingFaceDatasetConfig.model_validate(fields)
    basic = config.basic_parameters
    if sequence_length is not None and basic.cutoff_len not in (None, sequence_length):
        raise DataError(
            f"cutoff_len is {basic.cutoff_len}, but --seq-length {sequence_length}; write one of them"
        )
    cutoff = sequence_length or basic.cutoff_len or _DEFAULT_LENGTH
    builder = _Builder(config, cutoff, seed)
    if basic.streaming:
        dataset: Any = builder.stream()
    else:
        dataset = builder.whole()
    if basic.val_dataset is not None:
        dataset.validation = builder.to_validate(basic.val_dataset, basic.val_max_samples)
    return dataset


class _Builder:
    def __init__(self, config: HuggingFaceDatasetConfig, cutoff: int, seed: int) -> None:
        self.config, self.basic, self.seed, self.cutoff = config, config.basic_parameters, seed, cutoff
        settings = config.preprocess_parameters.effective()
        folder = settings.pop("model_name_or_path")
        self.template: ChatTemplate = build_template(self.basic.template, folder, **settings)
        self.encoder = ChatEncoder(
            self.template,
            cutoff,
            train_on_prompt=self.basic.train_on_prompt,
            mask_history=self.basic.mask_history,
            enable_thinking=self.basic.enable_thinking,
        )
        self.reader = ConversationReader(config.attr, self.basic.dataset_dir)
        tokenizer = self.template.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise DataError(
                f"{folder}: its tokenizer has neither a padding token nor an end token to pad sequences with"
            )
        self.collate = ChatCollate(int(pad))

    def source(self, names: str, limit: int | None, key: str = "dataset") -> ConversationSource:
        files, groups = find_files(names, self.basic.dataset_dir, key)
        return ConversationSource(ChatRows(files, limit, groups), self.reader)

    def whole(self) -> ChatDataset:
        basic = self.basic
        source = self.source(basic.dataset, basic.max_samples)
        numbers, held_back = np.arange(len(source)), np.arange(0)
        if basic.val_rate:
            numbers, held_back = _split(len(source), basic.val_rate, self.seed, self.name)
            held_back = held_back[: basic.val_max_samples]
        dataset = self.dataset(source, numbers, self.name, packed=basic.packs)
        if len(held_back):
            dataset.validation = self.dataset(
                source, held_back, f"{self.name} (held back)", prepared=dataset.prepared
            )
        return dataset

    def to_validate(self, names: str, limit: int | None) -> ChatDataset:
        source = self.source(names, limit, "val_dataset")
        return self.dataset(source, np.arange(len(source)), names)

    def stream(self) -> ChatStream:
        basic = self.basic
        files, groups = find_files(basic.dataset, basic.dataset_dir)
        return ChatStream(
            files,
            self.reader,
            self.encoder,
            self.collate,
            limit=basic.max_samples,
            groups=groups,
            capacity=self.cutoff if basic.packs else None,
            documents=basic.neat_packing,
            max_bad_samples=self.config.max_bad_samples,
            name=self.name,
        )

    @property
    def name(self) -> str:
        return self.basic.dataset

    def dataset(
        self,
        source: ConversationSource,
        numbers: np.ndarray,
        name: str,
        *,
        packed: bool = False,
        prepared: Prepared | None = None,
    ) -> ChatDataset:
        """Validation is not packed: its loss is that of each conversation by itself."""
        basic = self.basic
        if prepared is None and (packed or (basic.cache_dir is not None and not basic.preprocess_on_fly)):
            prepared = self.prepared(source, name)
        sequences, notes = None, []
        if prepared is not None:
            lengths = prepared.lengths[numbers]
            notes.append(
                f"{name}: {int((lengths > 0).sum())} conversations of {int(lengths.sum())} tokens; of all {len(source)} of its "
                f"files, {prepared.shortened} do not fit whole into {self.cutoff} tokens and {len(prepared.bad)} cannot be used"
            )
        if packed and prepared is not None:
            sequences = pack(lengths.tolist(), self.cutoff)
            notes.append(
                f"{name}: {len(sequences)} sequences of at most {self.cutoff} tokens, "
                f"{100 * int(lengths.sum()) / max(1, len(sequences) * self.cutoff):.1f} % of them filled"
            )
        dataset = ChatDataset(
            source,
            numbers,
            self.encoder,
            self.collate,
            prepared=prepared,
            sequences=sequences,
            documents=basic.neat_packing,
            limit=self.config.max_bad_samples,
            name=name,
            seed=self.seed,
        )
        dataset.notes = notes
        return dataset

    def prepared(self, source: ConversationSource, name: str) -> Prepared:
        basic = self.basic
        cached = basic.cache_dir is not None and not basic.preprocess_on_fly
        blocks = prepare(
            source,
            self.encoder,
            tokens=cached,
            at_once=basic.preprocessing_batch_size,
            num_workers=basic.preprocessing_num_workers or 0,
            what=name,
        )
        if not cached or basic.cache_dir is None:
            return Prepared.of(blocks)
        cache = PreparedCache(basic.cache_dir, _fingerprint(source, self.config, self.template, self.cutoff))

        def mended(kept: Prepared) -> bool:
            """Whether one of those that could not be used can be: pictures are no part of the fingerprint."""
            bad = list(kept.bad)
            return any(self.usable(source, number) for number in bad[:: 1 + len(bad) // _BAD_LOOKED_AT])

        return cache.load_or_make(blocks, overwrite=basic.overwrite_cache, outdated=mended)

    def usable(self, source: ConversationSource, number: int) -> bool:
        try:
            self.encoder.prepare(source[number])
        except UnreadableSampleError:
            return False
        return True


def _fingerprint(
    source: ConversationSource, config: HuggingFaceDatasetConfig, template: ChatTemplate, cutoff: int
) -> str:
    """Hexadecimal digest of everything that decides what is prepared."""
    basic: ConversationParameters = config.basic_parameters
    parts = {
        "format": _FORMAT,
        "rows": source.rows.digest,
        "template": (basic.template, template.fingerprint),
        "cutoff": cutoff,
        "labels": (basic.train_on_prompt, basic.mask_history, basic.enable_thinking),
        "attr": config.attr.model_dump(),
        "dataset_dir": str(source.reader.folder.absolute()),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _split(size: int, rate: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers to train with and to validate with, both ascending."""
    held_back = max(1, round(size * rate))
    if held_back >= size:
        raise DataError(
            f"val_rate {rate:g} holds back {held_back} of the {size} conversations of {name}, and none is left to train with"
        )
    order = torch.randperm(size, generator=keyed_generator(seed, "validation")).numpy()
    return np.sort(order[held_back:]), np.sort(order[:held_back])
