"""pydantic's errors, said as findings with a place in the file and a way to mend them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from mm_core.config.document import Document
from mm_core.config.findings import Finding, clip, closest, did_you_mean, misspelt, show
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.secrets import HIDDEN, in_secret

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: pydantic's error type -> what was expected, when the type is wrong.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of reasonable size",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "mapping_type": "an object",
    "none_required": "null",
    "path_type": "a path in quotes",
}
_RANGES = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be smaller than"),
    "less_than_equal": ("le", "must be at most"),
    "multiple_of": ("multiple_of", "must be a multiple of"),
}
_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_LENGTHS = {
    "too_short": ("min_length", "at least"),
    "string_too_short": ("min_length", "at least"),
    "too_long": ("max_length", "at most"),
    "string_too_long": ("max_length", "at most"),
}


def describe_errors(
    error: ValidationError,
    cls: type[BaseModel],
    data: Any,
    document: Document,
    base: KeyPath,
    label: str,
    also_known: Collection[str] = (),
) -> list[Finding]:
    """Return one finding for each place that pydantic complains about.

    The branches of a union complain separately; they become one finding that names every accepted kind.
    """
    from mm_core.config.section import legacy_keys, walk_sections

    renamed = {new: old for old, new in legacy_keys(cls).items() if isinstance(data, Mapping) and old in data}
    places: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        places.setdefault(_place(detail, data, renamed), []).append(detail)
    around = {place[:length] for place in places for length in range(len(place))}
    fields = {where: list(section.model_fields) for section, _, where in walk_sections(cls, data, ())}
    findings = []
    for place, details in places.items():
        if place in around and all(_is_mismatch(detail) for detail in details):
            continue  # another branch of the union fits better and says more
        known = fields.get(place[:-1], []) + (list(also_known) if len(place) == 1 else [])
        findings.append(_describe(place, details, cls, data, document, base, label, known))
    return findings


def _place(detail: ErrorDetails, data: Any, renamed: Mapping[str, str]) -> KeyPath:
    """Return the path of an error inside `data`, leaving out the names of union branches."""
    node = data
    path: list[str | int] = []
    location = list(detail["loc"])
    for index, part in enumerate(location):
        if isinstance(part, str) and isinstance(node, Mapping):
            if not path and part not in node and part in renamed:
                part = renamed[part]
            last = index == len(location) - 1
            if part in node or (last and detail["type"] == "missing"):
                path.append(part)
                node = node.get(part)
        elif isinstance(part, int) and isinstance(node, list | tuple) and part < len(node):
            path.append(part)
            node = node[part]
    key = detail.get("ctx", {}).get("key")
    if isinstance(key, str) and isinstance(node, Mapping):
        path.append(key if key in node else renamed.get(key, key))
    return tuple(path)


def _is_mismatch(detail: ErrorDetails) -> bool:
    return detail["type"] in _EXPECTED or detail["type"] in (
        "literal_error",
        "enum",
        "extra_forbidden",
        "missing",
    )


def _describe(
    place: KeyPath,
    details: list[ErrorDetails],
    cls: type[BaseModel],
    data: Any,
    document: Document,
    base: KeyPath,
    label: str,
    known: Collection[str],
) -> Finding:
    path = (*base, *place)
    first = details[0]
    key = clip(_name(place)) if place else label
    kinds = {detail["type"] for detail in details}
    if kinds == {"extra_forbidden"}:
        owner = label if len(place) == 1 else _inside(label, place[:-1])
        return Finding.at(
            document.key_origin(path),
            "error",
            "unknown-key",
            f'unknown key "{key}" in {owner}',
            path=path,
            suggestion=did_you_mean(key, list(known)),
        )
    wanted = first["loc"][-1] if first["loc"] else None
    if kinds == {"missing"} and isinstance(wanted, int):
        text = f'"{key}" is {show(document.value(path), path)}: must have exactly {_items(details)}'
        return Finding.at(document.origin(path), "error", "out-of-range", text, path=path)
    if kinds == {"missing"}:
        owner = label if len(place) == 1 else _inside(label, place[:-1])
        written = document.value(path[:-1]) if document.has(path[:-1]) else {}
        slip = misspelt(str(place[-1]), written)
        if slip is not None and place and slip not in cls.model_fields:
            return _slip(document, (*path[:-1], slip), owner, key)
        mend = f'Add "{key}"'
        return Finding.at(
            document.key_origin(path[:-1]),
            "error",
            "missing-key",
            f'{owner} needs "{key}"',
            path=path,
            suggestion=mend,
        )
    origin = document.origin(path)
    value = first["input"]
    special = next((detail for detail in details if not _is_mismatch(detail)), None)
    if special is not None:
        code, text = _special(special)
        shown = "" if special.get("ctx", {}).get("key") else f" is {show(special['input'], path)}"
        if code in ("invalid-value", "refused-value") and (
            not place or isinstance(special["input"], Mapping)
        ):
            shown = ""
        quoted = f'"{key}"{shown}: ' if place else f"{label}: "
        mend = _closest_tag(special)
        tag = str(special.get("ctx", {}).get("discriminator", "")).strip("'")
        if tag and isinstance(special["input"], Mapping):
            slip = misspelt(tag, special["input"])
            if special["type"] == "union_tag_not_found" and slip is not None:
                return _slip(document, (*path, slip), _inside(label, place), tag)
            if tag in special["input"]:
                path = (*path, tag)
                origin = document.origin(path)
        if in_secret(path) and isinstance(special["input"], str) and special["input"]:
            text = text.replace(special["input"], HIDDEN)  # a validator may quote what it refuses
        return Finding.at(origin, "error", code, quoted + text, path=path, suggestion=mend)
    missing = [detail for detail in details if _is_missing_item(detail)]
    expected = " or ".join(
        dict.fromkeys(
            f"a list of {_items(missing)}" if detail in missing else _expected(detail) for detail in details
        )
    )
    text = (
        f'"{key}" is {show(value, path)}, expected {expected}'
        if place
        else f"{label} is {show(value, path)}, expected {expected}"
    )
    mend = "" if in_secret(path) else _mend(value, kinds, details)
    return Finding.at(origin, "error", "wrong-type", text, path=path, suggestion=mend)


def _slip(document: Document, path: KeyPath, owner: str, wanted: str) -> Finding:
    """A required key that is there, misspelt."""
    text = f'unknown key "{clip(str(path[-1]))}" in {owner}'
    mend = f'Did you mean "{wanted}"?'
    return Finding.at(document.key_origin(path), "error", "unknown-key", text, path=path, suggestion=mend)


def _name(place: KeyPath) -> str:
    """Return the last key of a path with the list indices after it: `patch_size[2]`."""
    start = max((i for i, part in enumerate(place) if isinstance(part, str)), default=0)
    return dotted(place[start:])


def _inside(label: str, place: KeyPath) -> str:
    return f"{clip(dotted(place))} of {label}" if place else label


def _is_missing_item(detail: ErrorDetails) -> bool:
    return detail["type"] == "missing" and bool(detail["loc"]) and isinstance(detail["loc"][-1], int)


def _items(missing: Iterable[ErrorDetails]) -> str:
    """Return how many values a list of fixed length has, from the indices that are missing: the last one's
    is among them.
    """
    count = 1 + max(index for detail in missing if isinstance(index := detail["loc"][-1], int))
    return f"{count} value{'s' if count != 1 else ''}"


def _closest_tag(detail: ErrorDetails) -> str:
    """Return which section of several a misspelt discriminator means, or nothing."""
    if detail["type"] != "union_tag_invalid":
        return ""
    context = detail.get("ctx", {})
    tags = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
    near = closest(str(context.get("tag", "")), tags)
    return f'Did you mean "{near}"?' if near is not None else ""


def _expected(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in ("literal_error", "enum"):
        return str(detail.get("ctx", {}).get("expected", "")).replace("'", '"')
    return _EXPECTED.get(kind, detail["msg"])


def _special(detail: ErrorDetails) -> tuple[str, str]:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "refused_value":
        return "refused-value", str(context["why"])
    if kind == "invalid_value":
        return "invalid-value", str(context["why"])
    if kind in _RANGES:
        name, words = _RANGES[kind]
        return "out-of-range", f"{words} {context[name]}"
    if kind in _LENGTHS:
        name, words = _LENGTHS[kind]
        count = context[name]
        if context.get("field_type") == "Tuple":
            return "out-of-range", f"must have exactly {count} value{'s' if count != 1 else ''}"
        unit = "character" if kind.startswith("string") else "item"
        return "out-of-range", f"must have {words} {count} {unit}{'s' if count != 1 else ''}"
    if kind == "finite_number":
        return "out-of-range", "must be a finite number"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = str(context.get("expected_tags", "")).replace("'", '"')
        name = str(context.get("discriminator", "")).strip("'")
        return "invalid-value", f'"{name}" must be one of {tags}' if tags else f'"{name}" is missing'
    if kind == "value_error":
        return "invalid-value", str(context.get("error", detail["msg"]))
    return "invalid-value", detail["msg"]


def _mend(value: Any, kinds: Iterable[str], details: Iterable[ErrorDetails]) -> str:
    kinds = set(kinds)
    if isinstance(value, str):
        try:
            meant = json.loads(value.lower())
        except ValueError:
            meant = None
        numeric = isinstance(meant, int | float) and not isinstance(meant, bool)
        if (numeric and kinds & {"int_type", "float_type"}) or (
            isinstance(meant, bool) and "bool_type" in kinds
        ):
            return f"Remove the quotes: {json.dumps(meant)}"
        for detail in details:
            if detail["type"] == "literal_error":
                options = [part.strip(" '\"") for part in _expected(detail).replace(" or ", ",").split(",")]
                near = did_you_mean(value, options)
                return near if near.startswith("Did") else ""
        if kinds & {"bool_type", "bool_parsing"} and (
            meant := _BOOLEANS.get(value.lower()) or closest(value.lower(), ("true", "false"))
        ):
            return f"Write {meant}"
        if kinds == {"tuple_type"} or kinds == {"list_type"}:
            return (
                "Write []"
                if value.lower() in ("none", "null", "")
                else f"Write [{json.dumps(value, ensure_ascii=False)}]"
            )
    if "bool_type" in kinds and value in (0, 1) and not isinstance(value, bool):
        return f"Write {'true' if value else 'false'}"
    if isinstance(value, float) and value.is_integer() and kinds & {"int_type", "int_from_float"}:
        return f"Write {int(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and kinds == {"string_type"}:
        return f'Put it in quotes: "{value}"'
    return ""
