"""Plain data as YAML with a comment behind each value, and the line of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mm_core.config.origin import KeyPath

#: A text that is written without quotes, and read as a text by every reader of YAML 1.1 and 1.2.
_PLAIN = re.compile(r"(?:[A-Za-z_]|\.{0,2}/)[\w./+-]*(?: [\w./+-]+)*\Z", re.ASCII)
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"})
#: Characters that YAML wants written as escapes, beyond those of JSON.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
#: A list of plain values stands on one line up to this width.
_FLOW_WIDTH = 70

#: Comments begin in this column at least.
_COLUMN = 40

Comment = Callable[[KeyPath], str]
Above = Callable[[KeyPath], list[str]]


class YamlText:
    """The text of a mapping.

    Args:
        data: plain data.
        comment: what stands behind the value at a path (for an object or a long list: behind its key); "" is
            nothing.
        above: lines of comment above the key at a path.

    Attributes:
        lines: of the text.
        places: line, from 1 -> the path that begins there.
    """

    def __init__(self, data: Mapping[str, Any], comment: Comment, above: Above = lambda path: []) -> None:
        self.lines: list[str] = []
        self.places: dict[int, KeyPath] = {}
        self._comment = comment
        self._above = above
        self._mapping(data, (), "", "")

    def _add(self, text: str, path: KeyPath) -> None:
        comment = self._comment(path)
        self.lines.append(f"{text:<{_COLUMN}}  # {one_line(comment)}" if comment else text)
        self.places[len(self.lines)] = path

    def _mapping(self, data: Mapping[str, Any], path: KeyPath, indent: str, first: str) -> None:
        """Write the members; the first one behind `first`, which begins an item of a list."""
        for key, value in data.items():
            place = (*path, key)
            if not path and self.lines:
                self.lines.append("")
            outer = indent if not first else indent[:-2]
            self.lines += [f"{outer}# {one_line(text)}" for text in self._above(place)]
            self._member(f"{first or indent}{scalar(str(key))}:", value, place, indent)
            first = ""

    def _member(self, head: str, value: Any, path: KeyPath, indent: str) -> None:
        flow = flow_text(value)
        if flow is not None:
            self._add(f"{head} {flow}", path)
            return
        self._add(head, path)
        if isinstance(value, Mapping):
            self._mapping(value, path, indent + "  ", "")
        else:
            self._items(value, path, indent + "  ")

    def _items(self, items: list[Any], path: KeyPath, indent: str) -> None:
        for index, item in enumerate(items):
            place = (*path, index)
            flow = flow_text(item)
            if flow is not None:
                self._add(f"{indent}- {flow}", place)
            elif isinstance(item, Mapping):
                self._mapping(item, place, indent + "  ", f"{indent}- ")
            else:
                self.lines.append(f"{indent}-")
                self._items(item, place, indent + "  ")


def flow_text(value: Any) -> str | None:
    """Return a value on one line, or None if it needs several: an object, a long list."""
    if isinstance(value, Mapping):
        return None if value else "{}"
    if not isinstance(value, list | tuple):
        return scalar(value)
    if any(isinstance(item, Mapping | list | tuple) for item in value):
        return None
    text = f"[{', '.join(scalar(item) for item in value)}]"
    return text if len(text) <= _FLOW_WIDTH else None


def scalar(value: Any) -> str:
    """Return a number, text, true, false or null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 1e-05 as a text, because it has no dot.
        return text if "." in text else re.sub(r"(?=e)|\Z", ".0", text, count=1)
    if isinstance(value, int):
        return str(value)
    return quoted(str(value))


def quoted(text: str) -> str:
    """Return a text, in quotes where it might be read as something else."""
    if _PLAIN.match(text) and text.lower() not in _WORDS:
        return text
    return _ESCAPED.sub(_escape, json.dumps(text, ensure_ascii=False))


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str, *, strip: bool = True) -> str:
    """Return a text as it can stand in a comment: no line ends, no character that YAML does not allow."""
    line = "".join(_shown(text))
    return line.strip() if strip else line


def _shown(text: str) -> Iterator[str]:
    for char in text:
        if char in "\r\n\t":
            yield " "
        elif char == " " or char.isprintable():
            yield char
        else:
            yield f"\\x{ord(char):02x}"
