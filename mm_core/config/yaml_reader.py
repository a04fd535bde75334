"""YAML and the place of every key and value. Plain data only: no tags, no code."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mm_core.config.document import MAX_DEPTH, MAX_VALUES, Document, syntax_error, too_many_values
from mm_core.config.findings import ConfigError, clip, show
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.secrets import HIDDEN, in_secret

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
#: YAML 1.1 reads 1e-5 as text, because it has no dot; nobody means that.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
#: It reads 1:30 as 90, which is kept as text,
_SEXAGESIMAL = re.compile(r"[-+]?\d[\d_]*(?::[0-5]?\d)+")
#: and 010 as 8, which is refused: both readings are somebody's.
_OCTAL = re.compile(r"[-+]?0[0-7_]+\Z")
_MOST_DIGITS = 400


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
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            # Aliases can be nested so that a short file expands to billions of values.
            raise self.fail(
                node, "the file holds too many or too deeply nested values (aliases multiply them)"
            )
        if id(node) in self._open:
            raise self.fail(node, "an alias contains itself")
        self.origins[path] = self.origin(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                self._standard_tag(node, "seq", path)
                items = []
                for index, item in enumerate(node.value):
                    self.keys[(*path, index)] = self.origin(item)
                    items.append(self.build(item, (*path, index)))
                return items
            assert isinstance(node, MappingNode)
            self._standard_tag(node, "map", path)
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own, merged = self._members(node)
        for name, (key_node, value_node) in own.items():
            self.keys[(*path, name)] = self.origin(key_node)
            result[name] = self.build(value_node, (*path, name))
        if merged is not None:
            self._merge(merged, result, path)
        return result

    def _members(self, node: MappingNode) -> tuple[dict[str, tuple[Node, Node]], Node | None]:
        """Return the members that a mapping has itself, and what `<<` names. A key written twice is an error, one
        that overrides a merged one is not.
        """
        own: dict[str, tuple[Node, Node]] = {}
        merged: tuple[Node, Node] | None = None
        for key_node, value_node in node.value:
            merge = key_node.tag == f"{_TAG}merge"
            name = "<<" if merge else self._key(key_node)
            first = merged if merge else own.get(name)
            if first is not None:
                text = f'duplicate key "{clip(name)}", first given at line {first[0].start_mark.line + 1}'
                mend = "Write one: <<: [*first, *second]" if merge else "Remove one of them"
                raise self.fail(key_node, text, mend)
            if merge:
                merged = (key_node, value_node)
            else:
                own[name] = (key_node, value_node)
        return own, merged[1] if merged is not None else None

    def _merge(self, node: Node, result: dict[str, Any], path: KeyPath) -> None:
        """Add the members of `<<: *anchor` (or of a list of them) that the mapping does not have itself."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise self.fail(source, "'<<' merges objects only")
            if id(source) in self._open:
                raise self.fail(source, "an alias contains itself")
            self._values += 1  # merges of merges multiply as well
            if self._values > MAX_VALUES:
                raise self.fail(source, "the file merges too many objects")
            self._open.add(id(source))
            own, merged = self._members(source)
            for name, (key_node, value_node) in own.items():
                if name not in result:
                    self.keys[(*path, name)] = self.origin(key_node)
                    result[name] = self.build(value_node, (*path, name))
            if merged is not None:
                self._merge(merged, result, path)
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
            raise self.fail(node, f"a key must be a text, not {clip(node.tag)}")
        return str(node.value)

    def _standard_tag(self, node: Node, name: str, path: KeyPath) -> None:
        if node.tag != f"{_TAG}{name}":
            raise self._bad_tag(node, path)

    def _bad_tag(self, node: Node, path: KeyPath) -> ConfigError:
        tag = HIDDEN if in_secret(path) else clip(node.tag)  # a password may begin with "!"
        return self.fail(node, f"the tag {tag} is not accepted: only plain data is read", "Remove it")

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        plain = not node.style
        kind = node.tag.removeprefix(_TAG)
        if plain and kind == "str" and len(node.value) <= _MOST_DIGITS and _FLOAT.match(node.value):
            return self._finite(node, float(node.value.replace("_", "")))
        if kind in ("str", "timestamp", "value") or (plain and _SEXAGESIMAL.match(node.value)):
            return node.value
        if kind not in ("null", "bool", "int", "float"):
            raise self._bad_tag(node, path)
        if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
            raise self.fail(node, f"a number of {len(node.value)} characters has too many digits")
        try:
            value = self._constructor.construct_object(node)
        except (ValueError, KeyError, IndexError, yaml.YAMLError) as error:
            raise self.fail(node, f"{show(node.value, path)} is no {kind}") from error
        if plain and kind == "int" and _OCTAL.match(node.value) and not in_secret(path):
            text = f"{node.value} is {value} to YAML (octal digits after the 0)"
            decimal = str(int(node.value.replace("_", "")))
            mend = f"Write {value}, or {decimal} if that is meant"
            raise self.fail(node, text, mend if str(value) != decimal else f"Write {value}")
        return self._finite(node, value)

    def _finite(self, node: ScalarNode, value: Any) -> Any:
        if isinstance(value, float) and not -float("inf") < value < float("inf"):
            raise self.fail(node, f"{clip(node.value)} is not a finite number", "Write a finite number")
        return value


def parse_yaml(text: str, path: str) -> Document:
    """Parse one YAML document. Raises ConfigError with the place of the first mistake."""
    try:
        depth = values = 0
        # A first pass over the events is flat; composing recurses, in C without a guard.
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.NodeEvent):
                values += 1  # keys are counted as well
                if values > 2 * MAX_VALUES:
                    mark: Any = event.start_mark
                    raise too_many_values(path, mark.line + 1, mark.column + 1)
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
    except yaml.YAMLError as error:
        from mm_core.config.yaml_errors import explained

        raise explained(error, text, path) from None
    if node is None:
        raise syntax_error(path, "the file holds only comments", 1, 1, "Write at least one key: value")
    builder = _Builder(path)
    data = builder.build(node, ())
    return Document(path, data, builder.origins, builder.keys)
