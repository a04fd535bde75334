"""What a shell script consists of: words, made of literal text and expansions, and the marks between commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mm_core.config.document import syntax_error
from mm_core.config.findings import ConfigError

PartKind: TypeAlias = Literal["text", "variable", "arithmetic", "opaque"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a word.

    Attributes:
        kind: `text`; `variable` (`$A`, `${A:-b}`, `${A[@]}`); `arithmetic` (`$((…))`, `$[…]`); `opaque`: what
            would have to be run, such as `$(date)`.
        text: the literal text, the variable's name, the expression, or (opaque) the source text.
        source: as it is written in the script.
        quoted: its value is not split at spaces.
        operator: `:-`, `-`, `:=` or `=` of a variable with a default, else "".
        default: the parts of that default.
        index: `@`, `*` or a number, of `${A[…]}`.
    """

    kind: PartKind
    text: str
    line: int
    source: str = ""
    quoted: bool = False
    operator: str = ""
    default: tuple[Part, ...] = ()
    index: str = ""


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a command. `items` are the words of an array, `NAME=( … )`, whose `parts` end with the `=`."""

    parts: tuple[Part, ...]
    line: int
    items: tuple[Word, ...] | None = None

    @property
    def literal(self) -> str | None:
        """The text, if nothing in it is quoted or expanded: what can be a keyword."""
        if any(part.kind != "text" or part.quoted for part in self.parts) or self.items is not None:
            return None
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands between commands: `;` (a line's end too), `&`, `&&`, `||`, `|`, `(`, `)`, `;;`."""

    text: str
    line: int


Token: TypeAlias = Word | Mark


class Source:
    """The script's text, and where in it a reader stands."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.at = 0
        self.line = 1

    def peek(self, count: int = 1) -> str:
        return self.text[self.at : self.at + count]

    def starts(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    @property
    def done(self) -> bool:
        return self.at >= len(self.text)

    def take(self, count: int = 1) -> str:
        """Return the next characters and stand behind them."""
        taken = self.text[self.at : self.at + count]
        self.at += len(taken)
        self.line += taken.count("\n")
        return taken

    def fail(self, message: str, line: int, suggestion: str = "") -> ConfigError:
        return syntax_error(self.path, message, line, None, suggestion)
