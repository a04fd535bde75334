"""Stored features: the latents and embeddings that `mm extract-features` wrote, read sample by sample."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_core.config.features import SAMPLES, FeatureIndex, Stored, read_index
from mm_core.data.annotations import Annotation
from mm_core.data.buckets import ClipShape
from mm_core.data.errors import DataError
from mm_core.data.selection import Sample

CLIPS, PROMPTS = "clips", "prompts"
_OPEN = 16  # shards that a process keeps open

Place = tuple[str, int]
"""Key of an item, and number of the shard that holds it."""


@dataclass(frozen=True, slots=True)
class _Row:
    sample: Sample
    clips: tuple[Place, ...]


def shard_name(kind: str, number: int) -> str:
    """File name of a shard of `CLIPS` or `PROMPTS`."""
    return f"{kind}-{number:06d}.safetensors"


class FeatureStore:
    """A folder of stored features; tensors are read when they are asked for, by any process.

    Args:
        path: of its index.json.

    Attributes:
        samples: as a `t2v` dataset has them, in the order of the set that the features were made from.

    Raises:
        DataError: the index or its list of samples cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.index: FeatureIndex = read_index(path)
        self.folder = self.index.path.parent
        self._prompts: dict[str, Place] = {}
        if self.index.empty is not None:
            self._prompts[""] = self.index.empty
        self._rows = self._read_rows()
        self.samples = [row.sample for row in self._rows]
        self._open: OrderedDict[str, Any] = OrderedDict()

    @property
    def has_video(self) -> bool:
        """Whether clips are stored, as latents."""
        return self.index.video is not None

    @property
    def has_text(self) -> bool:
        """Whether captions are stored, as embeddings."""
        return self.index.text is not None

    def clip(self, number: int, draw: int) -> dict[str, Tensor]:
        """One of the stored clips of sample `number`: `latents` `[C, T', h, w]`, and its conditions by `CONDITION` + name.

        Args:
            draw: any number; it chooses, where several were stored.

        Raises:
            DataError: the shard cannot be read, or does not have what the index says.
        """
        clips = self._rows[number].clips
        assert self.index.video is not None, "the store has no clips"
        return self._read(CLIPS, clips[draw % len(clips)], self.index.video)

    def prompt(self, caption: str) -> dict[str, Tensor]:
        """The embeddings of a caption of the set, or of "": `prompt` `[L, D]`, and `prompt_mask` int64 `[L]`.

        Stored are the tokens alone; what follows them is zeros, which the mask says.

        Raises:
            DataError: as `clip`.
        """
        assert self.index.text is not None, "the store has no embeddings"
        place = self._prompts.get(caption)
        if place is None:
            raise DataError(
                f"{self.index.path}: has no embedding of the caption {caption!r}; make the features again"
            )
        stored = self._read(PROMPTS, place, self.index.text)
        length = int(self.index.text.settings["length"])
        tokens = stored["prompt"]  # [tokens, D]
        if len(tokens) > length:
            raise DataError(
                f"{self.index.path}: says that embeddings have {length} tokens, but the caption {caption!r} has {len(tokens)}; "
                "make the features again"
            )
        prompt = tokens.new_zeros(length, tokens.shape[1])
        prompt[: len(tokens)] = tokens
        return {"prompt": prompt, "prompt_mask": (torch.arange(length) < len(tokens)).long()}

    def _read(self, kind: str, place: Place, stored: Stored) -> dict[str, Tensor]:
        key, number = place
        name = shard_name(kind, number)
        try:
            file = self._shard(name)
            tensors = {one: file.get_tensor(f"{key}/{one}") for one in stored.tensors}
        except (OSError, SafetensorError) as error:
            text = " ".join(str(error).split())
            raise DataError(
                f"{self.folder / name}: {key} cannot be read ({text}); `mm extract-features`, as before, makes the file again"
                " if it is lost or cut off, and else once you have removed it"
            ) from error
        for one, tensor in tensors.items():
            dtype, shape = stored.tensors[one]
            fits = len(shape) == tensor.ndim and all(
                size in (None, has) for size, has in zip(shape, tensor.shape, strict=True)
            )
            if str(tensor.dtype).removeprefix("torch.") != dtype or not fits:
                raise DataError(
                    f"{self.folder / name}: {one} of {key} is {tensor.dtype} {list(tensor.shape)}, but the index says {dtype} "
                    f"{list(shape)}; make the features again"
                )
        return tensors

    def _shard(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        self._open[name] = safe_open(self.folder / name, framework="pt")
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each process opens its own

    def _read_rows(self) -> list[_Row]:
        file = self.folder / SAMPLES
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is damaged ({error}); make the features again") from error
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read: {(error.strerror or str(error)).lower()}; make the features again"
            ) from error
        if len(lines) != self.index.samples:
            raise DataError(
                f"{file}: has {len(lines)} samples, but {self.index.path} says {self.index.samples}; make the features again"
            )
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(self._row(json.loads(line), f"{file}:{number}"))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise DataError(
                    f"{file}:{number}: is damaged ({error!r}); make the features again"
                ) from error
        return rows

    def _row(self, data: Mapping[str, Any], origin: str) -> _Row:
        _check_row(data)
        captions = tuple(data["captions"])
        if self.has_text:
            self._prompts.update(
                (caption, (str(key), int(shard)))
                for caption, (key, shard) in zip(captions, data["prompts"], strict=True)
            )
        clips = tuple((str(key), int(shard)) for key, shard in data["clips"])
        if self.has_video and not clips:
            raise ValueError("no clip")
        crop = data["crop"]
        annotation = Annotation(
            Path(data["path"]), captions, origin,
            num_frames=data["frames"], fps=data["fps"], height=data["height"], width=data["width"],
            first_frame=data["first_frame"], crop=None if crop is None else tuple(crop),
        )  # fmt: skip
        shape = data["shape"]
        clip = None if shape is None else ClipShape(*shape)
        if clip is not None and not all(type(size) is int and size > 0 for size in clip):
            raise ValueError(f"shape {shape}")
        return _Row(Sample(annotation, data["frames"] or 0, data["fps"] or 0.0, clip), clips)


