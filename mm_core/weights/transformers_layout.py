"""How transformers' own folders keep the tensors of its models: renamed, per expert, on their side, merged.

transformers describes that as data (`transformers.conversion_mapping`): renamings, and operations on whole tensors. Here
the same data makes recipes, whose slices can be read one by one, and the recipes of the way back. The order in which
renamings and operations apply is that of `transformers.core_model_loading`.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mm_core.weights.errors import WeightsError
from mm_core.weights.recipe import (
    Concat,
    Narrowed,
    Picked,
    Recipe,
    Shape,
    Stack,
    Stored,
    Transposed,
    result_shape,
    sources,
)
from mm_registry.words import described

log = logging.getLogger(__name__)

_Values = dict[str, list[Recipe] | Recipe]  # by pattern, as an operation of transformers takes and gives them


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, sharded or not."""
    library = sys.modules.get("transformers.modeling_utils")  # one that was never imported made no module
    return library is not None and isinstance(module, library.PreTrainedModel)


def module_recipes(
    module: nn.Module, own: Mapping[str, Shape], stored: Mapping[str, Shape]
) -> dict[str, Recipe]:
    """How the tensors of a transformers model are made of those of a folder.

    Args:
        module: the model, sharded or not, on any device.
        own: shapes of its tensors by upstream name.
        stored: shapes of the folder's.

    Returns:
        Module key -> recipe of folder keys. What the model does not know keeps the name that it would have.

    Raises:
        WeightsError: an operation that cannot be done slice by slice, or two stored tensors for one.
    """
    try:
        from transformers.core_model_loading import dot_natural_key, rename_source_key
    except ImportError as error:
        return _as_named(stored, error)
    skeleton, transforms = _transforms(module, saving=False)
    renamings, converters = _split(transforms)
    prefix = getattr(skeleton, "base_model_prefix", None)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Recipe] = {}
    groups: dict[str, tuple[Any, _Values]] = {}
    # transformers sorts, and a few of its renamings and all of its lists rely on it.
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if pattern is None or name not in own:
            _add(found, name if name in own else key, Stored(key))
            continue
        converter, values = groups.setdefault(name, (by_pattern[pattern], {}))
        collected = values.setdefault(pattern, [])
        assert isinstance(collected, list)
        collected.append(Stored(key))
    for name, (converter, values) in groups.items():
        for target, recipe in _converted(converter, values, name, own, stored, skeleton).items():
            _add(found, target, recipe)
    return found


def folder_recipes(module: nn.Module, own: Mapping[str, Shape]) -> dict[str, Recipe]:
    """How the tensors of a folder, as `save_pretrained` of transformers writes it, are made of a model's.

    Args:
        module: the model, sharded or not, on any device.
        own: shapes of its tensors by upstream name; of tied ones only those that are to be written.

    Returns:
        Folder key -> recipe of module keys.

    Raises:
        WeightsError: an operation that has no recipe.
    """
    try:
        from transformers.core_model_loading import apply_converters, apply_renamings, dot_natural_key
    except ImportError as error:
        return _as_named(own, error)
    skeleton, transforms = _transforms(module, saving=True)
    renamings, converters = _split(transforms)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Recipe] = {}
    groups: dict[str, tuple[Any, _Values]] = {}
    for key in sorted(own, key=dot_natural_key):
        name, pattern = apply_converters(key, converters)
        if pattern is None:
            _add(found, apply_renamings(key, renamings), Stored(key))
            continue
        converter, values = groups.setdefault(name, (by_pattern[pattern], {}))
        collected = values.setdefault(pattern, [])
        assert isinstance(collected, list)
        collected.append(Stored(key))
    for name, (converter, values) in groups.items():
        for target, recipe in _converted(converter, values, name, own, own, skeleton).items():
            _add(found, apply_renamings(target, renamings), recipe)
    return found


