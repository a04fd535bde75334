"""Stored features: what a folder of them says about itself, and what tells one encoder from another. Imports no torch.

`mm extract-features` writes latents and embeddings into safetensors shards, beside an `index.json`, which says what they were
made with, and a `samples.jsonl` with a line for each sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.config.component import ComponentConfig
from mm_core.config.document import expanded
from mm_registry.errors import UserError

INDEX = "index.json"
SAMPLES = "samples.jsonl"
FORMAT = "mm-features"
VERSION = 1
STORED = "sorafeatured"
"""`data_storage_mode` of a dataset whose `data_path` is such an index."""

CONDITION = "conditions."
"""Before the names of stored conditions, in shards and in batches: what a predictor is given beside latents and text."""

_LARGEST = 16 * 1024 * 1024  # bytes of an index
_MOST_TOKENS = 2**20  # of a caption; a larger length is a mistake, and would be room for zeros in each sample
_BLOCK = 64 * 1024
_BLOCKS = 16
_NOT_OF_A_CLIP = frozenset({"cfg", "seed"})  # of preprocess_parameters
_NESTED = frozenset({"i2v_processor"})  # sections inside a section that are components themselves


@dataclass(frozen=True, slots=True)
class Stored:
    """What one half of a folder, latents or embeddings, was made with.

    Attributes:
        encoders: name of each component -> its fingerprint.
        settings: of data.json, as far as the tensors depend on them.
        tensors: name -> dtype as torch calls it, and the shape of one sample, None where it varies.
    """

    encoders: Mapping[str, str]
    settings: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int | None, ...]]]


@dataclass(frozen=True, slots=True)
class FeatureIndex:
    """An `index.json`.

    Attributes:
        video, text: what was stored; None where that half was not.
        samples: lines of samples.jsonl.
        plan: digest of what was to be stored.
        empty: the line that stands for no caption, for `cfg`: key and shard.
    """

    path: Path
    video: Stored | None
    text: Stored | None
    samples: int
    plan: str
    empty: tuple[str, int] | None = None


def read_index(path: str | Path) -> FeatureIndex:
    """Read the index of a folder of features.

    Raises:
        UserError: it cannot be read, or is no such index.
    """
    place = expanded(str(path))
    try:
        if place.stat().st_size > _LARGEST:
            raise UserError(f"{path}: is too large for the index of stored features")
        data = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(
            f"{path}: is no index of stored features; `mm extract-features` writes one, {INDEX}, as its last file"
        )
    version = data.get("version")
    if version != VERSION or isinstance(version, bool):  # True equals 1
        raise UserError(
            f"{path}: has version {version} of the format, and this installation reads {VERSION}; "
            "make the features again"
        )
    try:
        empty = data["empty"]
        return FeatureIndex(
            place, _half(data["video"], "latents"), _text_half(data["text"]), int(data["samples"]), str(data["plan"]),
            None if empty is None else (str(empty[0]), int(empty[1])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); make the features again") from error


def _half(data: Any, needed: str) -> Stored | None:
    """One half of an index, of whose tensors `needed` must be one."""
    if data is None:
        return None
    if needed not in data["tensors"]:
        raise KeyError(needed)
    tensors = {
        str(name): (str(one["dtype"]), tuple(None if size is None else int(size) for size in one["shape"]))
        for name, one in data["tensors"].items()
    }
    return Stored(dict(data["encoders"]), dict(data["settings"]), tensors)


def _text_half(data: Any) -> Stored | None:
    stored = _half(data, "prompt")
    if stored is not None:
        length = stored.settings["length"]
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= _MOST_TOKENS:
            raise ValueError(f"length {length!r}")
    return stored


def clip_settings(dataset: ComponentConfig) -> dict[str, Any]:
    """What decides the clip of a video: `preprocess_parameters`, as JSON has them."""
    fields = dataset.fields.get("preprocess_parameters") or {}
    return _plain({name: value for name, value in fields.items() if name not in _NOT_OF_A_CLIP})


def text_settings(dataset: ComponentConfig) -> dict[str, Any]:
    """What decides the tokens of a caption: cleaning, length and tokenizer, as JSON has them."""
    fields = dataset.fields
    tokenizer = dict(fields.get("tokenizer_config") or {})
    folder = tokenizer.pop("from_pretrained", None)
    names = ("enable_text_preprocessing", "text_preprocess_methods")
    return _plain(
        {
            **{name: fields[name] for name in names if name in fields},
            "model_max_length": tokenizer.get("model_max_length"),
            "tokenizer": None if folder is None else _content(folder),
        }
    )


def fingerprint(component: ComponentConfig) -> str:
    """A digest of what an encoder computes: its id and fields, and the folders of weights that these name.

    Folders count by the names, sizes and spread blocks of their files, not by where they lie: two copies are one encoder. It
    reads less than 2 MB of a file, so a change of a few weights may be missed; another training of them is not.
    """
    fields = {name: value for name, value in component.fields.items() if name not in _NESTED}
    weights = component.from_pretrained if component.init == "pretrained" else None
    parts = {
        "role": component.role,
        "id": component.spec.id,
        "distribution": component.spec.distribution,
        "dtype": component.dtype,
        "init": component.init,
        "fields": _plain(fields, folders=True),
        "weights": None if weights is None else _content(weights),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(value: Any, *, folders: bool = False) -> Any:
    """As JSON has it; with `folders` a text that names a folder becomes a digest of what is in it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one, folders=folders) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, folders=folders) for one in value]
    if isinstance(value, str) and folders:
        return _content(value) or value
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _content(folder: str) -> str | None:
    """A digest of the files of a folder, None if there is no such folder."""
    place = expanded(folder)
    try:
        if not folder or not place.is_dir():
            return None
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(one for one in place.iterdir() if one.is_file() and not one.name.startswith(".")):
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for number in range(_BLOCKS):
                    stream.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
                    if size <= _BLOCK:
                        break
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    return digest.hexdigest()