def _check_row(data: Mapping[str, Any]) -> None:
    """The plain values of a line; a later use of a wrong one would not say where it comes from.

    Raises:
        ValueError, KeyError, TypeError: one is of another kind.
    """
    if not isinstance(data["path"], str):
        raise ValueError(f"path {data['path']!r}")
    if not isinstance(data["captions"], list) or not all(isinstance(one, str) for one in data["captions"]):
        raise ValueError(f"captions {data['captions']!r}")
    crop = [] if data["crop"] is None else data["crop"]
    if not isinstance(crop, list) or len(crop) not in (0, 4):
        raise ValueError(f"crop {crop!r}")
    counts = [data[name] for name in ("frames", "height", "width") if data[name] is not None]
    for value in (*counts, data["first_frame"], *crop):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{value!r} is no count of frames or pixels")
    fps = data["fps"]
    if fps is not None and (
        not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf")
    ):
        raise ValueError(f"fps {fps!r}")


def sample_row(sample: Sample, clips: list[Place], prompts: list[Place]) -> dict[str, Any]:
    """A line of samples.jsonl, which `FeatureStore` reads."""
    annotation = sample.annotation
    return {
        "path": str(annotation.path),
        "captions": list(annotation.captions),
        "frames": sample.frames or None,
        "fps": sample.fps or None,
        "height": annotation.height,
        "width": annotation.width,
        "first_frame": annotation.first_frame,
        "crop": None if annotation.crop is None else list(annotation.crop),
        "shape": None if sample.shape is None else list(sample.shape),
        "clips": [list(place) for place in clips],
        "prompts": [list(place) for place in prompts],
    }
