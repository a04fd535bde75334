"""The resolved configuration: every value, where it comes from, and what hooks changed. Stored with a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.origin import DEFAULT, KeyPath, dotted


def plain(value: Any) -> Any:
    """Return JSON-able data: sections as objects, tuples as lists."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def component_values(component: ComponentConfig, id_key: str = "model_id") -> dict[str, Any]:
    """Return a component's section with every default filled in."""
    values: dict[str, Any] = {id_key: component.model_id}
    if component.from_pretrained is not None:
        values["from_pretrained"] = component.from_pretrained
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


def origins_of(name: str, values: Any, document: Document) -> dict[str, str]:
    """Return `model.predictor.num_layers` -> where it was written, for every leaf of one file."""
    result = {}
    for path, _ in leaves(values):
        written = document.has(path)
        result[dotted((name, *path))] = str(document.origin(path) if written else DEFAULT)
    return result
