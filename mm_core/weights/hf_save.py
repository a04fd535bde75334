"""Weights of a module, sharded or not, into a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.weights.adapter import StateDictAdapter, renamed
from mm_core.weights.agreement import rank, ranks_agree
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_writer import LARGEST_FILE, FolderWriter, PlannedTensor, check_dtype, split_files
from mm_core.weights.library_config import file_stem
from mm_core.weights.mapping import folder_recipes
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.recipe import (
    Concat,
    Narrowed,
    Picked,
    Recipe,
    Stack,
    Stored,
    Transposed,
    result_shape,
    sources,
)
from mm_core.weights.tensors import TORCH_DTYPES, shortened, whole_tensor


def save_hf_folder(
    module: nn.Module,
    folder: Path | str,
    adapter: StateDictAdapter | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    layout: Mapping[str, Recipe] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
    max_file_bytes: int = LARGEST_FILE,
    beside: Sequence[Path] = (),
) -> Path:
    """Write a module's parameters and persistent buffers as a folder that `load_hf_folder` and the upstream
    libraries read.

    The folder appears whole or not at all. Tied weights are stored once.

    Args:
        module: materialised; if it is sharded, the ranks that share its mesh call this together, and rank 0
            writes. Whole tensors are gathered one by one, and written as they come. PEFT adapters are left out.
        folder: does not exist yet, or is empty.
        adapter: gives the folder's names and layout; without one they are those of the library that the module
            is from, or the module's own.
        config: the content of config.json, such as `adapter.config_to_folder(fields)`; None writes none.
        dtypes: the module's name -> dtype in the folder by safetensors' name, as a `LoadedFolder` has them; the
            module's own for others.
        layout: of a `LoadedFolder`; the folder gets the names and layout of that one.
        values: the module's name -> what is written instead of the module's own, such as averaged weights; of
            the same shape and sharding.
        read: returns the whole tensor of one of the module's names; then the module's own values are not read, and it
            may be on the meta device.
        max_file_bytes: several files with an index are written beyond it.
        beside: small files that are copied, such as a tokenizer's.

    Returns:
        The folder.

    Raises:
        WeightsError: the folder holds something already or cannot be written, there is no room on the disk, or
            the adapter is not one to one.
        CheckpointError: another failure, on some rank.
    """
    folder = Path(folder)
    tensors = with_values(base_tensors(module), values or {})
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    what = f"writing {folder}"
    writer: FolderWriter | None = None
    with ExitStack() as stack:
        with ranks_agree(what, alone=alone):
            recipes = _layout(module, adapter, tensors, layout)
            planned = _planned(recipes, tensors, dtypes or {})
            groups = _groups(recipes)
            text = None if config is None else config_text(config)
            files = split_files(planned, max_file_bytes, groups)
            if alone or rank() == 0:
                writer = stack.enter_context(FolderWriter(folder, planned, files, stem=file_stem(module)))
        _write_tensors(groups, recipes, tensors, writer, what, alone=alone, read=read)
        with ranks_agree(what, alone=alone):
            if writer is not None:
                if text is not None:
                    writer.write_text("config.json", text)
                for file in beside:
                    writer.copy_file(file)
                writer.publish()
    return folder


def check_hf_folder(
    module: nn.Module,
    adapter: StateDictAdapter | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    layout: Mapping[str, Recipe] | None = None,
) -> None:
    """Find out whether `save_hf_folder` will be able to write a module, before hours are spent on its weights. Nothing is
    written and no tensor is read; each rank does this for itself.

    Raises:
        WeightsError: as `save_hf_folder`, of everything but the disk.
    """
    tensors = base_tensors(module)
    for name, planned in _planned(_layout(module, adapter, tensors, layout), tensors, dtypes or {}).items():
        check_dtype(name, planned.dtype)
    if config is not None:
        config_text(config)


def config_text(config: Mapping[str, Any]) -> str:
    """The text of a config.json.

    Raises:
        WeightsError: it is not made of what JSON has.
    """
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise WeightsError(f"config.json cannot be written: {error}.") from error


def with_values(
    tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A module's tensors with others in the place of some; a tied one is exchanged under all its names."""
    exchanged = {id(tensors[key]): value for key, value in values.items()}
    return {key: exchanged.get(id(tensor), tensor) for key, tensor in tensors.items()}


