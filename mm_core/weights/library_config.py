"""What a folder of diffusers or transformers has beside its tensors: the names of its files, and its config.json, made
from a module of these libraries or derived from one.

Neither library is imported here: a module of theirs brings what is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm_core.weights.adapter import StateDictAdapter
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_writer import DIFFUSERS_STEM
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.tensors import TORCH_DTYPES
from mm_registry.words import described, shown

TRANSFORMERS_STEM = "model"


def read_config(file: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        WeightsError: it cannot be read, or holds something else than an object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read: {described(error)}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} holds no object; it is not the config.json of a model.")
    return config


def file_stem(module: nn.Module) -> str:
    """What the names of a folder's safetensors files begin with: `model` for transformers, `diffusion_pytorch_model` else."""
    return TRANSFORMERS_STEM if _upstream(module, "transformers") else DIFFUSERS_STEM


def library_config(module: nn.Module, dtypes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Return the config.json with which the module's library builds it again; None for a module of neither.

    A class derived from a library's one is described as that, which computes the same.

    Args:
        dtypes: the module's name -> dtype in the folder, by safetensors' name; the module's own for others.
            transformers is told the one that most numbers have, in which it will then load all of them.
    """
    config: Any = getattr(module, "config", None)
    upstream = _upstream(module, "diffusers")
    if upstream is not None and hasattr(module, "to_json_string"):
        written: dict[str, Any] = json.loads(module.to_json_string())
        return {**written, "_class_name": upstream.__name__}
    upstream = _upstream(module, "transformers")
    if upstream is not None and hasattr(config, "to_json_string"):
        written = json.loads(config.to_json_string(use_diff=True))
        written["architectures"] = [upstream.__name__]
        written["dtype"] = _most(module, dtypes or {})
        return written
    return None


def folder_config(
    module: nn.Module,
    adapter: StateDictAdapter | None,
    fields: Mapping[str, Any] | None,
    dtypes: Mapping[str, str] | None = None,
) -> Mapping[str, Any] | None:
    """Return the config.json to write beside a component's weights: its weights adapter's, else its library's; None if
    neither knows it.

    Args:
        fields: of the component's section; None if there is none.
        dtypes: as for `library_config`.

    Raises:
        WeightsError: the adapter fails, or returns no object.
    """
    if adapter is None or fields is None:
        return library_config(module, dtypes)
    label = f"{type(adapter).__name__}.config_to_folder"
    try:
        config: Any = adapter.config_to_folder(dict(fields))
    except (Exception, SystemExit) as error:
        raise WeightsError(f"{label} failed: {described(error)}") from error
    if not isinstance(config, Mapping):
        raise WeightsError(f"{label} returned {shown(config)}; it must return the content of config.json")
    return config


def _most(module: nn.Module, dtypes: Mapping[str, str]) -> str | None:
    counts: Counter[str] = Counter()
    for key, tensor in base_tensors(module).items():
        if tensor.is_floating_point():
            name = dtypes.get(key)
            counts[str(tensor.dtype if name is None else TORCH_DTYPES[name])] += tensor.numel()
    return max(counts, key=lambda name: counts[name]).removeprefix("torch.") if counts else None


def _upstream(module: nn.Module, library: str) -> type | None:
    """The library's class that a module is of, or is derived from."""
    for base in type(module).__mro__:
        if base.__module__.startswith(f"{library}."):
            return base
    return None
