"""Files of conversations: a JSON list of objects, or JSON Lines with one object a line.

A file is indexed once; its rows are read from the disk when they are asked for, so a set of millions takes the memory of
its index, also in every worker. The standard library reads them: a table of columns refuses conversations whose `content`
is a text in one row and a list in another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm_core.config.document import closest_path, expanded
from mm_core.data.errors import DataError, UnreadableSampleError

SUFFIXES = (".json", ".jsonl")
_SPACE = " \t\r\n"
_BOM = b"\xef\xbb\xbf"


@dataclass
class ChatFile:
    """One indexed file.

    Attributes:
        path: of it, as it is found from the working directory.
        begins, sizes: int64 `[rows]`, bytes.
        lines: int64 `[rows]`, from 1.
        digest: of its bytes, hexadecimal.
    """

    path: Path
    begins: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray
    digest: str
    _open: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.begins)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # each process opens the file itself

    def origin(self, row: int) -> str:
        """`chats.json:120 (conversation 17)`: the line, and the row counted from 0."""
        return origin_of(self.path, int(self.lines[row]), row)

    def read(self, row: int) -> Any:
        """Return a row's value.

        Raises:
            UnreadableSampleError: it is no JSON.
        """
        if self._open is None:
            self._open = self.path.open("rb", buffering=0)
        # pread: processes that were forked share the file's position.
        text = os.pread(self._open.fileno(), int(self.sizes[row]), int(self.begins[row]))
        return parse_row(text, self.origin(row))


def origin_of(path: Path, line: int, row: int) -> str:
    return f"{path}:{line} (conversation {row})"


def parse_row(text: bytes, origin: str) -> Any:
    """Return the value of one row.

    Raises:
        UnreadableSampleError: it is no JSON, or no UTF-8.
    """
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(origin, f"it is not UTF-8 text (byte {error.start} of it)") from error
    except json.JSONDecodeError as error:
        raise UnreadableSampleError(
            origin, f"it is no JSON: {error.msg[0].lower()}{error.msg[1:]} at its character {error.pos + 1}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UnreadableSampleError(origin, f"it cannot be read as JSON: {error}") from error


class ChatRows:
    """The rows of several files, one after another.

    Args:
        files: their paths.
        limit: rows that are used of each group of files; None: all.
        groups: how many files each name of `dataset` stood for; None: one each.

    Raises:
        DataError: a file is missing, holds no row, or is no JSON list where it begins as one.
    """

    def __init__(
        self, files: Sequence[Path], limit: int | None = None, groups: Sequence[int] | None = None
    ) -> None:
        self.files = [index_file(path) for path in files]
        self._limit = limit
        self.counts: list[int] = []
        rest = iter(self.files)
        for group in groups or [1] * len(self.files):
            left = limit
            for _ in range(group):
                rows = len(next(rest))
                self.counts.append(rows if left is None else min(rows, left))
                left = None if left is None else left - self.counts[-1]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[ChatFile, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[number], index - (int(self._ends[number - 1]) if number else 0)

    def origin(self, index: int) -> str:
        file, row = self._place(index)
        return file.origin(row)

    def folder(self, index: int) -> Path:
        """Folder of the row's file."""
        return self._place(index)[0].path.parent

    def read(self, index: int) -> Any:
        """Return a row's value.

        Raises:
            UnreadableSampleError: it is no JSON.
        """
        file, row = self._place(index)
        return file.read(row)

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the rows that are used, and of where their files lie (which pictures are found from)."""
        parts = [
            (file.digest, count, str(file.path.parent))
            for file, count in zip(self.files, self.counts, strict=True)
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def find_files(names: str, folder: str, key: str = "dataset") -> tuple[list[Path], list[int]]:
    """Return the files that `dataset` names, and how many each of its names stands for.

    A name is a file or a folder, seen from the working directory or from `dataset_dir`; of a folder the `*.json` and
    `*.jsonl` are used, by name.

    Args:
        names: separated by commas.
        folder: `dataset_dir`.
        key: for messages.

    Raises:
        DataError: one does not exist, or is a folder without such files.
    """
    files: list[Path] = []
    groups: list[int] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        path = next((p for p in (expanded(name), expanded(folder) / name) if p.exists()), None)
        if path is None:
            mend = closest_path(name)
            raise DataError(
                f"{key}: there is no file or folder {name!r}, seen from the working directory or from dataset_dir "
                f"({folder})" + (f". {mend}" if mend else "")
            )
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise DataError(f"{key}: the folder {path} has no file *.json or *.jsonl")
        files += found
        groups.append(len(found))
    if not files:
        raise DataError(f"{key} names no file")
    return files, groups


def is_json_list(path: Path) -> bool:
    """Whether a file begins as a JSON list."""
    with path.open("rb") as file:
        beginning = file.read(4096).removeprefix(_BOM).lstrip(_SPACE.encode())
        while not beginning and (more := file.read(4096)):
            beginning = more.lstrip(_SPACE.encode())
    return beginning.startswith(b"[")


def index_file(path: Path) -> ChatFile:
    """Find the rows of a file.

    Raises:
        DataError: it cannot be read, holds no row, or is no JSON list where it begins as one.
    """
    try:
        rows, digest = _list_rows(path) if is_json_list(path) else _line_rows(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    if not len(table):
        raise DataError(
            f"{path}: it holds no conversation; it must be a JSON list, or have one object a line"
        )
    return ChatFile(path, table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), digest)


def _line_rows(path: Path) -> tuple[list[tuple[int, int, int]], str]:
    """(begin, size, line) of each line that is not blank."""
    rows: list[tuple[int, int, int]] = []
    digest = hashlib.blake2b(digest_size=16)
    begin = 0
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            digest.update(text)
            skipped = len(_BOM) if line == 1 and text.startswith(_BOM) else 0
            if text[skipped:].strip():
                rows.append((begin + skipped, len(text) - skipped, line))
            begin += len(text)
    return rows, digest.hexdigest()


def _list_rows(path: Path) -> tuple[list[tuple[int, int, int]], str]:
    """(begin, size, line) of each item of a JSON list."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    decoder = json.JSONDecoder()
    rows: list[tuple[int, int, int]] = []
    at = text.index("[") + 1
    begin, line, counted = 0, 1, 0  # bytes and lines before the character `counted`
    while True:
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            if rows and text[:at].rstrip(_SPACE).endswith(","):
                raise _broken(path, text, at, "a comma stands before the closing bracket; remove it")
            break
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            short = error.pos >= len(text.rstrip(_SPACE))
            why = "the list is not closed; the file may be cut off" if short else error.msg
            raise _broken(path, text, error.pos, why) from error
        except (RecursionError, ValueError) as error:
            raise _broken(path, text, at, f"it cannot be read as JSON: {error}") from error
        begin, line = begin + _bytes(text, counted, at), line + text.count("\n", counted, at)
        counted = at
        rows.append((begin, _bytes(text, at, end), line))
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            why = "expected a comma or the closing bracket here"
            raise _broken(
                path, text, at, why if at < len(text) else "the list is not closed; the file may be cut off"
            )
    if _skip(text, at + 1) < len(text):
        raise _broken(path, text, at + 1, "there is more after the end of the list")
    return rows, hashlib.blake2b(raw, digest_size=16).hexdigest()


def _bytes(text: str, begin: int, end: int) -> int:
    piece = text[begin:end]
    return len(piece) if piece.isascii() else len(piece.encode())


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _broken(path: Path, text: str, at: int, why: str) -> DataError:
    line = text.count("\n", 0, at) + 1
    return DataError(f"{path}:{line}:{at - text.rfind(chr(10), 0, at)}: {why[0].lower()}{why[1:]}")


def existing(candidates: Iterable[Path]) -> Path | None:
    """Return the first path that is a file."""
    return next((path for path in candidates if path.is_file()), None)
