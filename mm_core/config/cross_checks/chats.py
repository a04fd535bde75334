"""Files of conversations exist, and their first rows have the keys and roles that `attr` names.

Cheap on purpose: `mm_core.data.chat` reads all of it, strictly, when training starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mm_core.config.component import ComponentConfig
from mm_core.config.cross_checks.paths import check_path
from mm_core.config.document import Document, closest_path, expanded
from mm_core.config.findings import Finding, Level, show
from mm_core.config.origin import KeyPath

if TYPE_CHECKING:
    from mm_core.config.dataset_huggingface import ConversationKeys
    from mm_core.config.flags import TrainFlags

_BASIC: KeyPath = ("dataset_param", "basic_parameters")
_FOLDER: KeyPath = ("dataset_param", "preprocess_parameters", "model_name_or_path")
_SUFFIXES = (".json", ".jsonl")
_BUDGET = 8 * 1024 * 1024  # bytes of a JSON list that is read; of JSON Lines the first lines are
_ROWS = 100
_SHOWN = 5
_NOT_OF_STREAMS = ("cache_dir", "preprocessing_num_workers")


def check_chats(document: Document, level: Level = "error") -> Iterator[Finding]:
    """What `dataset` and `val_dataset` name must exist, and so must the folder of tokenizer and chat template; the first rows
    must be conversations. One row that is none is a warning, for training leaves a few out.

    Args:
        document: the data file.
        level: of what training cannot do without.
    """
    basic = document.value(_BASIC) if document.has(_BASIC) else None
    if not isinstance(basic, Mapping) or not isinstance(basic.get("dataset"), str):
        return
    yield from check_path(document, _FOLDER, "folder", level)
    folder = basic.get("dataset_dir", "data")
    keys = _keys(document)
    for key in ("dataset", "val_dataset"):
        names = basic.get(key)
        for name in names.split(",") if isinstance(names, str) and isinstance(folder, str) else ():
            yield from _named(document, (*_BASIC, key), name.strip(), folder, keys, level)
    if basic.get("streaming") is True:
        for key in _NOT_OF_STREAMS:
            if basic.get(key) is not None:
                text = f'"{key}" has no effect here: a stream is prepared while it is read'
                yield Finding.at(
                    document.key_origin((*_BASIC, key)), "note", "no-effect", text, path=(*_BASIC, key)
                )
        place: KeyPath = ("dataloader_param", "shuffle")
        if document.has(place) and document.value(place) is True:
            text = '"shuffle" has no effect here: a stream keeps the order of its files; shuffle those'
            yield Finding.at(document.key_origin(place), "warning", "no-effect", text, path=place)
    elif basic.get("packing") is True and not basic.get("neat_packing"):
        text = "samples that share a sequence see those before them, and are one sample of the loss"
        mend = 'Write "neat_packing": true to keep them apart'
        place = (*_BASIC, "packing")
        yield Finding.at(document.key_origin(place), "note", "packing", text, path=place, suggestion=mend)


def check_sequence_length(
    dataset: ComponentConfig | None, document: Document | None, flags: TrainFlags
) -> Iterator[Finding]:
    """`--seq-length` and the data file must not say two lengths; a dataset without one takes none."""
    key: KeyPath | None = getattr(type(dataset.config) if dataset else None, "sequence_length_key", None)
    if flags.seq_length is None or dataset is None or document is None or dataset.config is None:
        return
    if key is None:
        text = f"it has no effect here: samples are as long as {dataset.label} makes them; mm plan reads it"
        yield Finding.at(
            flags.origin("seq_length"), "note", "no-effect", text, path=flags.spelling("seq_length")
        )
        return
    place = (*dataset.path, *key)
    value = document.value(place) if document.has(place) else None
    if isinstance(value, int) and value != flags.seq_length:
        text = f"{key[-1]} is {value}, but {flags.spelling('seq_length')} is {flags.seq_length}"
        yield Finding.at(
            document.origin(place), "error", "conflict", text, path=place, suggestion="Write one of them"
        )


def _keys(document: Document) -> ConversationKeys | None:
    """`attr`, or None where it has an error, which its class says."""
    from mm_core.config.dataset_huggingface import (
        ConversationKeys,
    )  # the classes of a dataset that few files have

    place: KeyPath = ("dataset_param", "attr")
    written = document.value(place) if document.has(place) else {}
    try:
        return ConversationKeys.model_validate(written)
    except ValidationError:
        return None


def _named(
    document: Document, key: KeyPath, name: str, folder: str, keys: ConversationKeys | None, level: Level
) -> Iterator[Finding]:
    origin = document.origin(key)
    if not name:
        return
    try:
        path = next((p for p in (expanded(name), expanded(folder) / name) if p.exists()), None)
        files = [path] if path is not None else []
        if path is not None and path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    except OSError as error:
        text = f"{key[-1]} is {show(name)}, which cannot be looked at: {error.strerror}"
        yield Finding.at(origin, level, "missing-path", text, path=key)
        return
    if path is None:
        text = f"{key[-1]}: there is no file or folder {show(name)} (seen from the working directory or from {show(folder)})"
        yield Finding.at(origin, level, "missing-path", text, path=key, suggestion=closest_path(name))
    elif not files:
        text = f"{key[-1]}: the folder {show(name)} has no file *.json or *.jsonl"
        yield Finding.at(origin, level, "missing-path", text, path=key)
    for file in files if keys is not None else ():
        assert keys is not None
        yield from _rows(file, keys, (expanded(folder), file.parent, Path()), level)


def _rows(file: Path, keys: ConversationKeys, folders: tuple[Path, ...], level: Level) -> Iterator[Finding]:
    looked, problems = 0, []
    try:
        for number, line, row in _first_rows(file):
            looked += 1
            problem = _problem(row, keys, folders)
            if problem:
                problems.append((line, f"conversation {number}: {problem}"))
    except json.JSONDecodeError as error:
        text = f"it is no JSON: {error.msg[0].lower()}{error.msg[1:]}"
        mend = "A file of conversations is a JSON list, or has one object a line"
        yield Finding(level, "bad-data", text, str(file), error.lineno, error.colno, suggestion=mend)
        return
    except UnicodeDecodeError as error:
        text = f"it is not UTF-8 text (byte {error.start})"
        yield Finding(level, "bad-data", text, str(file), suggestion="Save it as UTF-8")
        return
    except (OSError, RecursionError, ValueError) as error:
        yield Finding(level, "bad-data", f"it cannot be read: {error}", str(file))
        return
    of_all = len(problems) == looked > 0
    for line, problem in problems[: 1 if of_all else _SHOWN]:
        text = f"{problem}; and none of the first {looked} can be used" if of_all and looked > 1 else problem
        yield Finding(level if of_all else "warning", "bad-data", text, str(file), line)


def _first_rows(file: Path) -> Iterator[tuple[int, int | None, Any]]:
    """Yield (number, line, value); a line that is no JSON is one value, which is no object."""
    with file.open("rb") as opened:
        beginning = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        opened.seek(0)
        if beginning.startswith(b"["):
            if file.stat().st_size <= _BUDGET:
                for number, row in enumerate(json.loads(opened.read().decode("utf-8-sig"))[:_ROWS]):
                    yield number, None, row
            return
        number = 0
        for line, text in enumerate(opened, start=1):
            text = text.removeprefix(b"\xef\xbb\xbf").strip()
            if text and number < _ROWS and len(text) <= _BUDGET:
                try:
                    row = json.loads(text.decode())
                except (json.JSONDecodeError, UnicodeDecodeError):
                    row = None
                yield number, line, row
                number += 1
            if number == _ROWS:
                return


def _problem(row: Any, keys: ConversationKeys, folders: tuple[Path, ...]) -> str:
    """What a row lacks, as far as it takes no reading of texts."""
    if not isinstance(row, Mapping):
        return "it is no object in JSON"
    messages = row.get(keys.messages or "")
    if not isinstance(messages, list) or not messages:
        return f'it has no list "{keys.messages}" (attr.messages)'
    tags = {keys.system_tag, keys.user_tag, keys.assistant_tag, keys.observation_tag, keys.function_tag}
    for message in messages:
        tag = message.get(keys.role_tag or "") if isinstance(message, Mapping) else None
        if not isinstance(tag, str) or tag not in tags:
            known = ", ".join(f'"{one}"' for one in sorted(filter(None, tags)))
            return f"a message has the {keys.role_tag} {show(tag)}, and attr knows {known}"
    for key in (keys.images, keys.videos):
        sources = row.get(key) if key is not None else None
        for source in sources if isinstance(sources, list) else [sources]:
            if (
                isinstance(source, str)
                and ":" not in source
                and not any((f / source).is_file() for f in folders)
            ):
                return f"there is no {show(source)}, which it names under {show(key)}"
    return ""
