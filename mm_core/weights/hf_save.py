"""Weights of a module, sharded or not, into a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.weights.adapter import StateDictAdapter, renamed
from mm_core.weights.agreement import rank, ranks_agree
from mm_core.weights.errors import WeightsError
from mm_core.weights.layout import TEMPORARY, sync_folder, write_text
from mm_core.weights.tensors import state_tensors, whole_tensor

_STEM = "diffusion_pytorch_model"
_LARGEST_FILE = 5 * 10**9  # bytes, as diffusers and transformers split


def save_hf_folder(
    module: nn.Module,
    folder: Path | str,
    adapter: StateDictAdapter | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    max_file_bytes: int = _LARGEST_FILE,
) -> Path:
    """Write a module's parameters and persistent buffers as a folder that `load_hf_folder` and the upstream
    libraries read.

    The folder appears whole or not at all. Tied weights are stored once.

    Args:
        module: materialised; if it is sharded, the ranks that share its mesh call this together, and rank 0
            writes. Whole tensors are gathered one by one, and rank 0 holds one file's worth of them.
        folder: does not exist yet, or is empty.
        adapter: gives the folder's names; without one they are the module's own.
        config: the content of config.json, such as `adapter.config_to_folder(fields)`; None writes none.
        max_file_bytes: several files with an index are written beyond it.

    Returns:
        The folder.

    Raises:
        WeightsError: the folder holds something already, cannot be written, or the adapter is not one to one.
        CheckpointError: another failure, on some rank.
    """
    folder = Path(folder)
    tensors = _once(state_tensors(module))
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    writes = not sharded or rank() == 0
    target = Path(os.path.realpath(folder))  # a link to an empty folder stays one
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    what = f"writing {folder}"
    try:
        with ranks_agree(what, alone=not sharded):
            names = _names(tensors, adapter)
            text = None if config is None else _config_text(config)
            if writes:
                _prepare(folder, target, temporary)
        files = _plan(tensors, max_file_bytes)
        for index, keys in enumerate(files):
            # Gathering is a collective: every rank takes part, file by file and tensor by tensor, in the same order.
            whole = {
                names[key]: tensor for key in keys if (tensor := _gathered(tensors[key], writes)) is not None
            }
            with ranks_agree(what, alone=not sharded):
                if writes:
                    _write(temporary / _file_name(index, len(files)), whole)
        with ranks_agree(what, alone=not sharded):
            if writes:
                if len(files) > 1:
                    write_text(
                        temporary / f"{_STEM}.safetensors.index.json", _index_text(tensors, names, files)
                    )
                if text is not None:
                    write_text(temporary / "config.json", text)
                sync_folder(temporary)
                os.replace(temporary, target)
                sync_folder(target.parent)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without further names of tied ones."""
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(id(tensor), key)
    return {key: tensors[key] for key in first.values()}


def _names(tensors: Mapping[str, torch.Tensor], adapter: StateDictAdapter | None) -> dict[str, str]:
    names = renamed(adapter, tensors, to_folder=True)
    if adapter is not None:
        back = renamed(adapter, dict.fromkeys(names.values()))
        for key, name in names.items():
            if back[name] != key:
                raise WeightsError(
                    f"{type(adapter).__name__}: to_folder({key!r}) is {name!r}, but to_module of that is "
                    f"{back[name]!r}; the two must be inverse, or the folder could not be read again"
                )
    return names


def _config_text(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise WeightsError(f"config.json cannot be written: {error}.") from error


def _prepare(folder: Path, target: Path, temporary: Path) -> None:
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise WeightsError(f"{folder} exists already and is not overwritten; name another folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written ({error.strerror}); name another folder.") from error


def _plan(tensors: Mapping[str, torch.Tensor], limit: int) -> list[list[str]]:
    """The keys of each file, in the module's order, as full as the limit lets them be."""
    files: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if files[-1] and size + bytes_ > limit:
            files.append([])
            size = 0
        files[-1].append(key)
        size += bytes_
    return files


def _gathered(tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    """The whole tensor in host memory, in storage of its own; None where it is not wanted."""
    if isinstance(tensor, DTensor):
        tensor = whole_tensor(tensor)
    return tensor.detach().to("cpu", copy=True).contiguous() if wanted else None


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _file_name(index: int, count: int) -> str:
    return f"{_STEM}.safetensors" if count == 1 else f"{_STEM}-{index + 1:05d}-of-{count:05d}.safetensors"


def _index_text(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], files: list[list[str]]) -> str:
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    where = {names[key]: _file_name(i, len(files)) for i, keys in enumerate(files) for key in keys}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
