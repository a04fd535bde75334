"""JSON with comments and trailing commas, and the place of every key and value.

A scan of the tokens finds what the standard parser cannot place well: a missing comma belongs right after the
previous value, a missing bracket where the indentation falls back. The standard parser then makes the values.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from mm_core.config.document import MAX_DEPTH, Document, syntax_error
from mm_core.config.findings import ConfigError, clip, show
from mm_core.config.json_brackets import (
    CLOSING,
    colon_after_value,
    key_in_list,
    never_closed,
    value_for_key,
    wrong_closing,
)
from mm_core.config.json_tokens import Source, Token, bad_character, check_spaces, tokenize
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.secrets import HIDDEN, in_secret

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "yes": "true", "no": "false"}
_ATOM = re.compile(r"(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)\Z")
#: \ud800 and the like, which mean something only in pairs.
_HALF = re.compile("[\ud800-\udfff]")
#: No quantity has so many digits, and the parser refuses whole numbers of some thousands without a place.
_MOST_DIGITS = 400
#: What a Chinese or Japanese keyboard writes for JSON's punctuation.
_FULL_WIDTH = str.maketrans("，：“”｛｝［］", ',:""{}[]')


class _Open(NamedTuple):
    """An object or list that is being read."""

    token: Token
    path: KeyPath
    seen: set[str]


class _Structure:
    """Checks the order of tokens, and collects the places of values and of keys, by path."""

    def __init__(self, source: Source, tokens: list[Token]) -> None:
        self.source = source
        self.tokens = tokens
        self.origins: dict[KeyPath, Origin] = {}
        self.keys: dict[KeyPath, Origin] = {}

    def read(self) -> None:
        """Raises ConfigError with the place of the first mistake."""
        stack: list[_Open] = []
        # "value", "first" (key/value or closing), "key", "colon", "next" (comma or closing), "end"
        expect = "value"
        path: KeyPath = ()
        index: list[int] = []
        for position, token in enumerate(self.tokens):
            if token.kind == "bad":
                raise bad_character(self.source, token)
            before = self.tokens[position - 1] if position else None
            inside = stack[-1].token.kind if stack else ""
            if expect == "end":
                raise self._after_end(token, before)
            if expect == "colon":
                if token.kind != ":":
                    assert before is not None
                    text = f"missing ':' after the key {clip(before.text)}"
                    raise self.source.fail(before.end, text, 'Write "key": value')
                expect = "value"
                continue
            if expect in ("first", "next") and token.kind in ("}", "]"):
                opened = stack.pop()
                path = opened.path
                if token.kind != CLOSING[opened.token.kind]:
                    around = [outer.token for outer in stack]
                    raise wrong_closing(self.source, self.tokens, position, opened.token, around)
                if opened.token.kind == "[":
                    index.pop()
                expect = "next" if stack else "end"
                continue
            if expect == "next":
                if token.kind == ",":
                    expect = "key" if inside == "{" else "value"
                    continue
                raise self._not_next(position, stack[-1], path)
            if inside == "{" and expect in ("first", "key"):
                if token.kind in ("{", "["):
                    raise value_for_key(
                        self.source, self.tokens, position, [opened.token for opened in stack]
                    )
                path = self._key(token, before, stack[-1])
                expect = "colon"
                continue
            # A value is expected.
            base = path
            if inside == "[":
                base = (*stack[-1].path, index[-1])
                index[-1] += 1
            self._check_value(token, before, inside, base)
            self.origins[base] = self.source.origin(token.start)
            if inside == "[":
                self.keys[base] = self.origins[base]
            if token.kind in ("{", "["):
                if len(stack) >= MAX_DEPTH:
                    text = f"objects and lists are nested more than {MAX_DEPTH} deep"
                    raise self.source.fail(token.start, text)
                stack.append(_Open(token, base, set()))
                if token.kind == "[":
                    index.append(0)
                expect = "first"
            else:
                expect = "next" if stack else "end"
        if expect != "end":
            self._check_not_empty()
            raise never_closed(self.source, self.tokens, [opened.token for opened in stack])

    def _check_not_empty(self) -> None:
        if not self.tokens:
            raise self.source.fail(0, "the file holds only comments", "Write at least {}")

    def _key(self, token: Token, before: Token | None, opened: _Open) -> KeyPath:
        fail = self.source.fail
        if token.kind == ",":
            at = before.end if before else token.start
            raise fail(token.start if before and before.kind == "," else at, "a comma too many", "Remove it")
        if token.kind == "atom":
            word = clip(token.text)
            if _ATOM.match(token.text):
                raise fail(
                    token.start, f"found {word} where a key in double quotes belongs", "Use [ ] for a list"
                )
            self._check_comment_or_width(token)
            raise fail(token.start, f"the key {word} needs double quotes", f'Write "{word}"')
        if token.kind != "string":
            raise fail(token.start, f"found {clip(token.text)} where a key in double quotes belongs")
        name = self._string(token)
        path = (*opened.path, name)
        if name in opened.seen:
            text = f'duplicate key "{clip(name)}", first given at line {self.keys[path].line}'
            raise fail(token.start, text, "Remove one of them")
        opened.seen.add(name)
        self.keys[path] = self.source.origin(token.start)
        return path

    def _check_value(self, token: Token, before: Token | None, inside: str, path: KeyPath) -> None:
        if token.kind == "string":
            self._string(token)
        elif token.kind == "atom" and not _ATOM.match(token.text):
            self._check_comment_or_width(token)
            raise self._bad_atom(token, path)
        elif token.kind == "atom" and len(token.text) > _MOST_DIGITS:
            raise self.source.fail(
                token.start, f"a number of {len(token.text)} characters has too many digits"
            )
        elif token.kind in (",", ":", "}", "]"):
            at = before.end if before else token.start
            if inside == "[" and token.kind == ",":
                raise self.source.fail(token.start, "a comma too many", "Remove it")
            raise self.source.fail(at, f"a value is missing before {clip(token.text)}")

    def _check_comment_or_width(self, token: Token) -> None:
        if token.text.startswith("#"):
            raise self.source.fail(token.start, "'#' begins no comment in JSON", "Write // instead")
        for offset, char in enumerate(token.text):
            plain = char.translate(_FULL_WIDTH)
            if plain != char:
                raise self.source.fail(
                    token.start + offset, f"'{char}' is not the punctuation of JSON", f"Write {plain}"
                )

    def _bad_atom(self, token: Token, path: KeyPath) -> ConfigError:
        word, at, fail = clip(token.text), token.start, self.source.fail
        if token.text.lstrip("+-") in ("NaN", "Infinity", "nan", "inf", "Inf"):
            return fail(at, f"{word} is no number that JSON knows", "Write a finite number")
        if word in _PYTHON_WORDS:
            return fail(at, f"{word} is not JSON", f"Write {_PYTHON_WORDS[word]}")
        if in_secret(path):
            return fail(at, f"the text {HIDDEN} needs double quotes", "Put it in double quotes")
        if re.match(r"[+-]?\.?\d", word):
            return fail(at, f"{word} is not a number as JSON writes it", _number_hint(token.text))
        return fail(at, f"the text {word} needs double quotes", f'Write "{word}"')

    def _string(self, token: Token) -> str:
        if "\\" not in token.text and token.text.isprintable():
            return token.text[1:-1]  # as nearly all are
        try:
            text = json.loads(token.text)
        except json.JSONDecodeError as error:
            at = token.start + error.pos
            if "escape" in error.msg:
                mend = "Write \\\\ for a backslash, or use /"
                raise self.source.fail(at, "this backslash begins no known escape", mend) from None
            raise self.source.fail(at, "a control character in a text", "Write \\t for a tab") from None
        assert isinstance(text, str)
        if "\\u" in token.text and not text.isascii() and _HALF.search(text):
            mend = "Write the character itself, or both halves"
            raise self.source.fail(token.start, "an escape in this text is half a character", mend)
        return text

    def _not_next(self, position: int, opened: _Open, path: KeyPath) -> ConfigError:
        """What stands where a comma or the closing bracket belongs."""
        token, before = self.tokens[position], self.tokens[position - 1]
        if token.kind == ":":
            if opened.token.kind == "[" and before.kind == "string":
                return key_in_list(self.source, self.tokens, position, opened.token)
            return colon_after_value(self.source, self.tokens, position)
        following = self.tokens[position + 1].kind if position + 1 < len(self.tokens) else ""
        shown = HIDDEN if in_secret(path) and following != ":" else clip(token.text)
        what = f"the next {'key' if opened.token.kind == '{' else 'value'} {shown}"
        return self.source.fail(before.end, f"missing ',' between this value and {what}", "Add a comma here")

    def _after_end(self, token: Token, before: Token | None) -> ConfigError:
        if token.kind == ":" and before is self.tokens[0]:
            text = f"missing '{{' before the first key {clip(before.text)}"
            return self.source.fail(before.start, text, "Add '{' here")
        text = f"{show(token.text)} after the end of the top level"
        if before is not None and before.kind in ("}", "]") and token.kind in (",", "}", "]", "string"):
            line, column = self.source.place(before.start)
            text += f", which '{before.text}' of line {line}, column {column} closed"
            return self.source.fail(token.start, text, "Remove it, or that bracket")
        return self.source.fail(token.start, text, "Remove it")


def _number_hint(word: str) -> str:
    if len(word) > _MOST_DIGITS:
        return ""
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
    source = Source(text, path)
    tokens, blanked = tokenize(source)
    structure = _Structure(source, tokens)
    structure.read()
    check_spaces(source, blanked, tokens)
    try:
        data = json.loads(blanked)
    except (ValueError, RecursionError) as error:
        offset = error.pos if isinstance(error, json.JSONDecodeError) else 0
        raise source.fail(offset, f"not JSON: {error}") from error
    overflow = _first_infinite(data, ())
    if overflow is not None:
        origin = structure.origins[overflow]
        raise syntax_error(path, "this number is too large", origin.line, origin.column)
    return Document(path, data, structure.origins, structure.keys)


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
