"""Values of a shell script: text whose every piece knows its line, with what cannot be known kept apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from mm_core.config.document import syntax_error
from mm_core.config.migrate.shell_arithmetic import ArithmeticShellError, evaluate
from mm_core.config.migrate.shell_words import Part, Word

#: One value beyond this is no flag of a job (`A=$A$A`, over and over).
_MAX_VALUE = 65_536
#: So is a script that makes more text than this of what is written.
_MAX_TOTAL = 8 * 2**20
_MAX_WORDS = 10_000
_NAME = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a piece cannot be known without running the script (a part of a sentence), and how to mend it."""

    reason: str
    line: int
    mend: str = ""
    #: Nothing sets the variable: bash would take it as empty.
    unset: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    line: int
    unknown: Unknown | None = None


#: One text. Its unknown pieces show their source, such as `$(date)`.
Value: TypeAlias = tuple[Piece, ...]


def text_of(value: Value) -> str:
    return "".join(piece.text for piece in value)


def unknown_of(value: Value) -> Unknown | None:
    """Return the first thing in a value that cannot be known."""
    return next((piece.unknown for piece in value if piece.unknown is not None), None)


def line_of(value: Value, default: int) -> int:
    return next((piece.line for piece in value if piece.text), default)


@dataclass
class Variables:
    """What a script has set so far.

    Attributes:
        given: values that the user gave for this reading; they win over what the script sets.
        sourced: line and name of the files that the script reads with `source`: unset names may come from them.
    """

    path: str
    given: Mapping[str, str]
    known: Mapping[str, str]
    values: dict[str, Value] = field(default_factory=dict)
    arrays: dict[str, list[Value]] = field(default_factory=dict)
    sourced: list[tuple[int, str]] = field(default_factory=list)
    total: int = 0

    def set(self, name: str, value: Value, *, append: bool = False) -> None:
        self.arrays.pop(name, None)
        self.values[name] = self._bounded((*self.values.get(name, ()), *value) if append else value)

    def set_array(self, name: str, items: list[Value], *, append: bool = False) -> None:
        self.values.pop(name, None)
        self.arrays[name] = [*(self.arrays.get(name, []) if append else []), *items]

    def value(self, name: str, line: int, source: str) -> Value:
        """Return the value of `$name`; unknown if nothing sets it."""
        if name in self.given:
            return (Piece(self.given[name], line),)
        if name in self.values:
            return self.values[name]
        if name in self.arrays:
            return next(iter(self.arrays[name]), ())
        if name in self.known:
            return (Piece(self.known[name], line),)
        return (Piece(source, line, self._unset(name, line)),)

    def is_set(self, name: str) -> bool:
        return any(name in place for place in (self.given, self.values, self.arrays, self.known))

    def _unset(self, name: str, line: int) -> Unknown:
        give = f"Give it: mm migrate {self.path} {name}=…"
        if name.isdigit():
            return Unknown(f"${name} is an argument of the script, which is not known here", line, give)
        if name in ("@", "*", "#"):
            return Unknown(f"${name} stands for the arguments of the script", line, "Write the flags out")
        if not name.isidentifier():
            return Unknown(f"${name} is known only while the script runs", line, "Write the value out")
        source = ""
        if self.sourced:
            at, file = self.sourced[-1]
            source = f" (perhaps {file}, which line {at} reads, does)"
        return Unknown(f"nothing in the script sets {name}{source}", line, give, unset=True)

    # -- expansion
    # ------------------------------------------------------------------------------------------------------

    def joined(self, parts: Iterable[Part]) -> Value:
        """Return a word as one text, as on the right of `NAME=`."""
        pieces: list[Piece] = []
        size = 0
        for part in parts:
            for piece in self._pieces(part):
                # Empty pieces, and one unknown after itself, say nothing: A=$A$A could double them for ever.
                same = piece.unknown is not None and pieces and pieces[-1].unknown is piece.unknown
                if piece.text and not same:
                    pieces.append(piece)
                    size += len(piece.text)
            if size > _MAX_VALUE:
                break
        return self._bounded(tuple(pieces))

    def fields(self, word: Word) -> list[Value]:
        """Return the words that a word becomes: what is not quoted is split at spaces."""
        done: list[Value] = []
        current: list[Piece] = []
        started = False
        for part in word.parts:
            if len(done) > _MAX_WORDS:
                break
            if part.index == "@" and part.quoted and part.text in self.arrays:
                for index, item in enumerate(self.arrays[part.text]):
                    if index:
                        done.append(tuple(current))
                        current = []
                    current += item
                    started = True
                continue
            pieces = self._pieces(part)
            self._count(sum(len(piece.text) for piece in pieces))
            if part.quoted or part.kind == "text":
                current += pieces
                started = True
                continue
            for piece in pieces:
                if piece.unknown is not None:
                    current.append(piece)
                    started = True
                    continue
                for chunk in re.findall(r"\s+|\S+", piece.text):
                    if not chunk.isspace():
                        current.append(replace(piece, text=chunk))
                        started = True
                    elif started:
                        done.append(tuple(current))
                        current, started = [], False
        if started:
            done.append(tuple(current))
        if len(done) > _MAX_WORDS:
            raise syntax_error(self.path, f"a word becomes more than {_MAX_WORDS} words", word.line)
        return done

    def _pieces(self, part: Part) -> Value:
        if part.kind == "text":
            return (Piece(part.text, part.line),)
        if part.kind == "opaque":
            return (Piece(part.text, part.line, _not_run(part)),)
        if part.kind == "arithmetic":
            return self._arithmetic(part)
        if part.operator:
            empty = not text_of(self.value(part.text, part.line, "")) if self.is_set(part.text) else True
            if not self.is_set(part.text) or (empty and part.operator.startswith(":")):
                value = self.joined(part.default)
                if part.operator.endswith("="):
                    self.set(part.text, value)
                return value
        if part.index and part.text in self.arrays:
            return self._array(part)
        if part.index == "@" and part.text != "@" and part.text not in self.values:
            return (Piece(part.source, part.line, self._unset(part.text, part.line)),)
        return self.value(part.text, part.line, part.source)

    def _array(self, part: Part) -> Value:
        items = self.arrays[part.text]
        if part.index.isdigit():
            index = int(part.index) if len(part.index) < 9 else len(items)
            return items[index] if index < len(items) else ()
        space = (Piece(" ", part.line),)
        return tuple(piece for at, item in enumerate(items) for piece in ((*space, *item) if at else item))

    def _arithmetic(self, part: Part) -> Value:
        problem: list[Unknown] = []

        def value_of(name: str) -> str:
            value = self.value(name, part.line, name)
            unknown = unknown_of(value)
            if unknown is not None:
                problem.append(unknown)
                raise ArithmeticShellError(unknown.reason)
            return text_of(value)

        try:
            text = _NAME.sub(lambda found: value_of(found[1] or found[2]), part.text)
            if "$" in text or "`" in text:
                raise ArithmeticShellError("it holds a command, and commands are not run")
            result = evaluate(text, value_of)
        except ArithmeticShellError as error:
            shown = part.source if len(part.source) < 60 else part.source[:59] + "…"
            unknown = problem[0] if problem else Unknown(
                f"{shown} cannot be computed: {error}", part.line, "Write the number"
            )  # fmt: skip
            return (Piece(part.source, part.line, unknown),)
        return (Piece(str(result), part.line),)

    def _bounded(self, value: Value) -> Value:
        size = sum(len(piece.text) for piece in value)
        self._count(size)
        if size <= _MAX_VALUE:
            return value
        line = value[-1].line
        reason = f"it grows beyond {_MAX_VALUE} characters"
        return (Piece("…", line, Unknown(reason, line, "Write the value out")),)

    def _count(self, size: int) -> None:
        self.total += size
        if self.total > _MAX_TOTAL:
            message = f"its variables grow beyond {_MAX_TOTAL} characters: this is no launch script"
            raise syntax_error(self.path, message)


def _not_run(part: Part) -> Unknown:
    shown = part.text if len(part.text) < 60 else part.text[:59] + "…"
    if part.text.startswith("${"):
        return Unknown(f"this form of expansion is not read: {shown}", part.line, "Write the value out")
    return Unknown(
        f"{shown} would have to be run, and commands are not run", part.line, "Write the value out"
    )
