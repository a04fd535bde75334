"""The parser's errors in words that say how to mend the file, at the place where that is to be done."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mm_core.config.document import syntax_error
from mm_core.config.findings import ConfigError, clip, show
from mm_core.config.secrets import HIDDEN, is_secret

#: Part of the parser's words -> (what is wrong, how to mend it). `{line}` is where the block, text or first of
#: two began.
_TOLD = (
    (
        "mapping values are not allowed",
        "': ' is not allowed here",
        "Put a text that holds ': ' in quotes, or check the indentation",
    ),
    (
        "unknown escape character",
        "this backslash begins no known escape",
        "Write \\\\ for a backslash, or single quotes around the text",
    ),
    (
        "did not find expected key",
        "this does not continue the object of line {line}",
        "Check the indentation of this line against the lines around it",
    ),
    (
        "expected '-' indicator",
        "this does not continue the list of line {line}",
        "Begin the line with '- ', or check its indentation",
    ),
    ("expected node content", "a value is missing", "Write it, or remove a comma or bracket too many"),
    (
        "block sequence entries are not allowed",
        "a list with '- ' cannot begin on the line of its key",
        "Begin it on the next line, or write [a, b]",
    ),
    (
        "expected a single document",
        "a second document begins here; a configuration is one",
        "Remove this line, or what follows",
    ),
    (
        "duplicate anchor",
        "an anchor of this name is defined already, at line {line}",
        "Give one of them another name",
    ),
    (
        "alphabetic or numeric character",
        "'*' begins an alias of YAML",
        "Quote a pattern that stands in a list: ['predictor.blocks.{*}']",
    ),
)
#: Where YAML begins a new line: the parser counts those of Unicode as well.
_LINE_ENDS = re.compile("[\n\x85\u2028\u2029]")
#: The key of a value that begins at the end of this text.
_KEY = re.compile(r"(?<![\w.-])([\w.-]+)[\"']?\s*:\s*\Z")


def explained(error: yaml.YAMLError, text: str, path: str) -> ConfigError:
    """Return the parser's error as one of ours."""
    if isinstance(error, yaml.reader.ReaderError):
        # Its own position counts bytes or characters, depending on how PyYAML was built.
        odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
        before = text[: odd.start()] if odd is not None else ""
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        return syntax_error(path, f"a character that YAML does not allow ({error.reason})", line, column)
    if not isinstance(error, yaml.MarkedYAMLError):
        return syntax_error(path, f"not YAML: {clip(str(error))}")
    mark, begin = error.problem_mark or error.context_mark, error.context_mark or error.problem_mark
    if mark is None or begin is None:
        return syntax_error(path, f"not YAML: {clip(error.problem or '')}")
    lines = _LINE_ENDS.split(text)
    problem = f"{error.context or ''}: {error.problem or ''}"
    if "could not find expected ':'" in problem:
        return _at(path, begin, "this line is no key: value", "Write ': ' after the key, with the space")
    if "unexpected end of stream" in problem:
        return _at(path, begin, "this text has no closing quote", "Add the quote where it ends")
    if "expected ',' or" in problem:
        return _not_closed(path, begin, mark, lines)
    if "expected node content" in problem and not "".join(lines[mark.line :])[mark.column :].strip():
        return _at(path, mark, "the file ends before a bracket is closed", "Add the closing bracket")
    if "cannot start any token" in problem or "tab character" in problem:
        return _cannot_begin(path, mark, lines)
    if "undefined alias" in problem:
        written = lines[mark.line] if mark.line < len(lines) else ""
        name, key = written[mark.column :].split()[:1], _KEY.search(written[: mark.column])
        shown = (
            HIDDEN if key is not None and is_secret(key[1]) else clip(name[0].rstrip(",]}")) if name else ""
        )
        what = f"the alias {shown} is not defined" if shown else "this alias is not defined"
        return _at(path, mark, what, "Define it with &name before this line")
    for words, told, mend in _TOLD:
        if words in problem:
            return _at(path, mark, told.format(line=begin.line + 1), mend)
    return _at(path, mark, clip(problem.strip(": ")), "")


def _at(path: str, mark: Any, message: str, mend: str) -> ConfigError:
    return syntax_error(path, message, mark.line + 1, mark.column + 1, mend)


def _not_closed(path: str, begin: Any, mark: Any, lines: list[str]) -> ConfigError:
    """A bracket without its partner, which belongs to the end of the line before the one that does not fit."""
    opened = lines[begin.line][begin.column : begin.column + 1]
    closing = "]" if opened == "[" else "}"
    what = f"missing ',' or '{closing}': '{opened}' of line {begin.line + 1}, column {begin.column + 1} is not closed"
    line, column = mark.line, mark.column
    if line > begin.line:
        line -= 1
        while line > begin.line and not lines[line].strip():
            line -= 1
        column = len(lines[line].rstrip())
    return syntax_error(path, what, line + 1, column + 1, f"Add '{closing}' here, or a comma")


def _cannot_begin(path: str, mark: Any, lines: list[str]) -> ConfigError:
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        return _at(path, mark, "a tab cannot indent a line", "Indent with spaces, not tabs")
    char = line[mark.column : mark.column + 1]
    return _at(path, mark, f"{show(char)} cannot begin a value", "Put the text in quotes")
