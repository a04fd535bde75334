"""Markers that say which kind of key a field is.

They stand outermost in `Annotated`, beside pydantic's own constraints:

    class WanDiTConfig(SectionModel):
        num_layers: Annotated[int, Field(ge=1)] = 32                                       # effective
        fa_layout: Annotated[str, NoEffect("attention layouts are the backend's")] = "bnsd"  # a note
        qk_norm: Annotated[bool, Only(True, reason="the model always normalises q and k")] = True
        seperated_timestep: Annotated[bool | None, Legacy("separated_timestep")] = None       # a warning

A field without a marker is effective. A key that is no field is unknown: an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mm_core.config.findings import show


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The key is accepted and does nothing here: a note with `reason` when the user writes it.

    `quiet_for` are values that deserve no note, because they ask for nothing (`NoEffect("…",
    quiet_for=(False,))`).
    """

    reason: str
    quiet_for: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Legacy:
    """An old spelling: a warning, and the value moves to the field `new`. Declare the field `… | None =
    None`.
    """

    new: str


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
        return any(isinstance(value, bool) == isinstance(ok, bool) and value == ok for ok in self.values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if self.accepts(value):
            return value
        accepted = " or ".join(show(ok) for ok in self.values if ok not in (None, ()))
        why = f"only {accepted} is accepted: {self.reason}" if accepted else self.reason
        raise PydanticCustomError("refused_value", "{why}", {"why": why})
