"""Weights of any kind that is known here as a Hugging Face folder: a run, a checkpoint of MindSpeed-MM, another folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_core.config.component_file import LoneComponent, read_component, stored_component
from mm_core.models.factory import build_component
from mm_core.models.lora_conversion import convert_adapter
from mm_core.models.pretrained import folder_differences
from mm_core.weights.adapter import StateDictAdapter, find_adapter
from mm_core.weights.convert import Conversion, convert_tensors, copy_folder, files_beside, names_in_source
from mm_core.weights.errors import WeightsError
from mm_core.weights.fit import check_fit
from mm_core.weights.foreign import find_foreign, foreign_names, open_foreign
from mm_core.weights.hf_folder import is_hf_folder
from mm_core.weights.hf_writer import LARGEST_FILE
from mm_core.weights.layout import MARKER, TEMPORARY, complete_checkpoints, resolve_load, verify_contents
from mm_core.weights.library_config import library_config
from mm_core.weights.sources import CheckpointSource, FolderSource, TensorSource
from mm_core.weights.state_file import EMA, STATE, read_state
from mm_core.weights.stored import StoredWeights
from mm_core.weights.tensors import dtype_name, state_tensors
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

_FOREIGN = "a checkpoint of MindSpeed-MM"


def convert(
    source: Path,
    folder: Path,
    *,
    model_file: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    merge_lora: bool = False,
    base: str | None = None,
    max_file_bytes: int = LARGEST_FILE,
) -> Conversion:
    """Write weights as a Hugging Face folder, in one process, tensor by tensor.

    Args:
        source: our run or one checkpoint of it, a checkpoint of MindSpeed-MM, or a Hugging Face folder.
        folder: does not exist yet, or is empty; it appears whole or not at all.
        model_file: file with the component's section; needed where the source does not say what its network is.
        component: name of the section; by default what a run has, else `predictor`.
        dtype: of all floating-point tensors; None keeps what the source has, and of a run that started from a folder
            what that folder has.
        ema: take the averaged weights.
        merge_lora: of a run with LoRA write the whole network with its adapter added, not the adapter alone.
        base: folder of the weights under it, if they lie elsewhere than in training.

    Raises:
        ConfigError: the model file or the stored section cannot be used.
        WeightsError: the source is none of these, is damaged, or does not fit the section; or the folder cannot be
            written.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"--to {folder}: it exists already and is not overwritten; name another folder.")
    if target.parent.name == "checkpoints" and target.name.startswith(("iter_", TEMPORARY)):
        raise WeightsError(
            f"--to {folder}: a run would take it for an unfinished checkpoint, and remove it; name another folder."
        )
    named = component or "predictor"
    if not source.exists():
        resolve_load(source, flag="--from")  # says what is close
    options: dict[str, Any] = {"dtype": dtype, "max_file_bytes": max_file_bytes}
    if _is_ours(source) and not is_hf_folder(source):
        lora = {"merge": merge_lora, "base": base}
        checkpoint = resolve_load(source, flag="--from")
        return _from_checkpoint(
            checkpoint, folder, model_file, component, ema=ema, options=options, lora=lora
        )
    if merge_lora or base is not None:
        flag = "--merge-lora" if merge_lora else "--base"
        raise WeightsError(
            f"{flag}: {source} is no run of ours, and adapters of those are added; leave it out."
        )
    lone = read_component(model_file, named) if model_file is not None else None
    if source.is_dir() and is_hf_folder(source):
        if ema:
            raise WeightsError(
                f"--ema: {source} is a Hugging Face folder, which has one set of weights; leave it out."
            )
        return _from_folder(source, folder, lone, options)
    if ema:
        raise WeightsError(
            f"--ema: {source} is no run of ours, and averaged weights are read from those only."
        )
    return _from_foreign(source, folder, lone, named, options)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and (
        (path / STATE).exists()
        or (path / MARKER).exists()
        or (path / "checkpoints").is_dir()
        or (path / "metrics.jsonl").exists()
        or bool(complete_checkpoints(path))
    )


def _from_folder(
    source: Path, folder: Path, lone: LoneComponent | None, options: dict[str, Any]
) -> Conversion:
    opened = FolderSource(source)
    if lone is not None:
        adapter = find_adapter(lone.component)
        module = _network(lone, adapter)
        problems = [
            *check_fit(module, source, adapter, label=lone.component.label).problems,
            *folder_differences(module, source / "config.json", adapter, lone.component),
        ]
        if problems:
            raise WeightsError(f"{source} does not fit {lone.component.label}: {'; '.join(problems)}.")
    return copy_folder(opened, folder, **options)


