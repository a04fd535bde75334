"""How a component's weights lie in the folder that they came from: dtypes, names and layout, so that they can be written
as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_core.weights.errors import WeightsError
from mm_core.weights.recipe import Recipe, from_json, to_json
from mm_core.weights.tensors import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What is remembered of a folder of weights, in memory and in a checkpoint.

    Attributes:
        dtypes: the module's name -> dtype in the folder, by safetensors' name such as `BF16`.
        layout: the folder's name -> how it is made of the module's tensors; empty if that is not known, as it is of
            random weights.
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Recipe] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint's state; `from_json` is the inverse."""
        return {
            "dtypes": dict(self.dtypes),
            "layout": {name: to_json(recipe) for name, recipe in self.layout.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> StoredWeights:
        """Read what `as_json` wrote.

        Raises:
            WeightsError: it is something else.
        """
        dtypes = value.get("dtypes") if isinstance(value, Mapping) else None
        layout = value.get("layout") if isinstance(value, Mapping) else None
        if not isinstance(dtypes, Mapping) or not isinstance(layout, Mapping):
            raise WeightsError("weights: each component has `dtypes` and `layout`, which are objects")
        for key, name in dtypes.items():
            if name not in TORCH_DTYPES:
                raise WeightsError(
                    f"weights: {key} has dtype {name!r}; it is one of {', '.join(TORCH_DTYPES)}"
                )
        try:
            recipes = {str(name): from_json(recipe) for name, recipe in layout.items()}
        except RecursionError:
            raise WeightsError("weights: a recipe is nested too deeply") from None
        return cls(dict(dtypes), recipes)
