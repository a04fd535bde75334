"""Annotation files: which videos a set has, and what is said about them.

A data list is a text file of lines `folder,annotation.json`; an annotation file is a JSON list of objects, or
JSON Lines with one object a line, or a table (`mm_core.data.tables`):

    {"path": "a.mp4", "cap": "a caption", "num_frames": 49, "fps": 24,
     "resolution": {"height": 480, "width": 832}}

`path` is a video, or an image, which is a video of one frame. It is meant from `folder`; `folder` and the annotation
file from the working directory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.data.errors import DataError
from mm_core.data.tables import is_table, table_items

_KNOWN = (
    "path",
    "cap",
    "num_frames",
    "fps",
    "duration",
    "resolution",
    "cut",
    "crop",
    "aesthetic",
    "aes",
)
_SPACE = " \t\r\n"
_LARGEST = (
    2**31 - 1
)  # frames, seconds or pixels; larger numbers are mistakes, and overflow what is made of them


@dataclass(frozen=True, slots=True)
class Annotation:
    """One video (or image) and what is said about it.

    Attributes:
        path: the video file.
        captions: one or more; training draws one.
        origin: `file:line` of the annotation.
        num_frames: of the annotated part; with fps, height and width None where the annotation does not say.
        first_frame: where the annotated part begins (`cut`, whose end counts where num_frames is not said).
        crop: (left, right, top, bottom) in pixels of the part to use (`crop`), or None.
    """

    path: Path
    captions: tuple[str, ...]
    origin: str
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    first_frame: int = 0
    crop: tuple[int, int, int, int] | None = None


def read_data_list(path: str | Path) -> list[Annotation]:
    """Read a data list and every annotation file that it names; empty lines and lines starting with `#` are
    skipped.

    Raises:
        DataError: a file is missing or malformed, with file and line.
    """
    path = Path(path)
    annotations: list[Annotation] = []
    for number, raw in enumerate(_read_text(path, "data_path").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        folder, comma, file = (part.strip() for part in line.rpartition(","))
        if not comma or not folder or not file:
            raise DataError(
                f"{path}:{number}: {line!r} is not `folder,annotation.json`; write both, divided by a comma"
            )
        if not Path(folder).is_dir():
            raise DataError(f"{path}:{number}: there is no folder {folder}{_seen_from(folder)}")
        annotations += read_annotations(Path(file), Path(folder), named_at=f"{path}:{number}")
    if not annotations:
        raise DataError(f"{path}: names no sample; write lines of `folder,annotation.json`")
    return annotations


def read_annotations(path: Path, folder: Path, named_at: str = "data_path") -> list[Annotation]:
    """Read one annotation file: a table by the ending of its name (.csv, .parquet), or JSON or JSON Lines (told apart by
    the first character); videos are meant from `folder`.

    Raises:
        DataError: the file is missing or malformed, or an item is; with file, line and, in JSON, column.
    """
    if is_table(path):
        return [_annotation(item, origin, folder) for origin, item in table_items(path, named_at)]
    text = _read_text(path, named_at)
    items = _items(text, path)
    return [_annotation(item, f"{path}:{line}", folder) for line, item in items]


def _read_text(path: Path, named_at: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{named_at}: {str(path)!r} is no name of a file: {error}") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"{named_at}: {path} cannot be read: {reason}{_seen_from(path)}") from error


def _seen_from(path: str | Path) -> str:
    return "" if Path(path).is_absolute() else f" (seen from the working directory {Path.cwd()})"


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each item of a JSON list or of JSON Lines."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at = _skip(text, 0)
    is_list = text[at : at + 1] == "["
    if is_list:
        at = _skip(text, at + 1)
    line, counted = 1, 0
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _json_error(path, text, error.pos, error.msg) from error
        except _DuplicateKeyError as error:
            raise DataError(f"{path}:{line}: {_show(error.key)} is written twice in one object") from error
        except RecursionError as error:
            raise DataError(f"{path}:{line}: brackets are nested too deeply for an annotation") from error
        except ValueError as error:  # an integer of thousands of digits
            raise DataError(f"{path}:{line}: a number cannot be read: {error}") from error
        yield line, item
        at = _skip(text, end)
        if not is_list:
            if at < len(text) and "\n" not in text[end:at]:
                raise _json_error(path, text, at, "expected a line break: JSON Lines hold one object a line")
            continue
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise _json_error(path, text, at, "a comma stands before the closing bracket; remove it")
        elif text[at : at + 1] != "]":
            raise _json_error(path, text, end, "expected a comma or the closing bracket here")
    if is_list:
        if at >= len(text):
            raise _json_error(path, text, len(text), "the list is not closed; the file may be cut off")
        rest = _skip(text, at + 1)
        if rest < len(text):
            raise _json_error(path, text, rest, "there is more after the end of the list")


class _DuplicateKeyError(Exception):
    """An object has a key twice, of which JSON readers silently keep the last."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _json_error(path: Path, text: str, position: int, message: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(f"{path}:{line}:{column}: {message[0].lower()}{message[1:]}")


