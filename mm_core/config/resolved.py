"""The resolved configuration: every value, where it comes from, and what hooks changed. Stored with a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.origin import DEFAULT, KeyPath, Origin, dotted
from mm_core.config.secrets import hide, without_secrets
from mm_core.config.section import legacy_keys, walk_sections


def plain(value: Any) -> Any:
    """Return JSON-able data: sections as objects, tuples as lists, `***` for secrets."""
    return without_secrets(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def component_values(component: ComponentConfig, id_key: str = "") -> dict[str, Any]:
    """Return a component's section with every default filled in."""
    id_key = id_key or component.id_key
    values: dict[str, Any] = {id_key: component.model_id}
    if component.from_pretrained is not None:
        values["from_pretrained"] = hide(component.from_pretrained)
    if component.dtype is not None:
        values["dtype"] = component.dtype
    if component.init != "pretrained":
        values["init"] = component.init
    rest = plain(component.config) if component.config is not None else plain(component.fields)
    return values | {key: value for key, value in rest.items() if key != id_key}


def place(values: dict[str, Any], path: KeyPath, section: dict[str, Any]) -> None:
    """Put a section at its path, in a tree that has everything around it."""
    node: Any = values
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = section


def leaves(value: Any, path: KeyPath = ()) -> Iterable[tuple[KeyPath, Any]]:
    """Yield (path, value) of everything that is no object or non-empty list."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


#: Place of a value -> place of the old spelling under which it may be written.
LegacyPaths: TypeAlias = dict[KeyPath, KeyPath]


def legacy_paths(
    top: type[BaseModel], components: Iterable[ComponentConfig], document: Document
) -> LegacyPaths:
    """Return where values of a file may stand under an old spelling: of its top level, and of its components."""
    roots: list[tuple[type[BaseModel], KeyPath]] = [(top, ())]
    roots += [(type(c.config), c.path) for c in components if c.config is not None]
    found: LegacyPaths = {}
    for cls, root in roots:
        data = document.value(root) if document.has(root) else {}
        for section, _, path in walk_sections(cls, data, root):
            for old, new in legacy_keys(section).items():
                found[(*path, new)] = (*path, old)
    return found


def written_at(path: KeyPath, document: Document, legacy: LegacyPaths) -> Origin:
    """Return where a value was written, perhaps under an old spelling; the default if it was not."""
    for length in range(len(path), 0, -1):
        old = legacy.get(path[:length])
        if old is not None and document.has(old) and document.value(old) is not None:
            return document.origin((*old, *path[length:]))
    if path in legacy.values() and document.has(path) and document.value(path) is not None:
        return DEFAULT  # its value is at the newer spelling
    return document.origin(path) if document.has(path) else DEFAULT


def origins_of(name: str, values: Any, document: Document, legacy: LegacyPaths) -> dict[str, str]:
    """Return `model.predictor.num_layers` -> where it was written, for every leaf of one file."""
    return {dotted((name, *path)): str(written_at(path, document, legacy)) for path, _ in leaves(values)}
