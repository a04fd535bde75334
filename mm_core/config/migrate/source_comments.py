"""Comments that people wrote in their JSON and YAML files, by line, so that they can stand in the new file as well."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from mm_core.config.document import expanded

#: Of larger files the comments are not looked for.
_MAX_BYTES = 2**20
_JSON = re.compile(r'"(?:\\.|[^"\\\n])*"|(?P<comment>//[^\n]*|/\*[\s\S]*?\*/)')
_FRAME = re.compile(r"^[\s#/*]+|[\s*/]+$")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class SourceComments:
    """The comments of one file.

    Attributes:
        behind: line -> the comment that follows a value there.
        above: line of a value -> the comments that stand on lines of their own right above it.
    """

    behind: dict[int, str] = field(default_factory=dict)
    above: dict[int, list[str]] = field(default_factory=dict)


def source_comments(path: str) -> SourceComments:
    """Return the comments of a JSON or YAML file that has been read already; none of one that is very large."""
    file = expanded(path)
    try:
        raw = file.read_bytes()
    except OSError:
        return SourceComments()  # it was read a moment ago; its comments are not worth an error
    if len(raw) > _MAX_BYTES:
        return SourceComments()
    text = raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    found = _json_comments(text) if file.suffix.lower() == ".json" else _yaml_comments(text)
    return _by_line(text.split("\n"), found)


def _json_comments(text: str) -> list[tuple[int, int, str]]:
    """Return (line, column from 0, comment) of each."""
    found = []
    for match in _JSON.finditer(text):
        if match["comment"]:
            start = match.start()
            found.append(
                (text.count("\n", 0, start) + 1, start - (text.rfind("\n", 0, start) + 1), match["comment"])
            )
    return found


def _yaml_comments(text: str) -> list[tuple[int, int, str]]:
    """Return (line, column from 0, comment) of each: what follows the last token of a line, and is no token."""
    ends: dict[int, int] = {}
    inside: set[int] = set()  # lines on which a text goes on
    for token in yaml.scan(text, Loader=_Loader):
        ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
        if isinstance(token, yaml.ScalarToken):
            inside.update(range(token.start_mark.line, token.end_mark.line))
    found = []
    for number, line in enumerate(text.split("\n")):
        start = line.find("#", ends.get(number, 0))
        if start >= 0 and number not in inside and not line[ends.get(number, 0) : start].strip():
            found.append((number + 1, start, line[start:]))
    return found


def _by_line(lines: list[str], found: list[tuple[int, int, str]]) -> SourceComments:
    result = SourceComments()
    waiting: list[str] = []
    expected = 0
    for number, column, comment in found:
        texts = [text for line in comment.split("\n") if (text := _FRAME.sub("", line))]
        texts = [text for text in texts if not text.startswith("yaml-language-server:")]  # the other file's
        after = number + comment.count("\n")
        if lines[number - 1][:column].strip():
            result.behind[number] = " ".join(texts)
            continue
        waiting = [*waiting, *texts] if number == expected else texts
        expected = after + 1
        if waiting and after < len(lines):
            result.above.pop(number, None)
            result.above[after + 1] = waiting
    return result
