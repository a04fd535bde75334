"""The JSON beside a video: what makes the same video again. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm_core.config.document import expanded
from mm_registry.errors import UserError

_EXPERTS = ("predictor", "low_noise_predictor")


@dataclass(frozen=True)
class Recorded:
    """One video's record.

    Attributes:
        source: its inference file, with what the command line said over it.
        overrides: what makes of the file's job that of this one video.
        indices: its number.
        settings: flags of `mm generate` that it was made with, by attribute.
    """

    source: Mapping[str, Any]
    overrides: Mapping[str, Any]
    indices: tuple[int, ...]
    settings: Mapping[str, Any]


def read_recorded(path: str) -> Recorded:
    """Read a record.

    Raises:
        UserError: the file is no record of a video, or an image of it is no longer the same.
    """
    file = expanded(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--repeat {path}: it cannot be read as JSON: {reason}; name the .json beside an .mp4."
        ) from error
    try:
        source, prompt, index = record["inference_file"], record["prompt"], record["index"]
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise _OddValueError("index", index)
        if not isinstance(prompt, str):
            raise _OddValueError("prompt", prompt)
        guidance = record["guidance_scale"]
        settings = {
            "seed": record["seed"],
            "num_inference_steps": record["steps"],
            "guidance_scale": guidance if isinstance(guidance, list) or guidance is None else [guidance],
            "lora_load": record["lora"] or None,
            "ema": record["ema"],
        }
        for key, value in settings.items():
            if not _fits(key, value):
                raise _OddValueError(key, value)
        images = {key: record[key] for key in ("image", "last_image")}
        for key, image in images.items():
            told = isinstance(image, dict) and [image.get("path"), image.get("sha256")]
            if image is not None and not (told and all(isinstance(one, str) for one in told)):
                raise _OddValueError(key, image)
        given = {key: _same(path, image) for key, image in images.items() if image is not None}
        if not isinstance(source, dict):
            raise _OddValueError("inference_file", source)
    except (KeyError, TypeError, _OddValueError) as error:
        why = {KeyError: f"it lacks {error}", _OddValueError: str(error)}.get(
            type(error), "it is no JSON object"
        )
        raise UserError(
            f"--repeat {path}: it is no record of a video that mm generate wrote ({why}); name the .json beside an .mp4."
        ) from None
    # The keys of all videos of the job give way to those of this one.
    source = {key: value for key, value in source.items() if key not in ("image", "last_image", "dual_image")}
    overrides = {
        "prompt": [prompt],
        "num_inference_videos_per_sample": 1,
        "negative_prompt": record.get("negative_prompt"),
        "save_path": str(file.parent),
        "load": _weights(record, source.get("load")),
        **given,
    }
    return Recorded(source, overrides, (index,), settings)


class _OddValueError(Exception):
    """A value of a record that `mm generate` would not have written."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(f"its {key} is {json.dumps(value)[:60]}")


def _weights(record: Mapping[str, Any], load: Any) -> str | list[str] | None:
    """What `--load` named, as the places that were read: of a run, its checkpoint, for the run may have gone on since."""
    told = record.get("weights")
    read = [told.get(name) for name in _EXPERTS] if isinstance(told, Mapping) else []
    first, second = ([place for place in read if isinstance(place, str)] + [None, None])[:2]
    if isinstance(load, str):
        return first
    return [first, second] if isinstance(load, list) and first is not None and second is not None else None


def _fits(setting: str, value: Any) -> bool:
    """Whether a flag could say this; what a record holds was not read by the parser of flags."""
    number, whole = isinstance(value, int | float), isinstance(value, int)
    number, whole = number and not isinstance(value, bool), whole and not isinstance(value, bool)
    match setting:
        case "seed":
            return value is None or whole
        case "num_inference_steps":
            return value is None or (whole and value >= 1)
        case "guidance_scale":
            return value is None or all(_fits("scale", one) for one in value)
        case "scale":
            return number and math.isfinite(value)
        case "lora_load":
            return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))
        case _:
            return value is None or isinstance(value, bool)


def _same(record: str, image: Mapping[str, str]) -> str:
    """The file of a given frame, as it was.

    Raises:
        UserError: it is gone, or has changed.
    """
    path = image["path"]
    try:
        digest = hashlib.sha256(expanded(path).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--repeat {record}: its image {path!r} cannot be read: {reason.lower()}.") from error
    if digest != image["sha256"]:
        raise UserError(
            f"--repeat {record}: its image {path} has changed since, so the video would be another; put the old one back."
        )
    return path