def _annotation(item: Any, origin: str, folder: Path) -> Annotation:
    if not isinstance(item, Mapping):
        raise DataError(f"{origin}: {_show(item)} is no annotation; expected an object with path and cap")
    _check_keys(item, origin)
    path = item.get("path")
    if not isinstance(path, str) or not path or "\0" in path or not _is_text(path):
        raise DataError(f"{origin}: path is {_show(path)}, but must be the name of a video file")
    num_frames = _number(item, "num_frames", origin)
    fps = _number(item, "fps", origin)
    duration = _number(item, "duration", origin)
    if num_frames is None and fps is not None and duration is not None:
        if fps * duration > _LARGEST:
            raise DataError(
                f"{origin}: fps {fps:g} and duration {duration:g} make more than {_LARGEST} frames"
            )
        num_frames = max(1, round(fps * duration))
    elif num_frames is not None and num_frames < 1:
        raise DataError(f"{origin}: num_frames is {num_frames:g}, but must be at least 1")
    first_frame, cut_frames = _cut(item, origin)
    height, width = _resolution(item, origin)
    return Annotation(
        path=folder / path,
        captions=_captions(item, origin),
        origin=origin,
        num_frames=cut_frames if num_frames is None else int(num_frames),
        fps=fps,
        height=height,
        width=width,
        first_frame=first_frame,
        crop=_crop(item, origin),
    )


def _check_keys(item: Mapping[str, Any], origin: str) -> None:
    """Extra keys are common and harmless, unless one is a misspelling of a key that is missing."""
    for key in item:
        if key in _KNOWN:
            continue
        missing = [known for known in _KNOWN if known not in item]
        close = difflib.get_close_matches(key, missing, n=1, cutoff=0.75)
        if close:
            raise DataError(f'{origin}: {_show(key)} is no key of an annotation; did you mean "{close[0]}"?')
    for key in ("path", "cap"):
        if key not in item:
            raise DataError(f'{origin}: the annotation has no "{key}"')


def _captions(item: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    value = item["cap"]
    captions = (value,) if isinstance(value, str) else value
    if (
        not isinstance(captions, list | tuple)
        or not captions
        or not all(isinstance(c, str) and _is_text(c) for c in captions)
    ):
        raise DataError(f"{origin}: cap is {_show(value)}, but must be a caption or a list of captions")
    return tuple(captions)


def _number(item: Mapping[str, Any], key: str, origin: str) -> float | None:
    value = item.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise DataError(
            f"{origin}: {key} is {_show(value)}, but must be a positive number, at most {_LARGEST}"
        )
    return float(value)


def _integers(item: Mapping[str, Any], key: str, count: int, origin: str) -> list[int]:
    value = item[key]
    good = isinstance(value, list) and len(value) == count
    if not good or not all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _LARGEST for v in value
    ):
        raise DataError(
            f"{origin}: {key} is {_show(value)}, but must be {count} integers from 0 to {_LARGEST}"
        )
    return list(value)


def _resolution(item: Mapping[str, Any], origin: str) -> tuple[int | None, int | None]:
    value = item.get("resolution")
    if value is None:
        return None, None
    if isinstance(value, Mapping):
        sides = [value.get("height"), value.get("width")]
        if all(
            isinstance(side, int) and not isinstance(side, bool) and 0 < side <= _LARGEST for side in sides
        ):
            return sides[0], sides[1]
    raise DataError(
        f'{origin}: resolution is {_show(value)}, but must be {{"height": …, "width": …}} in pixels'
    )


def _cut(item: Mapping[str, Any], origin: str) -> tuple[int, int | None]:
    """The frame at which a part begins, and how many frames it has; None: all that follow."""
    if not item.get("cut"):
        return 0, None
    first, end = _integers(item, "cut", 2, origin)
    if end <= first:
        raise DataError(f"{origin}: cut is {item['cut']}, but must be [first, end] with first < end")
    return first, end - first


def _crop(item: Mapping[str, Any], origin: str) -> tuple[int, int, int, int] | None:
    if not item.get("crop"):
        return None
    left, right, top, bottom = _integers(item, "crop", 4, origin)
    if left >= right or top >= bottom:
        raise DataError(
            f"{origin}: crop is {item['crop']}, but must be [left, right, top, bottom] "
            "with left < right and top < bottom"
        )
    return left, right, top, bottom


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, which a lone half of a surrogate pair (`\\ud800`) cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable() or not _is_text(text):
        text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
