"""Whether a folder of weights fits a module, by its headers: no tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mm_core.config.findings import clip
from mm_core.weights.adapter import StateDictAdapter
from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import read_headers
from mm_core.weights.hf_folder import known_recipes, weight_files
from mm_core.weights.mapping import module_recipes
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.recipe import result_shape, sources
from mm_core.weights.tensors import compare_keys

_FIRST = 3


@dataclass(frozen=True)
class FolderFit:
    """What a comparison found.

    Attributes:
        folder: the folder.
        files: number of its safetensors files.
        tensors: number of tensors in them.
        nbytes: what these take.
        problems: parts of sentences that follow the folder's name; none if everything fits.
        compared: false if names and shapes could not be compared, because a library changes them when it loads.
    """

    folder: Path
    files: int
    tensors: int
    nbytes: int
    problems: tuple[str, ...]
    compared: bool = True


def check_fit(
    module: nn.Module, folder: Path, adapter: StateDictAdapter | None = None, *, label: str = "the model"
) -> FolderFit:
    """Compare the headers of a folder with a module, as strictly as `load_hf_folder` does when it loads.

    Args:
        module: usually on the meta device.
        adapter: says what the folder's keys are called in the module; without one they are the same.
        label: what problems call the module.

    Raises:
        WeightsError: no such folder or file, an unreadable or cut-off one, unsafe paths in the index, or an adapter
            that is not one to one.
    """
    folder = Path(folder)
    files = weight_files(folder)
    stored = read_headers(files)
    targets = base_tensors(module)
    given = {key: tensor.shape for key, tensor in stored.items()}
    recipes = known_recipes(module, module_recipes(module, adapter, given), targets)
    shapes: dict[str, tuple[int, ...]] = {}
    unfit: list[str] = []
    for name, recipe in recipes.items():
        try:
            shapes[name] = result_shape(recipe, given)
        except WeightsError as error:
            shapes[name] = tuple(targets[name].shape) if name in targets else ()
            unfit.append(f"has tensors that do not go together: {error}")
    keys = {name: next(sources(recipe)) for name, recipe in recipes.items()}
    problems = fit_problems(targets, shapes, keys=keys, label=label) + unfit[:_FIRST]
    return FolderFit(
        folder, len(files), len(stored), sum(tensor.nbytes for tensor in stored.values()), tuple(problems)
    )


def fit_problems(
    targets: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keys: Mapping[str, str] | None = None,
    tied: Collection[str] = (),
    unexpected_allowed: bool = False,
    label: str = "the model",
) -> list[str]:
    """Say which tensors are missing, unexpected or of another shape: a sentence for each kind, first few and count.

    Args:
        targets: the module's tensors by name.
        shapes: the folder's, by the module's names.
        keys: what the folder calls them, where that differs.
        tied: names that need not be stored, because another name has their tensor.
        unexpected_allowed: whether the loader passes over tensors that the module does not have.
    """
    keys = keys or {}
    # Tied weights are stored once, under any of their names.
    present = {id(targets[name]) for name in shapes if name in targets}
    wanted = {
        name
        for name, tensor in targets.items()
        if name in shapes or (id(tensor) not in present and name not in tied)
    }
    problems = []
    missing = sorted(wanted - shapes.keys())
    unexpected = [] if unexpected_allowed else sorted(shapes.keys() - wanted)
    if missing:
        problems.append(f"lacks {_count(len(missing), len(wanted))} of {label}: {_few(missing)}")
    if unexpected:
        _, lines = compare_keys(missing[:500], unexpected[:_FIRST], limit=_FIRST)
        few = [line.removeprefix("  unexpected: ") for line in lines]
        few = [
            f"{line}, which the weights adapter made of {keys[name]}"
            if keys.get(name, name) != name
            else line
            for line, name in zip(few, unexpected[:_FIRST], strict=True)
        ]
        problems.append(f"has {_tensors(len(unexpected))} that {label} has not: {_few(few, len(unexpected))}")
    wrong = [
        f"{name} is {list(shapes[name])}, and {list(targets[name].shape)} in the model"
        for name in sorted(wanted & shapes.keys())
        if tuple(targets[name].shape) != shapes[name]
    ]
    if wrong:
        problems.append(f"has {_tensors(len(wrong))} of another shape than {label}: {_few(wrong)}")
    return problems


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _count(count: int, whole: int) -> str:
    return f"{count} of the {whole} tensors"


def _few(names: Sequence[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    more = f"; and {total - _FIRST} more" if total > _FIRST else ""
    return "; ".join(map(clip, names[:_FIRST])) + more  # a hostile header may hold names of any length