def passed_over(module: nn.Module, name: str) -> bool:
    """Whether transformers says of a tensor which a folder has and the model has not that it is of no use, such as a
    table that the model computes.
    """
    patterns = set(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [buffer for buffer, _ in module.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def _transforms(module: nn.Module, *, saving: bool) -> tuple[Any, list[Any]]:
    """The model on meta as transformers builds it, and its list of renamings and conversions, in the order in which
    they apply.
    """
    # The list is found by the names of classes, and FSDP2 gives sharded modules others; hence a bare skeleton.
    skeleton = _skeleton(module)
    if skeleton is None:
        return module, []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    transforms = get_model_conversion_mapping(skeleton, add_legacy=not saving)
    if not saving:
        return skeleton, list(transforms)
    # Whether a folder had such a prefix is not known; transformers leaves them away too.
    kept = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
    return skeleton, [transform.reverse_transform() for transform in reversed(kept)]


def _skeleton(module: nn.Module) -> Any:
    """The model on the meta device, of transformers' own class; None if it has none."""
    own: Any = module
    library: Any = sys.modules["transformers.modeling_utils"].PreTrainedModel
    classes: list[Any] = [
        cls for cls in type(module).__mro__ if issubclass(cls, library) and not issubclass(cls, FSDPModule)
    ]
    # A class outside the library is the one below it with additions; the library itself would not know it.
    known = next(
        (
            cls
            for cls in classes
            if cls.config_class is not None and cls.__module__.startswith("transformers.")
        ),
        None,
    )
    if known is None:
        return None
    try:
        with torch.device("meta"):
            return known(copy.deepcopy(own.config))
    except Exception as error:
        raise WeightsError(
            f"{known.__name__} cannot be built from its own config, which says how its folders are laid out: "
            f"{described(error)}"
        ) from error


def _split(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )


def _add(found: dict[str, Recipe], name: str, recipe: Recipe) -> None:
    if name in found and found[name] != recipe:
        raise WeightsError(
            f"two tensors are {name} to transformers: {_first(found[name])!r} and {_first(recipe)!r}; remove one"
        )
    found[name] = recipe


def _first(recipe: Recipe) -> str:
    return next(sources(recipe))


def _as_named(shapes: Mapping[str, Shape], error: ImportError) -> dict[str, Recipe]:
    log.warning(
        "this transformers does not tell how it lays its folders out (%s); names are taken as they are", error
    )
    return {key: Stored(key) for key in shapes}


# -- operations -------------------------------------------------------------------------------------------------------


def _converted(
    converter: Any,
    values: _Values,
    name: str,
    own: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    skeleton: Any,
) -> dict[str, Recipe]:
    """What a converter makes of the tensors that it collected for `name`, by full names.

    Args:
        own: shapes of the model's tensors.
        shapes: of the tensors that recipes are made of.
    """
    for operation in converter.operations:
        kind = type(operation).__name__
        apply = _OPERATIONS.get(kind)
        if apply is None:
            raise WeightsError(
                f"{name}: transformers changes it by {kind} when it loads, which cannot be done slice by slice; save the "
                "folder once with from_pretrained(…).save_pretrained(…, save_original_format=False)"
            )
        try:
            values = apply(operation, values, converter, _Context(name, own, shapes, skeleton))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, StopIteration) as error:
            raise WeightsError(
                f"{name}: {kind} of transformers does not fit what is there "
                f"({_first(_one(next(iter(values.values()))))}, …): {described(error)}"
            ) from error
    full = name.replace("*.", "0.")
    parts = next((full.partition(target) for target in values if target in full), None)
    before, after = ("", "") if parts is None else (parts[0], parts[2])
    return {before + target + after: _one(value) for target, value in values.items()}


class _Context:
    """What operations may ask besides their tensors."""

    def __init__(
        self, name: str, own: Mapping[str, Shape], shapes: Mapping[str, Shape], skeleton: Any
    ) -> None:
        self.name, self.own, self._shapes, self.skeleton = name, own, shapes, skeleton

    def shape(self, recipe: Recipe) -> Shape:
        return result_shape(recipe, self._shapes)


def _one(value: list[Recipe] | Recipe) -> Recipe:
    return value[0] if isinstance(value, list) else value


def _dim(dim: int, count: int) -> int:
    return dim + count if dim < 0 else dim


def _merge_list(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    made: _Values = {}
    for pattern, value in values.items():
        target = operation.get_target_pattern(len(values), pattern, converter.target_patterns)
        if isinstance(value, list):
            made[target] = Stack(_dim(operation.dim, len(context.shape(value[0])) + 1), tuple(value))
        else:
            made[target] = value
    return made


def _split_list(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    made: _Values = {}
    for pattern, value in values.items():
        recipe = _one(value)
        shape = context.shape(recipe)
        dim = _dim(operation.dim, len(shape))
        targets = operation.get_target_patterns(values, pattern, converter.target_patterns, shape[dim])
        made |= {target: _picked(dim, index, recipe) for index, target in enumerate(targets)}
    return made


def _concatenate(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    parts: list[Recipe] = []
    for pattern in converter.source_patterns:  # their order counts, not that of the tensors
        value = values.get(pattern, [])
        parts += value if isinstance(value, list) else [value]
    dim = _dim(operation.dim, len(context.shape(parts[0])))
    return {operation.get_target_pattern(converter.target_patterns): Concat(dim, tuple(parts))}


def _chunk(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    (value,) = values.values()
    config = context.skeleton.config
    targets = operation.get_target_patterns(converter.target_patterns, config=config)
    recipe = _one(value)
    size = context.shape(recipe)[operation.dim]
    step = -(-size // len(targets))  # as torch.chunk cuts
    return _cut(
        recipe, operation.dim, targets, [min(step, size - i * step) for i in range(len(targets))], context
    )


def _split_tensor(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    (value,) = values.values()
    targets = converter.target_patterns
    sizes = [context.own[context.name.replace(targets[0], target)][operation.dim] for target in targets]
    return _cut(_one(value), operation.dim, targets, sizes, context)


def _cut(recipe: Recipe, dim: int, targets: list[str], sizes: list[int], context: _Context) -> _Values:
    dim = _dim(dim, len(context.shape(recipe)))
    made: _Values = {}
    begin = 0
    for target, size in zip(targets, sizes, strict=True):
        made[target] = Narrowed(dim, begin, begin + size, recipe)
        begin += size
    return made


def _transpose(operation: Any, values: _Values, converter: Any, context: _Context) -> _Values:
    target = operation.get_target_pattern(values, converter.source_patterns, converter.target_patterns)
    (value,) = values.values()
    recipe = _one(value)
    shape = context.shape(recipe)
    a, b = _dim(operation.dim0, len(shape)), _dim(operation.dim1, len(shape))
    if getattr(operation, "check_dims", False) and shape == tuple(context.own[context.name]):
        if shape[a] == shape[b]:  # then transformers takes it as it is, and so is it here
            log.warning(
                "%s is square: whether the folder keeps it on its side cannot be seen, and it is taken as it is",
                context.name,
            )
        return {target: recipe}
    return {target: Transposed(a, b, recipe)}


def _picked(dim: int, index: int, recipe: Recipe) -> Recipe:
    # What was stacked a moment ago need not be stacked.
    return (
        recipe.parts[index] if isinstance(recipe, Stack) and recipe.dim == dim else Picked(dim, index, recipe)
    )


_Operation = Callable[[Any, _Values, Any, _Context], _Values]
_OPERATIONS: dict[str, _Operation] = {
    "MergeModulelist": _merge_list,
    "SplitModulelist": _split_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split_tensor,
    "Transpose": _transpose,
}
