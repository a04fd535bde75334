"""JSON with comments and trailing commas, and the place of every key and value.

Comments and trailing commas are blanked with as many spaces, so that the standard parser reads the rest and
its offsets stay true. A scan of the tokens, before, finds what the standard parser cannot place well: a
missing comma belongs right after the previous value, a missing bracket to the one that was opened.
"""

from __future__ import annotations

import bisect
import json
import re
from typing import Any, NamedTuple

from mm_core.config.document import MAX_DEPTH, Document, syntax_error
from mm_core.config.findings import clip, show
from mm_core.config.origin import KeyPath, Origin

_TOKEN = re.compile(
    r'(?P<string>"(?:\\.|[^"\\\n])*")'
    r"|(?P<comment>//[^\n]*|/\*[\s\S]*?\*/)"
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<atom>[^\s{}\[\],:\"'/]+)"
    r"|(?P<bad>\S)"
)
_CLOSING = {"{": "}", "[": "]"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "yes": "true", "no": "false"}
_ATOM = re.compile(r"(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)\Z")


class Token(NamedTuple):
    kind: str  # "string", "atom" or the mark itself
    text: str
    start: int
    end: int


class _Reader:
    """One file being read. `fail` knows lines and columns."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, offset: int) -> tuple[int, int]:
        line = bisect.bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def origin(self, offset: int) -> Origin:
        return Origin("file", self.path, *self.place(offset))

    def fail(self, offset: int, message: str, suggestion: str = "") -> Exception:
        return syntax_error(self.path, message, *self.place(offset), suggestion)

    # -- tokens
    # ------------------------------------------------------------------------------------------------------

    def tokens(self) -> tuple[list[Token], str]:
        """Return the tokens without comments and trailing commas, and the text with those blanked."""
        tokens: list[Token] = []
        pieces: list[str] = []
        done = 0

        def blank(start: int, end: int) -> None:
            nonlocal done
            pieces.append(self.text[done:start])
            pieces.append(re.sub(r"[^\n]", " ", self.text[start:end]))
            done = end

        comma: Token | None = None
        for match in _TOKEN.finditer(self.text):
            kind, word, start, end = match.lastgroup, match.group(), match.start(), match.end()
            if kind == "comment":
                # Nothing is blanked behind a pending comma, so that pieces stay in order.
                if comma is not None:
                    self._keep_or_blank(comma, tokens, end, blank)
                    comma = None
                blank(start, end)
                continue
            if kind == "bad":
                raise self._bad_character(word, start)
            token = Token(word if kind == "mark" else str(kind), word, start, end)
            if comma is not None:
                if word in "}]" and kind == "mark":
                    blank(comma.start, comma.end)
                else:
                    tokens.append(comma)
                comma = None
            if word == "," and kind == "mark" and tokens and tokens[-1].kind not in ("{", "[", ",", ":"):
                comma = token
            else:
                tokens.append(token)
        if comma is not None:
            tokens.append(comma)
        pieces.append(self.text[done:])
        return tokens, "".join(pieces)

    def _keep_or_blank(self, comma: Token, tokens: list[Token], after: int, blank: Any) -> None:
        """Decide about a comma that a comment follows: look past all comments to the next token."""
        following = next((m for m in _TOKEN.finditer(self.text, after) if m.lastgroup != "comment"), None)
        if following is not None and following.group() in ("}", "]"):
            blank(comma.start, comma.end)
        else:
            tokens.append(comma)

    def _bad_character(self, char: str, start: int) -> Exception:
        if char == '"':
            return self.fail(start, "this text has no closing quote on its line", 'Add " where the text ends')
        if char == "'":
            return self.fail(start, "texts and keys stand in double quotes", "Write \" instead of '")
        if self.text.startswith("/*", start):
            return self.fail(start, "this comment has no end", "Add */ where it ends")
        return self.fail(start, f"unexpected character {show(char)}")

    # -- structure
    # ---------------------------------------------------------------------------------------------------

    def structure(self, tokens: list[Token]) -> tuple[dict[KeyPath, Origin], dict[KeyPath, Origin]]:
        """Check the order of tokens and return the places of values and of keys, by path."""
        origins: dict[KeyPath, Origin] = {}
        keys: dict[KeyPath, Origin] = {}
        stack: list[tuple[Token, KeyPath, set[str]]] = []
        # "value", "first" (key/value or closing), "key", "colon", "next" (comma or closing), "end"
        expect = "value"
        path: KeyPath = ()
        index: list[int] = []
        for position, token in enumerate(tokens):
            before = tokens[position - 1] if position else None
            inside = stack[-1][0].kind if stack else ""
            if expect == "end":
                raise self.fail(
                    token.start, f"{show(token.text)} after the end of the top level", "Remove it"
                )
            if expect == "colon":
                if token.kind != ":":
                    assert before is not None
                    raise self.fail(
                        before.end, f"missing ':' after the key {clip(before.text)}", 'Write "key": value'
                    )
                expect = "value"
                continue
            if expect in ("first", "next") and token.kind in ("}", "]"):
                opened, path, _ = stack.pop()
                if token.kind != _CLOSING[opened.kind]:
                    raise self._wrong_closing(token, opened)
                if opened.kind == "[":
                    index.pop()
                expect = "next" if stack else "end"
                continue
            if expect == "next":
                if token.kind == ",":
                    expect = "key" if inside == "{" else "value"
                    continue
                assert before is not None
                raise self._missing_comma(token, before, inside)
            if inside == "{" and expect in ("first", "key"):
                path = self._key(token, before, stack, keys)
                expect = "colon"
                continue
            # A value is expected.
            base = path
            if inside == "[":
                base = (*stack[-1][1], index[-1])
                index[-1] += 1
            self._check_value(token, before, inside)
            origins[base] = self.origin(token.start)
            if inside == "[":
                keys[base] = origins[base]
            if token.kind in ("{", "["):
                if len(stack) >= MAX_DEPTH:
                    raise self.fail(token.start, f"objects and lists are nested more than {MAX_DEPTH} deep")
                stack.append((token, base, set()))
                if token.kind == "[":
                    index.append(0)
                expect = "first"
            else:
                expect = "next" if stack else "end"
        if expect != "end":
            raise self._early_end(tokens, stack)
        return origins, keys

    def _key(
        self,
        token: Token,
        before: Token | None,
        stack: list[tuple[Token, KeyPath, set[str]]],
        keys: dict[KeyPath, Origin],
    ) -> KeyPath:
        if token.kind == ",":
            at = before.end if before else token.start
            raise self.fail(
                token.start if before and before.kind == "," else at, "a comma too many", "Remove it"
            )
        if token.kind == "atom":
            if _ATOM.match(token.text):
                mend = "Use [ ] for a list"
                raise self.fail(
                    token.start, f"found {clip(token.text)} where a key in double quotes belongs", mend
                )
            mend = f'Write "{clip(token.text)}"'
            raise self.fail(token.start, f"the key {clip(token.text)} needs double quotes", mend)
        if token.kind != "string":
            raise self.fail(token.start, f"found {clip(token.text)} where a key in double quotes belongs")
        try:
            name = json.loads(token.text)
        except json.JSONDecodeError as error:
            raise self._bad_string(token, error) from None
        _, base, seen = stack[-1]
        path = (*base, name)
        if name in seen:
            first = keys[path]
            raise self.fail(
                token.start,
                f'duplicate key "{clip(name)}", first given at line {first.line}',
                "Remove one of them",
            )
        seen.add(name)
        keys[path] = self.origin(token.start)
        return path

    def _check_value(self, token: Token, before: Token | None, inside: str) -> None:
        if token.kind == "string":
            try:
                json.loads(token.text)
            except json.JSONDecodeError as error:
                raise self._bad_string(token, error) from None
        elif token.kind == "atom" and not _ATOM.match(token.text):
            word = token.text
            if word.lstrip("+-") in ("NaN", "Infinity", "nan", "inf", "Inf"):
                raise self.fail(
                    token.start, f"{clip(word)} is no number that JSON knows", "Write a finite number"
                )
            if word in _PYTHON_WORDS:
                raise self.fail(token.start, f"{clip(word)} is not JSON", f"Write {_PYTHON_WORDS[word]}")
            if re.match(r"[+-]?[\d.]", word):
                raise self.fail(
                    token.start, f"{clip(word)} is not a number as JSON writes it", _number_hint(word)
                )
            raise self.fail(
                token.start, f"the text {clip(word)} needs double quotes", f'Write "{clip(word)}"'
            )
        elif token.kind in (",", ":", "}", "]"):
            at = before.end if before else token.start
            if inside == "[" and token.kind == ",":
                raise self.fail(token.start, "a comma too many", "Remove it")
            raise self.fail(at, f"a value is missing before {clip(token.text)}")

    def _bad_string(self, token: Token, error: json.JSONDecodeError) -> Exception:
        at = token.start + error.pos
        if "escape" in error.msg:
            return self.fail(
                at, "this backslash begins no known escape", "Write \\\\ for a backslash, or use /"
            )
        return self.fail(at, "a control character in a text", "Write \\t for a tab")

    def _wrong_closing(self, token: Token, opened: Token) -> Exception:
        line, column = self.place(opened.start)
        wanted = _CLOSING[opened.kind]
        return self.fail(
            token.start,
            f"'{clip(token.text)}' closes the '{opened.kind}' of line {line}, column {column}; "
            f"expected '{wanted}'",
            f"Write '{wanted}', or add the missing one before",
        )

    def _missing_comma(self, token: Token, before: Token, inside: str) -> Exception:
        if token.kind == ":" and before.kind in ("string", "atom"):
            return self.fail(token.start, "':' stands where ',' or a closing bracket belongs")
        what = f"the next key {clip(token.text)}" if inside == "{" else f"the next value {show(token.text)}"
        return self.fail(before.end, f"missing ',' between this value and {what}", "Add a comma here")

    def _early_end(self, tokens: list[Token], stack: list[tuple[Token, KeyPath, set[str]]]) -> Exception:
        end = tokens[-1].end if tokens else 0
        if not stack:
            return self.fail(end, "the file holds only comments", "Write at least {}")
        opened = stack[-1][0]
        line, column = self.place(opened.start)
        closing = _CLOSING[opened.kind]
        return self.fail(
            end,
            f"the file ends before '{closing}': '{opened.kind}' of line {line}, column {column} is "
            "not closed",
            f"Add '{closing}' here",
        )


def _number_hint(word: str) -> str:
    if word.startswith("+"):
        return f"Write {word[1:]}"
    if word.startswith((".", "-.")):
        return f"Write {word.replace('.', '0.', 1)}"
    if re.fullmatch(r"-?\d+\.", word):
        return f"Write {word}0"
    if re.fullmatch(r"-?0\d+", word):
        return f"Write {int(word)}"
    if "_" in word:
        return f"Write {word.replace('_', '')}"
    return ""


def parse_json(text: str, path: str) -> Document:
    """Parse JSON with comments and trailing commas. Raises ConfigError with the place of the first
    mistake.
    """
    reader = _Reader(text, path)
    tokens, blanked = reader.tokens()
    origins, keys = reader.structure(tokens)
    try:
        data = json.loads(blanked)
    except (json.JSONDecodeError, RecursionError) as error:
        offset = error.pos if isinstance(error, json.JSONDecodeError) else 0
        raise reader.fail(offset, f"not JSON: {error}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise reader.fail(0, f"a number has too many digits: {error}") from error
    overflow = _first_infinite(data, ())
    if overflow is not None:
        origin = origins[overflow]
        raise syntax_error(path, "this number is too large", origin.line, origin.column)
    return Document(path, data, origins, keys)


def _first_infinite(value: Any, path: KeyPath) -> KeyPath | None:
    """Return the path of a number such as 1e999, which the parser turns into infinity."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return path
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, item in members:
        found = _first_infinite(item, (*path, key))
        if found is not None:
            return found
    return None
