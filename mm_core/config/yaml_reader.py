"""YAML and the place of every key and value. Plain data only: no tags, no code."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mm_core.config.document import MAX_DEPTH, Document, syntax_error
from mm_core.config.findings import ConfigError, clip, show
from mm_core.config.origin import KeyPath, Origin

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
#: YAML 1.1 reads 1e-5 as text, because it has no dot; nobody means that.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+\Z")
_SEXAGESIMAL = re.compile(r"[-+]?\d+(?::[0-5]?\d)+")
#: Aliases can be nested so that a short file expands to billions of values.
_MAX_VALUES = 20_000


class _Builder:
    def __init__(self, path: str) -> None:
        self.path = path
        self.origins: dict[KeyPath, Origin] = {}
        self.keys: dict[KeyPath, Origin] = {}
        self._constructor = yaml.constructor.SafeConstructor()
        self._values = 0
        self._open: set[int] = set()

    def origin(self, node: Node) -> Origin:
        return Origin("file", self.path, node.start_mark.line + 1, node.start_mark.column + 1)

    def fail(self, node: Node, message: str, suggestion: str = "") -> ConfigError:
        mark = node.start_mark
        return syntax_error(self.path, message, mark.line + 1, mark.column + 1, suggestion)

    def build(self, node: Node, path: KeyPath) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES or len(path) > MAX_DEPTH:
            raise self.fail(
                node, "the file holds too many or too deeply nested values (aliases multiply them)"
            )
        if id(node) in self._open:
            raise self.fail(node, "an alias contains itself")
        self.origins[path] = self.origin(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                self._standard_tag(node, "seq")
                items = []
                for index, item in enumerate(node.value):
                    self.keys[(*path, index)] = self.origin(item)
                    items.append(self.build(item, (*path, index)))
                return items
            assert isinstance(node, MappingNode)
            self._standard_tag(node, "map")
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged.append(value_node)
                continue
            name = self._key(key_node)
            if name in result:
                first = self.keys[(*path, name)]
                raise self.fail(
                    key_node,
                    f'duplicate key "{clip(name)}", first given at line {first.line}',
                    "Remove one of them",
                )
            result[name] = None
            self.keys[(*path, name)] = self.origin(key_node)
            result[name] = self.build(value_node, (*path, name))
        for value_node in merged:
            self._merge(value_node, result, path)
        return result

    def _merge(self, node: Node, result: dict[str, Any], path: KeyPath) -> None:
        """Add the members of `<<: *anchor` (or of a list of them) that the mapping does not have itself."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise self.fail(source, "'<<' merges objects only")
            if id(source) in self._open:
                raise self.fail(source, "an alias contains itself")
            self._open.add(id(source))
            for key_node, value_node in source.value:
                if key_node.tag == f"{_TAG}merge":
                    self._merge(value_node, result, path)
                    continue
                name = self._key(key_node)
                if name not in result:
                    self.keys[(*path, name)] = self.origin(key_node)
                    result[name] = self.build(value_node, (*path, name))
            self._open.discard(id(source))

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise self.fail(node, "a key must be a text")
        if node.tag not in (
            f"{_TAG}str",
            f"{_TAG}int",
            f"{_TAG}float",
            f"{_TAG}bool",
            f"{_TAG}null",
            f"{_TAG}value",
        ):
            raise self.fail(node, f"a key must be a text, not {node.tag}")
        return str(node.value)

    def _standard_tag(self, node: Node, name: str) -> None:
        if node.tag != f"{_TAG}{name}":
            raise self.fail(node, f"the tag {node.tag} is not accepted: only plain data is read", "Remove it")

    def _scalar(self, node: ScalarNode) -> Any:
        plain = not node.style
        kind = node.tag.removeprefix(_TAG)
        if plain and kind == "str" and _FLOAT.match(node.value):
            return float(node.value.replace("_", ""))
        if kind in ("str", "timestamp", "value") or (plain and _SEXAGESIMAL.match(node.value)):
            return node.value
        if kind not in ("null", "bool", "int", "float"):
            raise self.fail(node, f"the tag {node.tag} is not accepted: only plain data is read", "Remove it")
        try:
            value = self._constructor.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError) as error:
            raise self.fail(node, f"{show(node.value)} is no {kind}") from error
        if isinstance(value, float) and not -float("inf") < value < float("inf"):
            raise self.fail(node, f"{node.value} is not a finite number", "Write a finite number")
        return value


def parse_yaml(text: str, path: str) -> Document:
    """Parse one YAML document. Raises ConfigError with the place of the first mistake."""
    try:
        depth = 0
        # A first pass over the events is flat; composing recurses, in C without a guard.
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    begin: Any = event.start_mark
                    raise syntax_error(
                        path,
                        f"objects and lists are nested more than {MAX_DEPTH} deep",
                        begin.line + 1,
                        begin.column + 1,
                    )
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        parts = [part for part in (error.context, error.problem) if part]
        if error.context_mark and error.context and error.context_mark.line + 1 != line:
            parts[0] += f" of line {error.context_mark.line + 1}"
        raise syntax_error(path, ": ".join(parts) or "not YAML", line, column, _hint(error, text)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.position, int) else ""
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise syntax_error(
            path, f"a character that YAML does not allow ({error.reason})", line, column
        ) from None
    if node is None:
        raise syntax_error(path, "the file holds only comments", 1, 1, "Write at least one key: value")
    builder = _Builder(path)
    data = builder.build(node, ())
    return Document(path, data, builder.origins, builder.keys)


def _hint(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    if mark is None:
        return ""
    lines = text.split("\n")
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        return "Indent with spaces, not tabs"
    problem = error.problem or ""
    if "mapping values are not allowed" in problem:
        return "Put a text that holds ': ' in quotes, or check the indentation"
    if "expected <block end>" in problem:
        return "Check the indentation of this line against the lines around it"
    if "alias" in (error.context or "") or "alphabetic or numeric character" in problem:
        return "Quote a pattern that stands in a list: ['predictor.blocks.{*}']"
    if "undefined alias" in problem:
        return "Define it with &name before this line"
    return ""
