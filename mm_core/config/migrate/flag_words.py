"""The words of a command line as flags of `mm train`, with the place and the typed value of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mm_core.config.document import EXTENSIONS
from mm_core.config.findings import Finding, clip
from mm_core.config.flag_help import kind_of
from mm_core.config.flags import TrainFlags
from mm_core.config.migrate.shell_values import Piece, Value, line_of, text_of, unknown_of
from mm_core.config.origin import Origin
from mm_core.config.secrets import HIDDEN, hide, is_secret

_WHOLE = re.compile(r"[+-]?\d+\Z")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\Z")


@dataclass(frozen=True)
class ForeignFlag:
    """One flag of the job.

    Attributes:
        name: the attribute, as in gpt_args: `micro_batch_size`.
        spelling: as it was written.
        written: the words after it, as they were written.
        value: typed as far as the flag is known; text otherwise.
        origin: where the flag stands.
        value_line: where its value was set, if that is another line of the same script.
    """

    name: str
    spelling: str
    written: tuple[str, ...]
    value: Any
    origin: Origin
    value_line: int | None = None

    @property
    def shown(self) -> str:
        """The flag as it was written, without a secret."""
        words = [HIDDEN if is_secret(self.name) else hide(text) for text in self.written]
        return " ".join([self.spelling, *words])


@dataclass
class FlagWords:
    """What the words say. `files` are words that name a combined YAML, `repeated` flags that a later one overrules."""

    flags: dict[str, ForeignFlag] = field(default_factory=dict)
    repeated: list[ForeignFlag] = field(default_factory=list)
    files: list[tuple[str, Origin]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def words_of(argv: Sequence[str]) -> list[Value]:
    """Return the words of a real command line as values."""
    return [(Piece(word, 0),) if word else () for word in argv]


def read_flags(words: Sequence[Value], path: str | None, line: int = 0) -> FlagWords:
    """Pair flags with their values.

    Args:
        path: the script; None for words of the command line itself.
        line: of the command, for words without a place.
    """
    return _Pairing(path, line).pair(list(words))


class _Pairing:
    def __init__(self, path: str | None, line: int) -> None:
        self.path = path
        self.line = line
        self.result = FlagWords()

    def origin(self, value: Value, spelling: str) -> Origin:
        if self.path is None:
            return Origin("flag", detail=spelling)
        return Origin("file", self.path, line_of(value, self.line))

    def add(
        self, value: Value, level: Any, code: str, message: str, *, path: str = "", mend: str = ""
    ) -> None:
        origin = self.origin(value, path)
        self.result.findings.append(Finding.at(origin, level, code, message, path=path, suggestion=mend))

    def pair(self, words: list[Value]) -> FlagWords:
        at = 0
        while at < len(words):
            word = words[at]
            text = text_of(word)
            at += 1
            if not text.startswith("--") or text == "--":
                self._stray(word, text)
                continue
            spelling, equals, _ = text.partition("=")
            unknown = unknown_of(_head(word, len(spelling)))
            if unknown is not None:
                message = f"the flag {clip(spelling)} cannot be known: {unknown.reason}"
                self.add(word, "error", "unknown-value", message, mend=unknown.mend)
                while at < len(words) and not text_of(words[at]).startswith("--"):
                    at += 1  # its value is no mistake of its own
                continue
            name = spelling[2:].replace("-", "_")
            known = TrainFlags.model_fields.get(name)
            kind = kind_of(known) if known is not None else None
            values = [_tail(word, len(spelling) + 1)] if equals else []
            most = 0 if equals or kind is bool else len(words) if kind in (list, None) else 1
            while at < len(words) and len(values) < most and not text_of(words[at]).startswith("--"):
                values.append(words[at])
                at += 1
            self._put(name, spelling, word, values, kind)
        return self.result

    def _stray(self, word: Value, text: str) -> None:
        unknown = unknown_of(word)
        if unknown is not None and len(word) == 1 and unknown.unset:
            message = f"{text}: {unknown.reason}, so it is taken as empty"
            self.add(word, "warning", "unset-variable", message, mend=unknown.mend)
        elif unknown is not None and text in ("$@", "$*"):
            message = f"{text} stands for arguments of the script, which are no part of the job"
            self.add(word, "note", "not-followed", message, mend="Give them: mm migrate SCRIPT FLAGS")
        elif unknown is not None:
            message = f"{clip(text)} cannot be known: {unknown.reason}"
            self.add(word, "error", "unknown-value", message, mend=unknown.mend)
        elif text.lower().endswith(EXTENSIONS):
            self.result.files.append((text, self.origin(word, text)))
        elif text.strip():
            mend = "Values follow a flag: --flag value"
            if text.startswith("#"):
                mend = "Inside quotes a # begins no comment: delete what it comments out"
            message = f'unexpected argument "{clip(text)}"'
            self.add(
                word, "error", "stray-argument", message, path="" if self.path else "command line", mend=mend
            )
        elif self.path is not None:
            mend = "Delete the space behind the backslash"
            message = (
                "a word of spaces: a backslash that is to join lines must be the last character of its line"
            )
            self.add(word, "error", "stray-argument", message, mend=mend)

    def _put(self, name: str, spelling: str, word: Value, values: list[Value], kind: type | None) -> None:
        for value in values:
            unknown = unknown_of(value)
            if unknown is not None:
                shown = clip(hide(text_of(value)))
                message = f"{spelling} is {shown}, which cannot be known: {unknown.reason}"
                elsewhere = f" (line {unknown.line})" if unknown.line != line_of(word, self.line) else ""
                self.add(
                    word, "error", "unknown-value", message, path=spelling, mend=f"{unknown.mend}{elsewhere}"
                )
                return
        texts = [text_of(value) for value in values]
        if (kind is not bool and kind is not None and not texts) or (
            texts and not any(map(str.strip, texts))
        ):
            message = f"{spelling} has no value" if not texts else f"the value of {spelling} is empty"
            self.add(word, "error", "missing-value", message, path=spelling)
            return
        line = line_of(word, self.line)
        lines = {piece.line for value in values for piece in value} - {0, line}
        origin = self.origin(word, spelling)
        flag = ForeignFlag(name, spelling, tuple(texts), typed(kind, texts), origin,
                           min(lines) if self.path and lines else None)  # fmt: skip
        before = self.result.flags.pop(name, None)
        if before is not None:
            self.result.repeated.append(before)
        self.result.flags[name] = flag


def typed(kind: type | None, texts: Sequence[str]) -> Any:
    """Return the value of a flag of one kind (None: the flag is not known). Text that is no such value stays text."""
    if kind is bool:
        return {"true": True, "false": False}.get(texts[0].lower(), texts[0]) if texts else True
    if kind is list:
        return [part for text in texts for part in text.split(",") if part]
    if kind is None:
        if len(texts) == 1:
            return _guess(texts[0])
        return [_guess(text) for text in texts] or True
    text = texts[0]
    if kind is int and _WHOLE.match(text) and len(text) < 30:
        return int(text)
    return _float(text) if kind is float else text


def _guess(text: str) -> Any:
    if _WHOLE.match(text) and len(text) < 30:
        return int(text)
    return _float(text)


def _float(text: str) -> float | str:
    if _NUMBER.match(text) and len(text) < 50:
        value = float(text)
        return value if math.isfinite(value) else text
    return text


def _head(value: Value, length: int) -> Value:
    """Return the pieces of the first `length` characters."""
    pieces = []
    for piece in value:
        if length <= 0:
            break
        pieces.append(piece)
        length -= len(piece.text)
    return tuple(pieces)


def _tail(value: Value, start: int) -> Value:
    """Return a value without its first `start` characters."""
    pieces = []
    for piece in value:
        cut = min(start, len(piece.text))
        start -= cut
        if cut < len(piece.text):
            pieces.append(Piece(piece.text[cut:], piece.line, piece.unknown))
    return tuple(pieces)
