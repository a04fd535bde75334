"""Weights of a Hugging Face folder into a module that may be sharded: strict, and each rank reads only its
slices.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.observe.transfer import byte_progress
from mm_core.weights import transformers_layout
from mm_core.weights.adapter import StateDictAdapter
from mm_core.weights.agreement import rank, ranks_agree
from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import Located, locate_all
from mm_core.weights.mapping import module_recipes
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.reading import Read, planned_bytes, read_all
from mm_core.weights.recipe import Recipe, Shape, Stored, inverted, pieces, result_shape, sources
from mm_core.weights.tensors import (
    TORCH_DTYPES,
    compare_keys,
    dtype_name,
    local_part,
    shortened,
)
from mm_registry.words import clip, described

log = logging.getLogger(__name__)

_SINGLE = ("diffusion_pytorch_model.safetensors", "model.safetensors", "adapter_model.safetensors")
_INDEX = ".safetensors.index.json"
_LARGEST_INDEX = 100_000_000  # bytes, as of a file's header


@dataclass(frozen=True, slots=True)
class LoadedFolder:
    """What was loaded, and what is needed to write it again as it came.

    Attributes:
        folder: the folder.
        dtypes: module key -> dtype in the folder, by safetensors' name such as `BF16`, for the keys that the folder
            has: of tied ones that under which it is stored.
        nbytes: what the folder's tensors take.
        layout: folder key -> how it is made of the module's tensors.
        read: bytes that this rank read.
    """

    folder: Path
    dtypes: dict[str, str]
    nbytes: int
    layout: dict[str, Recipe] = field(default_factory=dict)
    read: int = 0


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a folder with safetensors files or their index in it."""
    return (
        path.is_dir()
        and (any(path.glob("*.safetensors")) or any(path.glob(f"*{_INDEX}")))
        and not (path / ".metadata").exists()
    )


