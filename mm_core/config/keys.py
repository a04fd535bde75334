"""Markers that say which kind of key a field is.

They stand outermost in `Annotated`, beside pydantic's own constraints:

    class WanDiTConfig(SectionModel):
        num_layers: Annotated[int, Field(ge=1)] = 32                                       # effective
        fa_layout: Annotated[str, NoEffect("attention layouts are the backend's")] = "bnsd"  # a note
        qk_norm: Annotated[bool, Only(True, reason="the model always normalises q and k")] = True
        seperated_timestep: Annotated[bool | None, Legacy("separated_timestep")] = None       # a warning
        group_data: Annotated[bool, NotYet(False, reason="samples are not grouped by size")] = False  # a warning

A field without a marker is effective. A key that is no field is unknown: an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mm_core.config.findings import show


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The key is accepted and does nothing here: a note with `reason` when the user writes it.

    `quiet_for` are values that deserve no note, because they ask for nothing (`NoEffect("…",
    quiet_for=(False,))`). `when` is another key of the section and the value of it, or a tuple of values, with which
    this key does nothing; without it, it never does anything.
    """

    reason: str
    quiet_for: tuple[Any, ...] = ()
    when: tuple[str, Any] | None = None

    def holds(self, section: type[BaseModel], values: Mapping[str, Any]) -> bool:
        """Whether the key does nothing beside the others of the section."""
        return self.when is None or _is(self.when, section, values)


@dataclass(frozen=True, slots=True)
class Legacy:
    """An old spelling: a warning, and the value moves to the field `new`. Declare the field `… | None =
    None`.
    """

    new: str


class NotYet:
    """Every other value is right in MindSpeed-MM and will be honoured, but this version cannot: a warning while a
    file is checked by itself, an error in a job (`findings.unavailable_is_error`).

    The value stays valid, so that the rest of the section is checked; a job with it never gets as far as a
    constructor.

    Args:
        values: what this version can do, compared by type and value (True is not 1).
        reason: what is missing, and what to do instead if there is something; a part of a sentence.
        unless: another key of the section and a value of it with which this one asks for nothing.
    """

    __slots__ = ("reason", "unless", "values")

    def __init__(self, *values: Any, reason: str, unless: tuple[str, Any] | None = None) -> None:
        if not values:
            raise ValueError("NotYet() needs at least one value that is available")
        self.values = values
        self.reason = reason
        self.unless = unless

    def __repr__(self) -> str:
        return f"NotYet({', '.join(map(repr, self.values))}, reason={self.reason!r})"

    def accepts(self, value: Any) -> bool:
        return _among(value, self.values)

    def idle(self, section: type[BaseModel], written: Mapping[str, Any]) -> bool:
        """Whether the key asks for nothing beside the others that are written in the section."""
        return self.unless is not None and _is(self.unless, section, written)


class Only:
    """Every value but these is refused, because honouring or ignoring it would change the mathematics.

    Args:
        values: the accepted values, compared by type and value (True is not 1). None alone: the key is
            known and refused.
        reason: why others are refused and what to do instead; a part of a sentence.
    """

    __slots__ = ("reason", "values")

    def __init__(self, *values: Any, reason: str) -> None:
        if not values:
            raise ValueError("Only() needs at least one accepted value")
        self.values = values
        self.reason = reason

    def __repr__(self) -> str:
        return f"Only({', '.join(map(repr, self.values))}, reason={self.reason!r})"

    def accepts(self, value: Any) -> bool:
        return _among(value, self.values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if self.accepts(value):
            return value
        accepted = " or ".join(show(ok) for ok in self.values if ok not in (None, ()))
        why = f"only {accepted} is accepted: {self.reason}" if accepted else self.reason
        raise PydanticCustomError("refused_value", "{why}", {"why": why})


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of several; lists are compared with tuples, as JSON has no tuples."""
    value = tuple(value) if isinstance(value, list) else value
    return any(isinstance(value, bool) == isinstance(ok, bool) and value == ok for ok in values)


def _is(condition: tuple[str, Any], section: type[BaseModel], values: Mapping[str, Any]) -> bool:
    """Whether a key of the section has a value, written or by default."""
    key, value = condition
    own = values.get(key, section.model_fields[key].default)
    return own in value if isinstance(value, tuple) else bool(own == value)