def assembled(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a recipe makes of whole tensors; a view where it can be one."""
    match recipe:
        case Stored(key):
            return tensors[key]
        case Stack(dim, parts):
            if len(parts) == 1:
                return assembled(parts[0], tensors).unsqueeze(dim)
            return torch.stack([assembled(part, tensors) for part in parts], dim)
        case Concat(dim, parts):
            return torch.cat([assembled(part, tensors) for part in parts], dim)
        case Transposed(a, b, part):
            return assembled(part, tensors).transpose(a, b)
        case Narrowed(dim, start, stop, part):
            return assembled(part, tensors).narrow(dim, start, stop - start)
        case Picked(dim, index, part):
            return assembled(part, tensors).select(dim, index)


def _layout(
    module: nn.Module,
    adapter: StateDictAdapter | None,
    tensors: Mapping[str, torch.Tensor],
    layout: Mapping[str, Recipe] | None,
) -> Mapping[str, Recipe]:
    """The recipe of each of the folder's tensors, in the module's order; every tensor of the module is in one."""
    once = _once(tensors)
    if layout is None:
        shapes = {key: tuple(tensor.shape) for key, tensor in once.items()}
        layout = folder_recipes(module, adapter, shapes)
        _check_names(adapter, layout)
    used = {key for recipe in layout.values() for key in sources(recipe)}
    held = {id(tensors[key]) for key in used if key in tensors}
    unknown = [f"  not in the module: {key}" for key in sorted(used - tensors.keys())]
    lost = [f"  not written: {key}" for key, tensor in once.items() if id(tensor) not in held]
    if unknown or lost:
        raise WeightsError(
            "the folder's layout does not fit the module:\n"
            + "\n".join([*shortened(unknown, 20), *shortened(lost, 20)])
        )
    place = {key: index for index, key in enumerate(tensors)}
    return dict(sorted(layout.items(), key=lambda item: min(place[key] for key in sources(item[1]))))


def _check_names(adapter: StateDictAdapter | None, layout: Mapping[str, Recipe]) -> None:
    """What is only renamed must come back under its own name."""
    plain = {name: recipe.key for name, recipe in layout.items() if isinstance(recipe, Stored)}
    if adapter is None:
        return
    back = renamed(adapter, plain)
    for name, key in plain.items():
        if back[name] != key:
            raise WeightsError(
                f"{type(adapter).__name__}: to_folder({key!r}) is {name!r}, but to_module of that is "
                f"{back[name]!r}; the two must be inverse, or the folder could not be read again"
            )


def _once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without further names of tied ones."""
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(id(tensor), key)
    return {key: tensors[key] for key in first.values()}


def _planned(
    recipes: Mapping[str, Recipe], tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, str]
) -> dict[str, PlannedTensor]:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    stored = {id(tensors[key]): dtype for key, dtype in dtypes.items() if key in tensors}
    planned = {}
    for name, recipe in recipes.items():
        found = [_dtype(tensors[key], stored) for key in sources(recipe)]
        dtype = found[0]
        for other in found[1:]:
            dtype = dtype if dtype == other else torch.promote_types(dtype, other)
        planned[name] = PlannedTensor(dtype, result_shape(recipe, shapes))
    return planned


def _dtype(tensor: torch.Tensor, stored: Mapping[int, str]) -> torch.dtype:
    name = stored.get(id(tensor))
    if name is None:
        return tensor.dtype
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        raise WeightsError(f"dtype {name!r} is none of {', '.join(TORCH_DTYPES)}") from None


def _groups(recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """The folder's names, put together where they take the same tensors of the module: these are gathered once."""
    groups: dict[int, list[str]] = {}
    group_of: dict[str, int] = {}  # a module's name -> number of the group that takes it
    for number, (name, recipe) in enumerate(recipes.items()):
        keys = set(sources(recipe))
        found = sorted({group_of[key] for key in keys if key in group_of})
        first = found[0] if found else number
        groups.setdefault(first, [])
        for other in found[1:]:
            groups[first] += groups.pop(other)
            group_of.update({key: first for key, group in group_of.items() if group == other})
        groups[first].append(name)
        group_of.update(dict.fromkeys(keys, first))
    return list(groups.values())


def _write_tensors(
    groups: Sequence[Sequence[str]],
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, torch.Tensor],
    writer: FolderWriter | None,
    what: str,
    *,
    alone: bool,
    read: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Gather the module's tensors, and write what the folder makes of them.

    Gathering is a collective: every rank takes part in all of it, in the same order, also when the writer has failed.
    """
    failure: Exception | None = None
    for group in groups:
        keys = dict.fromkeys(key for name in group for key in sources(recipes[name]))
        whole = {key: _whole(tensors[key]) if read is None else read(key) for key in keys}
        if writer is not None and failure is None:
            try:
                for name in group:
                    writer.write(name, assembled(recipes[name], whole))
            except Exception as error:  # noqa: BLE001 - raised below, on all ranks
                failure = error
        if failure is not None and alone:
            break
    with ranks_agree(what, alone=alone):
        if failure is not None:
            raise failure


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return whole_tensor(tensor).detach() if isinstance(tensor, DTensor) else tensor.detach()
