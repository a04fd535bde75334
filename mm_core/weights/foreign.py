"""Checkpoints that MindSpeed-MM and its converter wrote: where their tensors are, and which of them are a component's.

    <folder>/latest_checkpointed_iteration.txt       `release`, or a number
    <folder>/release/mp_rank_00/model_optim_rng.pt   a file of torch.save, whose `model` has the tensors
    <folder>/iter_0000100/.metadata, *.distcp        or a distributed checkpoint of torch

What the tensors are called in our module is known to the plugin, in its weights adapter (`from_foreign`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.weights.adapter import StateDictAdapter
from mm_core.weights.errors import WeightsError
from mm_core.weights.sources import CheckpointSource, SavedSource, TensorSource
from mm_registry.errors import UserError
from mm_registry.words import described, shown

TRACKER = "latest_checkpointed_iteration.txt"
_FILE = "model_optim_rng.pt"
_ITERATION = re.compile(r"iter_\d+")
_RANK = re.compile(r"mp_rank_\d+(_\d+)*")
# What stands before the names of a component's tensors: dictionaries of the checkpoint, and wrappers of the model.
_CONTAINERS = ("", "model.", "state_dict.", "module.")
_WRAPPERS = ("", "module.")


@dataclass(frozen=True)
class ForeignNames:
    """Which tensors of a checkpoint are which of a module.

    Attributes:
        names: the module's name -> the checkpoint's, also of tensors that the module does not have.
        left_out: names of the checkpoint that belong to something else, such as the optimizer.
    """

    names: Mapping[str, str]
    left_out: tuple[str, ...]


def find_foreign(path: Path) -> Path | None:
    """Return the file, or the folder of a distributed checkpoint, that a path leads to; None if to neither.

    Raises:
        WeightsError: the path leads to a checkpoint that is cut over ranks, not there, or not the only one.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path} is one file of a folder of weights; name the folder: {path.parent}")
        if path.suffix == ".distcp":
            raise WeightsError(f"{path} is one file of a checkpoint; name the folder: {path.parent}")
        return path
    if not path.is_dir():  # reading a pipe would wait for a writer
        raise WeightsError(f"{path} is no regular file, and no folder.")
    tracker = path / TRACKER
    if tracker.is_file():
        return _tracked(path, tracker)
    if (path / ".metadata").is_file():
        return path
    ranks = sorted(p.name for p in path.iterdir() if _RANK.fullmatch(p.name) and p.is_dir())
    if len(ranks) > 1:
        few = ", ".join(ranks[:4]) + (", …" if len(ranks) > 4 else "")
        raise WeightsError(
            f"{path} holds a model that is cut over {len(ranks)} ranks ({few}); put it together with MindSpeed-MM's "
            "converter first (tensor and pipeline parallel size 1)."
        )
    file = path / ranks[0] / _FILE if ranks else path / _FILE
    if file.is_file():
        return file
    if ranks:
        raise WeightsError(f"{path / ranks[0]} has no {_FILE}; the copy is incomplete.")
    inside = sorted(p for p in path.iterdir() if p.name == "release" or _ITERATION.fullmatch(p.name))
    if len(inside) > 1:
        names = ", ".join(p.name for p in inside[:5])
        raise WeightsError(
            f"{path} has several checkpoints ({names}) and no {TRACKER}; name one: --from {inside[-1]}"
        )
    return find_foreign(inside[0]) if inside and inside[0].is_dir() else None


def open_foreign(path: Path) -> TensorSource:
    """Open what `find_foreign` found.

    Raises:
        WeightsError: it cannot be read, or is cut into stages of a pipeline.
    """
    source: TensorSource
    if not path.is_file():
        source = CheckpointSource(path, only_tensors=False)
        if not source.tensors:
            raise WeightsError(f"{path} has no tensors.")
    else:
        source = SavedSource(path)
    return source


def foreign_names(
    tensors: Collection[str], wanted: Collection[str], adapter: StateDictAdapter | None, component: str
) -> ForeignNames:
    """Find a component's tensors in a checkpoint that holds more than them.

    Args:
        tensors: names in the checkpoint.
        wanted: names in the module.
        adapter: of the component; without `from_foreign` of its own, names are the module's.
        component: name of its section, such as `predictor`, which may stand before its tensors' names.

    Raises:
        WeightsError: the adapter fails, or gives two tensors one name.
    """
    wanted = frozenset(wanted)
    best: dict[str, str] = {}
    most, taken = -1, ""
    failure: WeightsError | None = None
    for parts in itertools.product(_CONTAINERS, _WRAPPERS, ("", f"{component}.")):
        prefix = "".join(parts)
        stripped = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        if not stripped:
            continue
        try:
            names = _renamed(adapter, stripped)
        except WeightsError as error:  # perhaps only because of what belongs to something else
            failure = error
            continue
        found = len(wanted & names.keys())
        # Of prefixes that serve equally well the longest one: what does not have it belongs to something else.
        if (found, len(prefix)) > (most, len(taken)) and (found or not prefix):
            best = {name: stripped[key] for name, key in names.items()}
            most, taken = found, prefix
    if most < 1 and failure is not None:
        raise failure
    used = set(best.values())
    return ForeignNames(best, tuple(name for name in tensors if name not in used))


def _renamed(adapter: StateDictAdapter | None, keys: Iterable[str]) -> dict[str, str]:
    """Module's name -> key."""
    keys = list(keys)
    function: Any = getattr(adapter, "from_foreign", None)
    if not callable(function):
        return {key: key for key in keys}
    label = f"{type(adapter).__name__}.from_foreign"
    try:
        made = function(list(keys))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise WeightsError(f"{label} failed: {described(error)}") from error
    if not isinstance(made, Mapping) or not all(isinstance(name, str) for name in made.values()):
        raise WeightsError(f"{label} returned {shown(made)}; it must return a mapping of names")
    names: dict[str, str] = {}
    for key in keys:
        name = made.get(key, key)
        if name in names:
            raise WeightsError(f"{label} gives {names[name]!r} and {key!r} one name, {name!r}.")
        names[name] = key
    return names


def _tracked(folder: Path, tracker: Path) -> Path:
    """What the tracker's text leads to."""
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise WeightsError(f"{tracker} cannot be read: {described(error)}.") from error
    if text != "release" and not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise WeightsError(f"{tracker} says {shown(text)}; it must be `release` or a number.")
    name = text if text == "release" else f"iter_{int(text):07d}"
    if not (folder / name).is_dir():
        raise WeightsError(f"{tracker} names {name}, which is not there; the copy is incomplete.")
    found = find_foreign(folder / name)
    if found is None:
        raise WeightsError(
            f"{folder / name} has neither .metadata nor mp_rank_00/{_FILE}; the copy is incomplete."
        )
    return found