def _from_checkpoint(
    checkpoint: Path,
    folder: Path,
    model_file: str | None,
    component: str | None,
    *,
    ema: bool,
    options: dict[str, Any],
    lora: Mapping[str, Any],
) -> Conversion:
    verify_contents(checkpoint)
    content = read_state(checkpoint)
    state = content["state"]
    source = CheckpointSource(checkpoint)
    modules = [name for name in content.get("modules") or () if not str(name).startswith(EMA)]
    component = component or (modules[0] if len(modules) == 1 else "predictor")
    lone = read_component(model_file, component) if model_file is not None else None
    # Keys are `<component>.<name>`, `ema.<component>.<name>` and `optim.<component>.<name>.<state>`.
    names = _below(source, f"{component}.")
    if not names:
        found = sorted({key.split(".")[0] for key in source.tensors} - {"optim", EMA.rstrip(".")})
        raise WeightsError(f"--component {component}: {checkpoint} has only {', '.join(found)}.")
    if ema:
        averages = _below(source, f"{EMA}{component}.")
        if not averages:
            raise WeightsError(
                f"--ema: {checkpoint} has no averaged weights; they are kept by training with --ema-decay."
            )
        names |= averages
    if lone is None:
        try:
            values = state["config"]["values"]["model"]
        except (KeyError, TypeError):
            raise WeightsError(
                f"{checkpoint} does not carry its configuration; give --mm-model FILE."
            ) from None
        lone = stored_component(values, component, str(checkpoint))
    stored = state.get("weights", {}).get(component)
    used = set(names.values())
    if "lora" in state:
        others = tuple(key for key in source.tensors if key not in used)
        kind = f"a checkpoint of step {state['step']}" + (", averaged weights" if ema else "")
        return convert_adapter(
            source, names, lone, folder, name=component, kind=kind, left_out=others, **lora, **options
        )
    if lora["merge"] or lora["base"] is not None:
        flag = "--merge-lora" if lora["merge"] else "--base"
        raise WeightsError(f"{flag}: {checkpoint} was trained without LoRA, and is whole; leave it out.")
    return _write(
        source, names, folder, lone,
        kind=f"a checkpoint of step {state['step']}" + (", averaged weights" if ema else ""),
        stored=None if stored is None else StoredWeights.from_json(stored),
        left_out=tuple(key for key in source.tensors if key not in used),
        options=options,
    )  # fmt: skip


def _below(source: CheckpointSource, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): key for key in source.tensors if key.startswith(prefix)}


def _from_foreign(
    path: Path, folder: Path, lone: LoneComponent | None, component: str, options: dict[str, Any]
) -> Conversion:
    found = find_foreign(path)
    if found is None:
        inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and is_hf_folder(entry))
        hint = f" Subfolders with weights: {', '.join(inside)}." if inside else ""
        raise WeightsError(
            f"--from {path}: there is nothing to convert: no safetensors files, no checkpoint of a run, and none of "
            f"MindSpeed-MM.{hint}"
        )
    source = open_foreign(found)
    if lone is None:
        raise WeightsError(
            f"--from {path}: such a checkpoint does not say what its network is; give the model file that it was "
            "trained with: --mm-model model.json"
        )
    adapter = find_adapter(lone.component)
    wanted = state_tensors(_network(lone, adapter))
    foreign = foreign_names(source.tensors, wanted, adapter, component)
    return _write(
        source, foreign.names, folder, lone, kind=_FOREIGN, left_out=foreign.left_out, options=options
    )


def _write(
    source: TensorSource,
    names: Mapping[str, str],
    folder: Path,
    lone: LoneComponent,
    *,
    kind: str,
    left_out: tuple[str, ...],
    options: dict[str, Any],
    stored: StoredWeights | None = None,
) -> Conversion:
    adapter = find_adapter(lone.component)
    module = _network(lone, adapter)
    names = names_in_source(module, source, names, label=lone.component.label)
    if adapter is not None:
        config: Any = adapter.config_to_folder(dict(lone.component.fields))
    else:
        dtype = options["dtype"]
        config = library_config(
            module, {name: dtype_name(dtype or source.tensors[key].dtype) for name, key in names.items()}
        )
    return convert_tensors(
        module, source, names, folder, kind=kind, adapter=adapter, config=config, stored=stored, left_out=left_out,
        beside=files_beside(lone.component), **options,
    )  # fmt: skip


def _network(lone: LoneComponent, adapter: StateDictAdapter | None) -> nn.Module:
    """The component on the meta device. A variant that our class does not compute yet is built by diffusers, if the
    adapter says as what.
    """
    try:
        module: nn.Module = build_component(lone.component, "meta", hooks=lone.hooks)
    except UserError:
        config = {} if adapter is None else dict(adapter.config_to_folder(dict(lone.component.fields)))
        import diffusers

        # The name is the adapter's, which is code, not a configuration's.
        cls = getattr(diffusers, str(config.pop("_class_name", "")), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
            raise
        upstream: Any = cls
        with torch.device("meta"):
            module = upstream.from_config(config)
    return module
