"""The tokens of JSON with comments and trailing commas, and their places in the text.

Comments and trailing commas are blanked with as many spaces, so that the standard parser reads the rest and
its offsets stay true.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from typing import NamedTuple

from mm_core.config.document import MAX_VALUES, syntax_error, too_many_values
from mm_core.config.findings import ConfigError, show
from mm_core.config.origin import Origin

_TOKEN = re.compile(
    r'(?P<string>"[^"\\\n]*(?:\\.[^"\\\n]*)*")'
    r"|(?P<comment>//[^\n]*|/\*[\s\S]*?\*/)"
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<atom>[^\s{}\[\],:\"'/]+)"
    r"|(?P<bad>\S)"
)
#: Spaces that people cannot tell from the ordinary one, and JSON does not know.
_ODD_SPACE = re.compile(r"[^\S \t\n\r]")


class Token(NamedTuple):
    kind: str  # "string", "atom", the mark itself, or "bad": no token can begin here
    text: str
    start: int
    end: int


class Source:
    """The text of a file, and the lines and columns of its offsets."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, offset: int) -> tuple[int, int]:
        line = bisect.bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def origin(self, offset: int) -> Origin:
        return Origin("file", self.path, *self.place(offset))

    def fail(self, offset: int, message: str, suggestion: str = "") -> ConfigError:
        return syntax_error(self.path, message, *self.place(offset), suggestion)

    def indent(self, offset: int) -> int:
        """Return how many spaces and tabs stand before the first character of the line."""
        start = self._line_starts[self.place(offset)[0] - 1]
        return len(self.text) - start - len(self.text[start:].lstrip(" \t")) if start < len(self.text) else 0

    def begins_line(self, offset: int) -> bool:
        """Return whether nothing but spaces stands before on the line."""
        start = self._line_starts[self.place(offset)[0] - 1]
        return not self.text[start:offset].strip(" \t")


def tokenize(source: Source) -> tuple[list[Token], str]:
    """Return the tokens without comments and trailing commas, and the text with those blanked.

    A character that begins no token ends the list, as a token of the kind "bad": what is wrong before it comes
    first.

    Raises:
        ConfigError: there are more than MAX_VALUES values.
    """
    text = source.text
    tokens: list[Token] = []
    pieces: list[str] = []
    done = values = 0

    def blank(start: int, end: int) -> None:
        nonlocal done
        pieces.append(text[done:start])
        pieces.append(re.sub(r"[^\n]", " ", text[start:end]))
        done = end

    comma: Token | None = None
    for match in _TOKEN.finditer(text):
        kind, word, start, end = str(match.lastgroup), match.group(), match.start(), match.end()
        if kind == "comment":
            # Nothing is blanked behind a pending comma, so that pieces stay in order.
            if comma is not None:
                _keep_or_blank(text, comma, tokens, end, blank)
                comma = None
            blank(start, end)
            continue
        token = Token(word if kind == "mark" else kind, word, start, end)
        if comma is not None:
            if token.kind in ("}", "]"):
                blank(comma.start, comma.end)
            else:
                tokens.append(comma)
            comma = None
        if token.kind == "," and tokens and tokens[-1].kind not in ("{", "[", ",", ":"):
            comma = token
        else:
            tokens.append(token)
        if kind == "bad":
            break
        values += kind != "mark" or word in "{["
        if values > 2 * MAX_VALUES:  # keys are counted as well
            raise too_many_values(source.path, *source.place(start))
    if comma is not None:
        tokens.append(comma)
    pieces.append(text[done:])
    return tokens, "".join(pieces)


def _keep_or_blank(
    text: str, comma: Token, tokens: list[Token], after: int, blank: Callable[[int, int], None]
) -> None:
    """Decide about a comma that a comment follows: look past all comments to the next token."""
    following = next((m for m in _TOKEN.finditer(text, after) if m.lastgroup != "comment"), None)
    if following is not None and following.group() in ("}", "]"):
        blank(comma.start, comma.end)
    else:
        tokens.append(comma)


def bad_character(source: Source, token: Token) -> ConfigError:
    """Return the error for a token of the kind "bad"."""
    at = token.start
    if token.text == '"':
        return source.fail(
            at, "this text has no closing quote on its line", 'Add " where the text ends; \\n is a line feed'
        )
    if token.text == "'":
        return source.fail(at, "texts and keys stand in double quotes", "Write \" instead of '")
    if source.text.startswith("/*", at):
        return source.fail(at, "this comment has no end", "Add */ where it ends")
    if token.text == "/":
        return source.fail(at, "'/' begins no value", "Put a text in double quotes; a comment begins with //")
    return source.fail(at, f"unexpected character {show(token.text)}")


def check_spaces(source: Source, blanked: str, tokens: list[Token]) -> None:
    """Refuse a space that looks like one and is none to JSON (no-break, ideographic).

    Raises:
        ConfigError: at the first.
    """
    starts: list[int] = []
    for found in _ODD_SPACE.finditer(blanked):
        at = found.start()
        starts = starts or [token.start for token in tokens]
        around = bisect.bisect_right(starts, at) - 1
        if around < 0 or tokens[around].end <= at:  # else it stands in a text
            message = f"this space (U+{ord(found.group()):04X}) is not one that JSON knows"
            raise source.fail(at, message, "Replace it with an ordinary space")