def load_hf_folder(
    module: nn.Module,
    folder: Path,
    adapter: StateDictAdapter | None = None,
    *,
    elsewhere: Collection[str] = (),
) -> LoadedFolder:
    """Copy all weights of a folder into a module, in place; dtypes are converted on the way.

    Each rank reads the byte ranges of its own shards into their memory, and holds a few MB besides.

    Args:
        module: materialised (not on meta); sharded parameters take their slices. Ranks that share a mesh
            call this together. PEFT adapters in it keep their values.
        folder: holds `*.safetensors`: one file, or several with an index.
        adapter: says what the folder's tensors are in the module; without one they are the same, or for a model of
            transformers what that library makes of them.
        elsewhere: names of tensors that other modules have, as other stages of a pipeline do; the folder may hold them.

    Raises:
        WeightsError: no such folder or file, unsafe paths in the index, an adapter that contradicts itself, or
            keys that are missing, unexpected or of another shape or kind; all of these are listed together.
        CheckpointError: another failure, on some rank.
    """
    folder = Path(folder)
    targets = base_tensors(module)
    sharded = any(isinstance(tensor, DTensor) for tensor in targets.values())
    with ranks_agree(f"loading {folder}", alone=not sharded):
        begin = time.perf_counter()
        stored = locate_all(weight_files(folder))
        shapes = {key: found.tensor.shape for key, found in stored.items()}
        recipes = module_recipes(module, adapter, shapes)
        recipes = known_recipes(module, recipes, targets, elsewhere)
        _check(targets, recipes, stored, folder)
        read = _fill(targets, recipes, stored, folder)
        seconds = time.perf_counter() - begin
        log.info("read %.1f MB of %s in %.1f s", read / 1e6, folder, seconds)
        return LoadedFolder(
            folder,
            {name: _dtype(recipe, stored) for name, recipe in recipes.items()},
            sum(found.tensor.nbytes for found in stored.values()),
            inverted(recipes, shapes),
            read,
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's weights, index first obeyed.

    Raises:
        WeightsError: there are none, several to choose from, or the index names a file outside the folder or
            a missing one.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: no such folder of weights; check from_pretrained or --load.{_sibling(folder)}"
        )
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) > 1:
        raise WeightsError(
            f"{folder} has {len(indices)} indices ({', '.join(i.name for i in indices)}); leave one."
        )
    if indices:
        return _indexed_files(folder, indices[0])
    files = sorted(folder.glob("*.safetensors"))
    named = [file for file in files if file.name in _SINGLE]
    if len(named or files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise WeightsError(
            f"{folder} has no *{_INDEX} and not exactly one safetensors file ({found}); "
            "a folder of weights has "
            f"{_SINGLE[0]}, {_SINGLE[1]}, or an index.{_subfolder(folder)}"
        )
    return [inside(folder, file) for file in named or files]


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    if not index.is_file():  # opening a pipe would wait for a writer that may never come
        raise WeightsError(f"{index} is no regular file, and so no safetensors index; remove it.")
    if index.stat().st_size > _LARGEST_INDEX:
        raise WeightsError(
            f"{index} is no safetensors index: it has {index.stat().st_size} bytes, and {_LARGEST_INDEX} are the most."
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is no safetensors index: {described(error)}.") from error
    if not names:
        raise WeightsError(f"{index} is no safetensors index: it names no files.")
    for name in names:
        # The parts are compared, not the resolved path: the hub's cache links files to a folder beside.
        unsafe = not isinstance(name, str) or "\\" in name or not name.isprintable()
        if unsafe or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise WeightsError(f"{index}: {clip(repr(name))} points outside the folder; refused.")
    absent = sorted(name for name in names if not os.path.isfile(folder / name))
    if absent:
        few = ", ".join(map(clip, absent[:5]))
        raise WeightsError(f"{index} names {len(absent)} missing files: {few}; the download is incomplete.")
    return [inside(folder, folder / name) for name in sorted(names)]


def inside(folder: Path, file: Path) -> Path:
    """The file, if it is a regular one that does not lead out of its folder.

    The hub's cache is known: there, files of `snapshots/<revision>` are links into `blobs` beside it.

    Raises:
        WeightsError: it leads elsewhere.
    """
    if file.exists() and not file.is_file():
        raise WeightsError(f"{file} is no regular file; put the weights there")
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return file
    caches = [parent.parent for parent in (home, *home.parents) if parent.parent.name == "snapshots"]
    if any(real.parent == cache.parent / "blobs" for cache in caches):
        return file
    raise WeightsError(
        f"{file} leads to {real}, outside the folder; refused: copy the file, or name the folder that it is in."
    )


def known_recipes(
    module: nn.Module,
    recipes: Mapping[str, Recipe],
    targets: Mapping[str, torch.Tensor],
    elsewhere: Collection[str] = (),
) -> dict[str, Recipe]:
    """The recipes without those of tensors that nobody here needs: other modules' (`elsewhere`), and what transformers
    passes over.
    """
    library = transformers_layout.is_transformers_model(module)
    spare = [
        name
        for name in recipes.keys() - targets.keys()
        if name in elsewhere or (library and transformers_layout.passed_over(module, name))
    ]
    left = sorted(set(spare) - set(elsewhere))
    if left:
        log.info("%d tensors are passed over, as transformers does: %s …", len(left), left[0])
    return {name: recipe for name, recipe in recipes.items() if name not in set(spare)}


def fill_from_folder(targets: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy a folder's tensors, as they are, into these, in place; as strict as `load_hf_folder`, and without its agreement
    of ranks.

    Args:
        targets: the folder's key -> tensor, sharded or not.

    Raises:
        WeightsError: as `load_hf_folder`.
    """
    stored = locate_all(weight_files(folder))
    recipes: dict[str, Recipe] = {key: Stored(key) for key in stored}
    _check(targets, recipes, stored, folder)
    _fill(targets, recipes, stored, folder)


def _fill(
    targets: Mapping[str, torch.Tensor],
    recipes: Mapping[str, Recipe],
    stored: Mapping[str, Located],
    folder: Path,
) -> int:
    """Read this rank's part of all targets; returns the bytes."""
    reads = _reads(targets, recipes, stored, {key: found.tensor.shape for key, found in stored.items()})
    with byte_progress(f"reading {folder}", planned_bytes(reads), shown=rank() == 0) as advance:
        return read_all(reads, advance=advance)


def _reads(
    targets: Mapping[str, torch.Tensor],
    recipes: Mapping[str, Recipe],
    stored: Mapping[str, Located],
    shapes: Mapping[str, Shape],
) -> list[Read]:
    """What this rank has to read, and where to."""
    reads = []
    for name, recipe in recipes.items():
        storage, box = local_part(targets[name])
        if storage.is_meta:
            raise RuntimeError(f"{name} is on the meta device; call materialize() first.")
        if storage.numel() == 0:
            continue  # an uneven shard: this rank has no row of it
        reads += [
            Read(stored[piece.key], piece.box, piece.target) for piece in pieces(recipe, shapes, box, storage)
        ]
    return reads


def _check(
    targets: Mapping[str, torch.Tensor],
    recipes: Mapping[str, Recipe],
    stored: Mapping[str, Located],
    folder: Path,
) -> None:
    """Compare by the module's names.

    Raises:
        WeightsError: names all that does not fit.
    """
    # Tied weights are stored once, under any of their names.
    present = {id(targets[name]) for name in recipes if name in targets}
    wanted = {name for name, tensor in targets.items() if name in recipes or id(tensor) not in present}
    missing, unexpected = compare_keys(wanted, recipes)
    renames = [
        f"  renamed: {key} of the folder is {name} to the weights adapter"
        for name in sorted(recipes.keys() - wanted)
        if (key := next(sources(recipes[name]))) != name
    ]
    wrong = [
        f"  {fault}"
        for name in sorted(wanted & recipes.keys())
        if (fault := _fault(name, targets[name], recipes[name], stored)) is not None
    ]
    if missing or unexpected or wrong:
        raise WeightsError(
            f"{folder} does not fit the model:\n"
            + "\n".join([*missing, *unexpected, *shortened(renames, 20), *shortened(wrong, 20)])
        )


def _fault(name: str, target: torch.Tensor, recipe: Recipe, stored: Mapping[str, Located]) -> str | None:
    """What is wrong with the tensors that one of the module's is to be made of."""
    keys = list(sources(recipe))
    made = "" if keys == [name] else f" ({keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})"
    try:
        shape = result_shape(recipe, {key: stored[key].tensor.shape for key in keys})
    except WeightsError as error:
        return f"shape: {name}: {error}"
    if shape != tuple(target.shape):
        return f"shape: {name} is {list(shape)} in the file{made}, {list(target.shape)} in the model"
    for key in keys:
        dtype = stored[key].tensor.dtype
        if dtype not in TORCH_DTYPES:
            return f"dtype: {key} is {dtype} in the file, which is not read here; known are {', '.join(TORCH_DTYPES)}"
        if _kind(TORCH_DTYPES[dtype]) != _kind(target.dtype):
            has = str(target.dtype).removeprefix("torch.")
            return f"dtype: {key} is {dtype} in the file, {has} in the model; quantized weights are not read"
    return None


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "integer"


def _dtype(recipe: Recipe, stored: Mapping[str, Located]) -> str:
    """Of the tensors that one is made of; of several dtypes one that holds them all."""
    names = {stored[key].tensor.dtype for key in sources(recipe)}
    if len(names) == 1:
        return names.pop()
    first, *others = (TORCH_DTYPES[name] for name in sorted(names))
    for other in others:
        first = torch.promote_types(first, other)
    return dtype_name(first)


def _sibling(folder: Path) -> str:
    names = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.6)
    return f" Closest: {folder.parent / near[0]}." if near else ""


def _subfolder(folder: Path) -> str:
    """A pipeline's folder was given instead of its component's: say which subfolders hold weights."""
    inside = sorted(p.name for p in folder.iterdir() if is_hf_folder(p))
    return f" Subfolders with weights: {', '.join(inside)}." if inside else ""
