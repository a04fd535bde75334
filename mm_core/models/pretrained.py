"""Loading diffusers and transformers folders from disk, strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError  # a value of config.json has a wrong type

from mm_core.models.skeleton import build_skeleton, collecting
from mm_core.weights import StateDictAdapter, find_adapter, load_hf_folder
from mm_core.weights.adapter import problems_of
from mm_core.weights.hf_folder import LoadedFolder, weight_files
from mm_core.weights.library_config import read_config
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig

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
        UserError: no folder, no config.json, no safetensors, unreadable ones, an index that leads out of the folder,
            weights missing or of other shapes, or a config.json that names code to be fetched.
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
    refuse_foreign_code(path / "config.json", what)
    weight_files(path)  # the libraries follow an index that leads out of the folder
    if collecting():
        return build_skeleton(cls, path, dtype=dtype, what=what)
    loader: Any = cls
    arguments: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        _dtype_argument(cls): dtype or torch.float32,
    }
    try:
        model, info = loader.from_pretrained(str(path), **arguments)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        StrictDataclassError,
    ) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{what}: {cls.__name__} cannot be loaded from {str(folder)!r}: {why}") from error
    absent = sorted(info.get("missing_keys") or ())
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{what}: {str(folder)!r} lacks weights of {cls.__name__}: {', '.join(absent[:3])}{more}; it "
            "would train from random values"
        )
    return model


def refuse_foreign_code(file: Path, what: str) -> None:
    """transformers takes an implementation (of attention, say) with a `/` in its name for a repository, and runs what
    it fetches from there.

    A config.json that is no JSON is the library's to complain about.

    Raises:
        UserError: the config.json, or a part of it, names such a one, or it is no file that can be parsed safely.
    """
    if file.exists() and not file.is_file():  # opening a pipe would wait for a writer that may never come
        raise UserError(f"{what}: {str(file)!r} is no regular file; put the model's config.json there")
    try:
        found = _repository(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return
    except RecursionError:
        raise UserError(
            f"{what}: {str(file)!r} is nested too deeply for a config.json; download it again"
        ) from None
    if found is not None:
        raise UserError(
            f"{what}: {str(file)!r} asks for {found!r}, code that would be fetched and run; remove the key"
        )


def _repository(node: Any) -> str | None:
    """The first implementation in the parts of a config.json that is a repository rather than a name."""
    if isinstance(node, list):
        return next((found for item in node if (found := _repository(item)) is not None), None)
    if not isinstance(node, dict):
        return None
    for key, value in node.items():
        if str(key).removesuffix("_internal").endswith("_implementation"):
            values = value.values() if isinstance(value, dict) else [value]
            for text in values:
                if isinstance(text, str) and "/" in text:
                    return text
        elif (found := _repository(value)) is not None:
            return found
    return None


def _dtype_argument(cls: type) -> str:
    from_diffusers = any(base.__module__.startswith("diffusers.") for base in cls.__mro__)
    return "torch_dtype" if from_diffusers else "dtype"


def load_predictor_folder(
    module: torch.nn.Module,
    folder: str | os.PathLike[str],
    component: ComponentConfig | None = None,
    *,
    elsewhere: Collection[str] = (),
) -> LoadedFolder:
    """Load a Hugging Face folder into a predictor, sharded or not, after a look at the folder's config.json.

    Shapes alone do not tell one network from another: with another number of heads or another epsilon the
    same weights load and compute something else. A component that has `check_pretrained_config(config) ->
    list[str]` is asked what differs, and so is its weights adapter.

    Args:
        component: the predictor's section; its weights adapter, if one is registered, says what the folder's
            keys are called in the module.
        elsewhere: names of tensors that other pipeline stages have.

    Returns:
        What the folder was like, to write it again as it came.

    Raises:
        UserError: config.json and section disagree, the weights do not fit, or the adapter is none.
    """
    path = Path(folder).expanduser()
    adapter = None if component is None else find_adapter(component)
    # A predictor may be one of two experts, each in a section of its own name.
    where = ".".join(map(str, component.path)) if component is not None and component.path else "predictor"
    differences = folder_differences(module, path / "config.json", adapter, component)
    if differences:
        raise UserError(
            f"{where}: the section does not describe the network in {str(folder)!r}: {'; '.join(differences)}"
        )
    return load_hf_folder(module, path, adapter, elsewhere=elsewhere)


def folder_differences(
    module: torch.nn.Module,
    file: Path,
    adapter: StateDictAdapter | None,
    component: ComponentConfig | None,
) -> list[str]:
    """Say what a folder's config.json describes otherwise than module and section; nothing if there is none.

    Args:
        file: the config.json.

    Raises:
        UserError: it cannot be read.
    """
    check = getattr(module, "check_pretrained_config", None)
    if not file.is_file() or (adapter is None and not callable(check)):
        return []
    config = read_config(file)
    differences = list(check(config)) if callable(check) else []
    if adapter is not None and component is not None:
        differences += problems_of(adapter, config, component.fields)
    return list(dict.fromkeys(differences))
