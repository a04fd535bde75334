"""The trained adapter of a module with PEFT layers (LoRA and its kin) as a folder that PEFT, transformers and diffusers
load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.config.lora import ADAPTER_CONFIG
from mm_core.sharding.plan import bare_name
from mm_core.weights.agreement import rank, ranks_agree
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_folder import fill_from_folder
from mm_core.weights.hf_save import with_values
from mm_core.weights.hf_writer import FolderWriter, PlannedTensor
from mm_core.weights.peft_names import adapter_names
from mm_core.weights.tensors import state_tensors, whole_tensor
from mm_registry.words import described

#: PEFT's own name of what wraps the network. diffusers: `load_lora_adapter(folder, prefix="base_model.model")`.
PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"
# The same adapter under the names by which diffusers' pipelines know their networks: `pipeline.load_lora_weights(folder)`.
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# diffusers knows the scale of an adapter from here; without it alpha would be taken for the rank.
_DIFFUSERS_METADATA = "lora_adapter_metadata"


def save_peft_folder(
    module: nn.Module,
    folder: Path | str,
    adapter: str | None = None,
    *,
    values: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write one adapter of a module as `adapter_config.json` and `adapter_model.safetensors`, in its own dtype; of a network
    of diffusers also as `pytorch_lora_weights.safetensors`.

    The folder appears whole or not at all. Read it with `PeftModel.from_pretrained(model, folder)`, transformers'
    `model.load_adapter(folder)`, diffusers' `model.load_lora_adapter(folder, prefix="base_model.model",
    weight_name="adapter_model.safetensors")`, or its `pipeline.load_lora_weights(folder)`.

    Args:
        module: PEFT layers were put into it, by `peft.inject_adapter_in_model`, diffusers' or transformers'
            `add_adapter`, or `peft.get_peft_model`. If it is sharded, the ranks that share its mesh call this
            together, and rank 0 writes.
        folder: does not exist yet, or is empty.
        adapter: its name; None if there is one only.
        values: the module's name -> what is written instead of the module's own, such as averaged weights.

    Raises:
        WeightsError: there is no such adapter, the folder holds something already or cannot be written.
        CheckpointError: another failure, on some rank.
    """
    folder = Path(folder)
    tensors = with_values(state_tensors(module), values or {})
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    what = f"writing {folder}"
    writer: FolderWriter | None = None
    with ExitStack() as stack:
        with ranks_agree(what, alone=alone):
            config, chosen = _adapter(module, tensors, adapter)
            prefixes = [PREFIX, *_diffusers_prefix(module)]
            renamed = {name: [p + name.removeprefix(PREFIX) for p in prefixes] for name in chosen}
            planned = {
                other: PlannedTensor(t.dtype, tuple(t.shape))
                for name, t in chosen.items()
                for other in renamed[name]
            }
            text = json.dumps(config, indent=2, sort_keys=True)
            if alone or rank() == 0:
                told = {p + key: value for p in prefixes for key, value in config.items()}
                files = [list(one) for one in zip(*renamed.values(), strict=True)]
                names = [_FILE, _DIFFUSERS_FILE][: len(files)]
                metadata = {_DIFFUSERS_METADATA: json.dumps(told)}
                writer = stack.enter_context(
                    FolderWriter(folder, planned, files, names=names, metadata=metadata)
                )
        whole = {name: whole_tensor(t) if isinstance(t, DTensor) else t for name, t in chosen.items()}
        with ranks_agree(what, alone=alone):
            if writer is not None:
                for name, tensor in whole.items():
                    for other in renamed[name]:
                        writer.write(other, tensor)
                writer.write_text(ADAPTER_CONFIG, text + "\n")
                writer.publish()
    return folder


def load_peft_folder(module: nn.Module, folder: Path | str, adapter: str | None = None) -> None:
    """Read a folder that `save_peft_folder` or PEFT wrote into a module's adapter of the same shape, in place; dtypes are
    converted. Ranks that share a mesh call this together, and each reads only its slices.

    Args:
        module: materialised, sharded or not.
        adapter: its name; None if there is one only.

    Raises:
        WeightsError: tensors are missing, unexpected, or of another shape; all of these are listed together.
        CheckpointError: another failure, on some rank.
    """
    folder = Path(folder)
    tensors = state_tensors(module)
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with ranks_agree(f"loading {folder}", alone=alone):
        _, chosen = _adapter(module, tensors, adapter)
        fill_from_folder(chosen, folder)


def _diffusers_prefix(module: nn.Module) -> list[str]:
    """What diffusers' pipelines put before the names of a network of theirs: that of the part that it is."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("diffusers.")]
    if "PeftAdapterMixin" not in names:
        return []
    return ["unet." if any("UNet" in name for name in names) else "transformer."]


def _adapter(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], adapter: str | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The content of adapter_config.json, and the adapter's tensors by the folder's names."""
    names = adapter_names(module)
    if adapter is None and len(names) == 1:
        adapter = names[0]
    if adapter not in names:
        raise WeightsError(
            f"adapter {adapter!r}: the module has {', '.join(map(repr, names)) or 'none'}; name one of them"
            if names
            else "the module has no PEFT adapter; save it as a whole"
        )
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise WeightsError(
            "a PEFT adapter is saved by peft, which is not installed; pip install peft"
        ) from error
    peft_config: Any = getattr(module, "peft_config")[adapter]  # noqa: B009 - a mapping that nn.Module does not declare
    try:
        # The given tensors are chosen from and renamed, not read: they may be sharded. peft compares their names with the
        # modules', which wrappers have changed.
        wrapped = {name: bare_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        given = {name: tensors[bare] for name, bare in wrapped.items() if bare in tensors}
        found = get_peft_model_state_dict(
            module, state_dict=given, adapter_name=adapter, save_embedding_layers=False
        )
    except (KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise WeightsError(f"adapter {adapter!r} cannot be saved by peft: {described(error)}") from error
    chosen = {PREFIX + bare_name(name.removeprefix(PREFIX)): tensor for name, tensor in found.items()}
    if not chosen:
        raise WeightsError(f"adapter {adapter!r} has no tensors in the module")
    return _plain(peft_config.to_dict()) | {"inference_mode": True}, chosen


def _plain(value: Any) -> Any:
    """A configuration as JSON: sets as sorted lists, PEFT's enumerations as their texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    return value
