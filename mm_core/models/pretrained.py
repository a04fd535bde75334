"""Loading diffusers and transformers folders from disk, strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from mm_core.weights import load_hf_folder
from mm_registry.errors import UserError

M = TypeVar("M", bound=torch.nn.Module)


def load_pretrained(
    cls: type[M], folder: str | os.PathLike[str], *, dtype: torch.dtype | None, what: str
) -> M:
    """Load `cls` from a folder with config.json and safetensors files.

    Both libraries fill weights that a folder lacks with random values and only warn; here that is an error.
    Nothing is fetched, no pickle is read and no code from the folder is run.

    Args:
        cls: a class with the `from_pretrained` of diffusers or transformers.
        dtype: of the parameters; None keeps fp32.
        what: the configuration's section, for messages.

    Raises:
        UserError: no folder, no config.json, no safetensors, unreadable ones, or weights missing or of other
            shapes.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{what}: from_pretrained {str(folder)!r} is no folder (looked in {path.absolute()}); "
            "give the folder that holds config.json and the safetensors files"
        )
    if not (path / "config.json").is_file():
        inner = sorted(entry.parent.name for entry in path.glob("*/config.json"))
        hint = f"; a folder inside it has one: {', '.join(inner)}" if inner else ""
        raise UserError(f"{what}: {str(folder)!r} has no config.json{hint}")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{what}: {str(folder)!r} holds no *.safetensors file; pickled weights (.bin, .pt) are not "
            "read, convert them first"
        )
    loader: Any = cls
    arguments: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        _dtype_argument(cls): dtype or torch.float32,
    }
    try:
        model, info = loader.from_pretrained(str(path), **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{what}: {cls.__name__} cannot be loaded from {str(folder)!r}: {error}") from error
    absent = sorted(info.get("missing_keys") or ())
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{what}: {str(folder)!r} lacks weights of {cls.__name__}: {', '.join(absent[:3])}{more}; it "
            "would train from random values"
        )
    return model


def _dtype_argument(cls: type) -> str:
    from_diffusers = any(base.__module__.startswith("diffusers.") for base in cls.__mro__)
    return "torch_dtype" if from_diffusers else "dtype"


def load_predictor_folder(module: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a Hugging Face folder into a predictor, sharded or not, after a look at the folder's config.json.

    Shapes alone do not tell one network from another: with another number of heads or another epsilon the
    same weights load and compute something else. A component that has `check_pretrained_config(config) ->
    list[str]` is asked what differs.

    Raises:
        UserError: config.json and section disagree, or the weights do not fit.
    """
    path = Path(folder).expanduser()
    file = path / "config.json"
    check = getattr(module, "check_pretrained_config", None)
    if callable(check) and file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        differences = check(config)
        if differences:
            raise UserError(
                f"predictor: the section does not describe the network in {str(folder)!r}: "
                f"{'; '.join(differences)}"
            )
    load_hf_folder(module, path)
