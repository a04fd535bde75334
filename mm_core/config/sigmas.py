"""The type of a key that holds a noise level. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _no_timestep(value: Any) -> Any:
    """Say of a boundary that was written as one of 1000 timesteps what it is as a sigma."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 100 <= value < 1000:
        why = f"must be smaller than 1.0, for it is a sigma; timestep {value:g} of 1000 is sigma {value / 1000:g}"
        raise PydanticCustomError("invalid_value", "{why}", {"why": why})
    return value


Boundary: TypeAlias = Annotated[float, Field(gt=0.0, lt=1.0), BeforeValidator(_no_timestep)]
"""A sigma at which one expert takes over from the other."""
