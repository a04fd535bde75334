"""Which tensors of a folder make which tensors of a module, and the way back.

An adapter says it: `layout` and `folder_layout` for what is merged, split or laid on its side, `to_module` and
`to_folder` for the rest. Without an adapter, transformers' own conversions apply to its models, and the keys of all other
modules are the folder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mm_core.weights import transformers_layout
from mm_core.weights.adapter import StateDictAdapter, renamed
from mm_core.weights.errors import WeightsError
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.recipe import Recipe, Shape, Stored, result_shape, sources
from mm_registry.errors import UserError
from mm_registry.words import described


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Shapes of a module's parameters and persistent buffers by upstream name; whole ones, if they are sharded. PEFT
    adapters are not among them.
    """
    return {name: tuple(tensor.shape) for name, tensor in base_tensors(module).items()}


def module_recipes(
    module: nn.Module, adapter: StateDictAdapter | None, stored: Mapping[str, Shape]
) -> dict[str, Recipe]:
    """How a module's tensors are made of a folder's; keys that the module does not know are among them.

    Args:
        stored: shapes of the folder's tensors.

    Raises:
        WeightsError: the adapter fails, contradicts itself, or takes a tensor that the folder has not.
    """
    if adapter is None and transformers_layout.is_transformers_model(module):
        return transformers_layout.module_recipes(module, shapes_of(module), stored)
    made = _layout(adapter, "layout", stored)
    taken = {key for recipe in made.values() for key in sources(recipe)}
    rest = renamed(adapter, {key: shape for key, shape in stored.items() if key not in taken})
    return _together(made, {name: Stored(key) for key, name in rest.items()}, adapter, "to_module")


def folder_recipes(
    module: nn.Module, adapter: StateDictAdapter | None, own: Mapping[str, Shape]
) -> dict[str, Recipe]:
    """How a folder's tensors are made of a module's, where no loaded folder says it.

    Args:
        own: shapes of the module's tensors that are to be written: of tied ones one.

    Raises:
        WeightsError: the adapter fails, contradicts itself, or takes a tensor that the module has not.
    """
    if adapter is None and transformers_layout.is_transformers_model(module):
        return transformers_layout.folder_recipes(module, own)
    made = _layout(adapter, "folder_layout", own)
    taken = {key for recipe in made.values() for key in sources(recipe)}
    rest = renamed(adapter, {key: shape for key, shape in own.items() if key not in taken}, to_folder=True)
    return _together(made, {name: Stored(key) for key, name in rest.items()}, adapter, "to_folder")


def _layout(adapter: StateDictAdapter | None, method: str, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    function: Any = getattr(adapter, method, None)
    if adapter is None or not callable(function):
        return {}
    label = f"{type(adapter).__name__}.{method}"
    try:
        made = function(dict(shapes))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise WeightsError(f"{label} failed: {described(error)}") from error
    if not isinstance(made, Mapping) or not all(
        isinstance(name, str) and isinstance(recipe, Recipe) for name, recipe in made.items()
    ):
        raise WeightsError(f"{label} returned no mapping of names to recipes; see mm_core.weights.recipe")
    for name, recipe in made.items():
        absent = next((key for key in sources(recipe) if key not in shapes), None)
        if absent is not None:
            raise WeightsError(
                f"{label} makes {name} of {absent}, which is not there; it may use the names that it is given"
            )
        try:
            result_shape(recipe, shapes)
        except WeightsError as error:
            raise WeightsError(f"{label} cannot make {name}: {error}") from error
    return dict(made)


def _together(
    made: dict[str, Recipe], rest: dict[str, Recipe], adapter: StateDictAdapter | None, method: str
) -> dict[str, Recipe]:
    twice = made.keys() & rest.keys()
    if twice:
        name = min(twice)
        raise WeightsError(
            f"{type(adapter).__name__} makes {name} twice, by its layout and of {next(sources(rest[name]))} by {method}; "
            "a weights adapter gives each tensor once"
        )
    return made | rest
