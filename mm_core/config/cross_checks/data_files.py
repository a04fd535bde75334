"""The data files of a job open and have the right shape: the data list, its folders, the beginning of annotations.

Cheap on purpose: `mm_core.data.annotations` reads all of it, strictly, when training starts.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.config.cross_checks.chats import check_chats
from mm_core.config.cross_checks.data_tables import TABLES, check_table
from mm_core.config.document import Document, closest_path, expanded
from mm_core.config.findings import Finding, Level, show
from mm_core.config.origin import KeyPath

_DATA_PATH: KeyPath = ("dataset_param", "basic_parameters", "data_path")
_MODE: KeyPath = ("dataset_param", "basic_parameters", "data_storage_mode")
_ANNOTATIONS = (".json", ".jsonl", *TABLES)
_BUDGET = 8 * 1024 * 1024  # bytes of annotations that are read; larger sets are only read by training
_ITEMS = 100
_FINDINGS = 20
_LINES = 1000


def check_data_files(document: Document, level: Level = "error") -> Iterator[Finding]:
    """What `data_path` names must be a data list or an annotation file that training can read; files of conversations are
    `check_chats`'s.

    Looked at are the lines of the list with their folders, and the first items of annotation files, as long as these
    have no more than 8 MB together. A `data_path` that names no file is `check_path`'s.

    Args:
        document: the data file.
        level: of the findings. They point into the list and the annotation files.
    """
    yield from check_chats(document, level)
    value = document.value(_DATA_PATH) if document.has(_DATA_PATH) else None
    mode = document.value(_MODE) if document.has(_MODE) else None
    if not isinstance(value, str) or mode not in (None, "standard", "combine"):
        return
    reader = _Reader(level)
    try:
        if not expanded(value).is_file():
            return
    except OSError:
        return  # check_path says so
    findings = (
        reader.annotations(value, "") if value.lower().endswith(_ANNOTATIONS) else reader.data_list(value)
    )
    for count, finding in enumerate(findings, start=1):
        yield finding
        if count == _FINDINGS:
            return


@dataclass
class _Reader:
    level: Level
    budget: int = _BUDGET

    def finding(
        self,
        code: str,
        text: str,
        file: str,
        line: int | None = None,
        column: int | None = None,
        mend: str = "",
    ) -> Finding:
        return Finding(self.level, code, text, file, line, column, suggestion=mend)

    def data_list(self, file: str) -> Iterator[Finding]:
        text = yield from self.text(file, file, None)
        if text is None:
            return
        named = 0
        for number, raw in enumerate(text.splitlines()[:_LINES], start=1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            named += 1
            folder, comma, annotations = (part.strip() for part in line.rpartition(","))
            if not comma or not folder or not annotations:
                mend = "Write both, divided by a comma"
                yield self.finding(
                    "bad-data", f"{show(line)} is not `folder,annotation.json`", file, number, 1, mend
                )
                continue
            try:
                there = Path(folder).is_dir()
            except OSError as error:
                yield self.finding(
                    "missing-path", f"{show(folder)} cannot be looked at: {error.strerror}", file, number
                )
                continue
            if not there:
                text = f"there is no folder {show(folder)}{_seen(folder)}"
                yield self.finding("missing-path", text, file, number, 1, closest_path(folder))
            if Path(annotations).is_file():
                yield from self.annotations(annotations, f"{file}:{number}")
            else:
                column = raw.rfind(annotations) + 1
                text = f"there is no annotation file {show(annotations)}{_seen(annotations)}"
                yield self.finding("missing-path", text, file, number, column, closest_path(annotations))
        if not named:
            mend = "Write lines of `folder,annotation.json`"
            yield self.finding("bad-data", "it names no sample", file, mend=mend)

    def annotations(self, file: str, named_at: str) -> Iterator[Finding]:
        if file.lower().endswith(TABLES):
            yield from check_table(file, named_at or file, self.level)
            return
        text = yield from self.text(file, named_at or file, self.budget)
        if text is None:
            return
        self.budget -= len(text)
        at = text.lstrip()[:1]
        if at == "[":
            yield from self.json_list(text, file)
        else:
            yield from self.json_lines(text, file)

    def json_list(self, text: str, file: str) -> Iterator[Finding]:
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            yield self.broken(error, file, error.lineno)
            return
        except (RecursionError, ValueError) as error:
            yield self.finding("bad-data", f"it cannot be read as JSON: {error}", file)
            return
        if not items:
            yield self.finding("bad-data", "it names no sample: the list is empty", file, 1, 1)
        for index, item in enumerate(items[:_ITEMS]):
            problem = _problem(item)
            if problem:
                yield self.finding("bad-data", problem, file, _line_of(text, index))

    def json_lines(self, text: str, file: str) -> Iterator[Finding]:
        if not text.strip():
            yield self.finding("bad-data", "it names no sample: the file is empty", file)
        found = 0
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            found += 1
            if found > _ITEMS:
                return
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                yield self.broken(error, file, number)
                return
            except (RecursionError, ValueError) as error:
                yield self.finding("bad-data", f"it cannot be read as JSON: {error}", file, number)
                return
            problem = _problem(item)
            if problem:
                yield self.finding("bad-data", problem, file, number)

    def broken(self, error: json.JSONDecodeError, file: str, line: int) -> Finding:
        text = f"it is no JSON: {error.msg[0].lower()}{error.msg[1:]}"
        mend = "An annotation file is a list of objects, or one object a line"
        return self.finding("bad-data", text, file, line, error.colno, mend)

    def text(self, file: str, named_at: str, limit: int | None) -> Generator[Finding, None, str | None]:
        """Return a file's text, None if it is too large or cannot be read (which is yielded)."""
        try:
            path = expanded(file)
            if path.stat().st_size > (_BUDGET if limit is None else limit):
                return None
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            text = f"it is not UTF-8 text (byte {error.start})"
            yield self.finding("bad-data", text, file, mend="Save it as UTF-8")
        except OSError as error:
            text = f"{show(file)} cannot be read: {(error.strerror or str(error)).lower()}"
            yield self.finding("bad-data", text, named_at)
        return None


def _problem(item: Any) -> str:
    if not isinstance(item, Mapping):
        return f"{show(item)} is no annotation; expected an object with path and cap"
    for key in ("path", "cap"):
        if key not in item:
            return f'the annotation has no "{key}"'
    path, cap = item["path"], item["cap"]
    if not isinstance(path, str) or not path:
        return f"path is {show(path)}, but must be the name of a video file"
    captions = [cap] if isinstance(cap, str) else cap
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        return f"cap is {show(cap)}, but must be a caption or a list of captions"
    return ""


def _line_of(text: str, index: int) -> int:
    """Return the line of an item of a JSON list that can be read."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for number in range(index + 1):
        while text[at] in " \t\r\n,":
            at += 1
        if number < index:
            _, at = decoder.raw_decode(text, at)
    return text.count("\n", 0, at) + 1


def _seen(path: str) -> str:
    return "" if Path(path).is_absolute() else " (seen from the working directory)"
