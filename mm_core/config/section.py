"""Base class of every configuration class, and the check of a section against one."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError

from mm_core.config.document import Document
from mm_core.config.findings import NOT_AVAILABLE, Finding, clip, has_errors, show
from mm_core.config.keys import Legacy, NoEffect, NotYet
from mm_core.config.messages import describe_errors
from mm_core.config.origin import KeyPath, dotted

_SCALARS = frozenset({"int", "float", "bool", "str"})
_NOT_SCHEMA = frozenset({"default", "metadata", "config", "expected", "serialization"})

M = TypeVar("M", bound=BaseModel)


def _make_scalars_strict(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in _SCALARS:
            schema["strict"] = True
        for key, value in schema.items():
            if key not in _NOT_SCHEMA:
                _make_scalars_strict(value)
    elif isinstance(schema, list | tuple):
        for item in schema:
            _make_scalars_strict(item)


def invalid(key: str, why: str) -> PydanticCustomError:
    """Return an error to raise from a model validator, so that the finding points at `key` of this section.

    `raise invalid("min_timestep_boundary", "must be smaller than max_timestep_boundary (0.2)")`
    """
    return PydanticCustomError("invalid_value", "{why}", {"why": why, "key": key})


class SectionModel(BaseModel):
    """A section of a configuration file; plugins derive their config classes from it.

    Unknown keys are errors. Scalars are strict: "128" is no int, 1 is no bool, 40.0 is no int; an int is
    accepted for a float; NaN and infinity are not. JSON lists are accepted for tuples. Instances are
    immutable. The kind of a key is said by the markers of `mm_core.config.keys`.

    A component without parameters (a fixed transform) sets `has_weights = False`, so that nobody asks where
    its weights are.

    An autoencoder's class may have `latent_channels` and `size_problem` (see `mm_core.config.latents`), so
    that a job that does not fit it is refused before anything is built.
    """

    has_weights: ClassVar[bool] = True

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # ConfigDict(strict=True) would refuse lists for tuples and dicts for sections as well.
        schema = handler(source)
        _make_scalars_strict(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _move_legacy_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        moved = {old: new for old, new in legacy_keys(cls).items() if data.get(old) is not None}
        if not moved:
            return data
        result = dict(data)
        for old, new in moved.items():
            if new in result:
                raise PydanticCustomError(
                    "invalid_value",
                    "{why}",
                    {"why": f'both "{old}" and its newer spelling "{new}" are given', "key": old},
                )
            result[new] = result.pop(old)
        return result

    def effective(self) -> dict[str, Any]:
        """Return the fields that do something, as plain data (nested sections as dicts), defaults included.

        A field that is not available yet is left out while it asks for nothing (null, false, empty): a constructor
        need not know it.
        """
        return _effective(self)


@dataclass(frozen=True)
class Checked(Generic[M]):
    """What a check returns: the section if it has no error, and all findings."""

    section: M | None
    findings: tuple[Finding, ...]


def check_section(
    cls: type[M],
    document: Document,
    path: KeyPath = (),
    *,
    label: str = "",
    data: Any = None,
    also_known: Collection[str] = (),
) -> Checked[M]:
    """Check the section of `document` at `path` against `cls`.

    Args:
        label: what to call the section in messages; its dotted path by default.
        data: the section's data, if part of it is checked elsewhere; by default what stands at `path`.
        also_known: keys of the section that are checked elsewhere, for suggestions.

    Every finding points at the key or value in the file.
    """
    if data is None:
        data = document.value(path)
    label = label or dotted(path) or document.path
    findings = list(_marked_keys(cls, data, document, path))
    section: M | None = None
    try:
        section = cls.model_validate(data)
    except ValidationError as error:
        errors = describe_errors(error, cls, data, document, path, label, also_known)
        wrong = {finding.path for finding in errors}  # what is wrong is said of a value, and nothing else
        findings = [finding for finding in findings if finding.path not in wrong] + errors
    except Exception as error:  # noqa: BLE001 - a validator of a plugin may raise anything
        text = f"{label} cannot be checked: {cls.__module__}.{cls.__qualname__} failed, {_told(error)}"
        mend = "This is a defect of the config class rather than of the file; tell its distribution"
        origin = document.key_origin(path)
        findings.append(Finding.at(origin, "error", "broken-config", text, path=path, suggestion=mend))
    return Checked(None if has_errors(findings) else section, tuple(findings))


def _told(error: Exception) -> str:
    text = clip(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def legacy_keys(cls: type[BaseModel]) -> dict[str, str]:
    """Return old spelling -> field that takes its value."""
    return {name: mark.new for name, field in cls.model_fields.items() for mark in markers(field, Legacy)}


Mark = TypeVar("Mark")


def markers(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    """Return the markers of one kind on a field."""
    return [mark for mark in field.metadata if isinstance(mark, kind)]


def nested_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes that a field's annotation mentions, through unions, lists and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal or origin is None:
        return []
    return [
        cls
        for arg in typing.get_args(annotation)
        if not isinstance(arg, types.EllipsisType)
        for cls in nested_sections(arg)
    ]


def section_for(candidates: list[type[BaseModel]], data: Mapping[str, Any]) -> type[BaseModel] | None:
    """Return which of several classes describes `data`, by the fields that are `Literal` (discriminators)."""
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    for cls in candidates:
        for name, field in cls.model_fields.items():
            if typing.get_origin(field.annotation) is typing.Literal:
                value = data.get(name)
                if isinstance(value, str) and value in typing.get_args(field.annotation):
                    return cls
    return None


def walk_sections(
    cls: type[BaseModel], data: Any, path: KeyPath
) -> Iterator[tuple[type[BaseModel], Mapping[str, Any], KeyPath]]:
    """Yield (class, data, path) of a section and of every section inside it, as far as the data has their
    shape.
    """
    if not isinstance(data, Mapping):
        return
    yield cls, data, path
    for key, value in data.items():
        field = cls.model_fields.get(key)
        if field is None:
            continue
        candidates = nested_sections(field.annotation)
        if candidates:
            yield from _walk_value(candidates, value, (*path, key))


def _walk_value(
    candidates: list[type[BaseModel]], value: Any, path: KeyPath
) -> Iterator[tuple[type[BaseModel], Mapping[str, Any], KeyPath]]:
    if isinstance(value, Mapping):
        nested = section_for(candidates, value)
        if nested is not None:
            yield from walk_sections(nested, value, path)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk_value(candidates, item, (*path, index))


def _marked_keys(cls: type[BaseModel], data: Any, document: Document, path: KeyPath) -> Iterator[Finding]:
    """Yield a note for each key without effect that is written, and a warning for each legacy spelling and each
    value that is not available yet.
    """
    for section, values, where in walk_sections(cls, data, path):
        for key, value in values.items():
            field = section.model_fields.get(key)
            if field is None:
                continue
            place = (*where, key)
            origin = document.key_origin(place)
            for mark in markers(field, NoEffect):
                quiet = any(type(value) is type(quiet) and value == quiet for quiet in mark.quiet_for)
                if not quiet and mark.holds(section, values):
                    text = f'"{key}" has no effect here: {mark.reason}'
                    yield Finding.at(origin, "note", "no-effect", text, path=place)
            for later in markers(field, NotYet):
                if not later.accepts(value) and not later.idle(section, values):
                    # A whole section says nothing that its key does not.
                    shown = "" if isinstance(value, Mapping) else f" is {show(value, place)}"
                    what = f'"{key}"{shown}'
                    yield not_available(document, place, what, later.reason, _available(later.values))
            for old in markers(field, Legacy):
                if value is not None:
                    text = f'"{key}" is an old spelling of "{old.new}"'
                    mend = f'Write "{old.new}": {show(value, place)}'
                    yield Finding.at(origin, "warning", "legacy-key", text, path=place, suggestion=mend)


def _available(values: tuple[Any, ...]) -> str:
    """How to mend a value that is not available yet."""
    shown = [show(value) for value in values if value is not None and value != ()]
    return f"Available: {', '.join(shown)}" if shown else "It runs without the key"


def not_available(document: Document, path: KeyPath, what: str, reason: str, suggestion: str = "") -> Finding:
    """Return the warning that something which is right in the file cannot be done by this version.

    In a job it becomes an error: `findings.unavailable_is_error`.
    """
    text = f"{what}: {reason}; this version cannot run it"
    origin = document.origin(path)
    return Finding.at(origin, "warning", NOT_AVAILABLE, text, path=path, suggestion=suggestion)


def _effective(section: BaseModel) -> dict[str, Any]:
    result: dict[str, Any] = {}
    cls, values = type(section), dict(section)
    for name, value in values.items():
        field = cls.model_fields[name]
        if markers(field, Legacy) or any(idle.holds(cls, values) for idle in markers(field, NoEffect)):
            continue
        if markers(field, NotYet) and not value:
            continue
        result[name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _effective(value)
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
