"""Weights of a Hugging Face folder into a module that may be sharded: strict, and each rank reads only its
slices.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.weights.adapter import StateDictAdapter, renamed
from mm_core.weights.agreement import ranks_agree
from mm_core.weights.errors import WeightsError
from mm_core.weights.tensors import compare_keys, local_part, shortened, state_tensors

log = logging.getLogger(__name__)

_SINGLE = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_INDEX = ".safetensors.index.json"


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a folder with safetensors files or their index in it."""
    return (
        path.is_dir()
        and (any(path.glob("*.safetensors")) or any(path.glob(f"*{_INDEX}")))
        and not (path / ".metadata").exists()
    )


def load_hf_folder(module: nn.Module, folder: Path, adapter: StateDictAdapter | None = None) -> None:
    """Copy all weights of a folder into a module, in place; dtypes are converted on the way.

    Args:
        module: materialised (not on meta); sharded parameters take their slices. Ranks that share a mesh
            call this together.
        folder: holds `*.safetensors`: one file, or several with an index.
        adapter: says what the folder's keys are called in the module; without one they are the same.

    Raises:
        WeightsError: no such folder or file, unsafe paths in the index, an adapter that is not one to one, or
            keys that are missing, unexpected or of another shape; all of these are listed together.
    """
    folder = Path(folder)
    targets = state_tensors(module)
    sharded = any(isinstance(tensor, DTensor) for tensor in targets.values())
    with ranks_agree(f"loading {folder}", alone=not sharded):
        files = weight_files(folder)
        with torch.no_grad():
            _load(targets, folder, files, adapter)


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
    return named or files


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    if not index.is_file():  # opening a pipe would wait for a writer that may never come
        raise WeightsError(f"{index} is no regular file, and so no safetensors index; remove it.")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is no safetensors index: {error}.") from error
    for name in names:
        # The parts are compared, not the resolved path: the hub's cache links files to a folder beside.
        unsafe = not isinstance(name, str) or "\\" in name or "\0" in name
        if unsafe or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise WeightsError(f"{index}: {name!r} points outside the folder; refused.")
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise WeightsError(
            f"{index} names {len(absent)} missing files: {', '.join(absent[:5])}; the download is incomplete."
        )
    return [folder / name for name in sorted(names)]


def _load(
    targets: dict[str, torch.Tensor], folder: Path, files: list[Path], adapter: StateDictAdapter | None
) -> None:
    where: dict[str, Path] = {}
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _open(file) as source:
            for key in source.keys():  # noqa: SIM118 - it is no dict and cannot be iterated
                if key in where:
                    raise WeightsError(f"{folder}: {key} is in {where[key].name} and in {file.name}.")
                where[key] = file
                stored[key] = tuple(source.get_slice(key).get_shape())
    names = renamed(adapter, stored)
    shapes = {names[key]: shape for key, shape in stored.items()}
    _check(targets, shapes, folder, {name: key for key, name in names.items()})
    read = 0
    for file in files:
        with _open(file) as source:
            for key in (k for k, owner in where.items() if owner == file):
                name = names[key]
                storage, slices = local_part(targets[name])
                if storage.is_meta:
                    raise RuntimeError(f"{name} is on the meta device; call materialize() first.")
                if storage.numel() == 0:
                    continue  # an uneven shard: this rank has no row of it
                whole = not slices or tuple(s.stop - s.start for s in slices) == shapes[name]
                value = source.get_tensor(key) if whole else source.get_slice(key)[slices]
                storage.copy_(value)
                read += value.numel() * value.element_size()
    log.info("read %.1f MB of %s", read / 1e6, folder)


def _check(
    targets: dict[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    keys: dict[str, str],
) -> None:
    """Compare by the module's names; `keys` says what the folder calls them."""
    # Tied weights are stored once, under any of their names.
    stored = {id(targets[name]) for name in shapes if name in targets}
    wanted = {name for name, tensor in targets.items() if name in shapes or id(tensor) not in stored}
    missing, unexpected = compare_keys(wanted, shapes)
    renames = [
        f"  renamed: {keys[name]} of the folder is {name} to the weights adapter"
        for name in sorted(shapes.keys() - wanted)
        if keys[name] != name
    ]
    wrong = [
        f"  shape: {name} is {list(shapes[name])} in the file, {list(targets[name].shape)} in the model"
        for name in sorted(wanted & shapes.keys())
        if tuple(targets[name].shape) != shapes[name]
    ]
    if missing or unexpected or wrong:
        raise WeightsError(
            f"{folder} does not fit the model:\n"
            + "\n".join([*missing, *unexpected, *shortened(renames, 20), *shortened(wrong, 20)])
        )


def _open(file: Path) -> safe_open:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is no readable safetensors file: {error}.") from error


def _sibling(folder: Path) -> str:
    import difflib

    names = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.6)
    return f" Closest: {folder.parent / near[0]}." if near else ""


def _subfolder(folder: Path) -> str:
    """A pipeline's folder was given instead of its component's: say which subfolders hold weights."""
    inside = sorted(p.name for p in folder.iterdir() if is_hf_folder(p))
    return f" Subfolders with weights: {', '.join(inside)}." if inside else ""
