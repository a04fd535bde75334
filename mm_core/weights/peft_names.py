"""Names in a network whose layers PEFT has wrapped: which tensors are its adapters', and what the others are called
without them. peft itself is not needed.

PEFT puts the layer `q_proj` inside one of its own, of the same name: `q_proj.base_layer.weight` is the network's, and
`q_proj.lora_A.default.weight` the adapter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_core.weights.tensors import state_tensors

_INNER = "base_layer"
_OWN = "lora_"


def adapter_names(module: nn.Module) -> list[str]:
    """Names of the PEFT adapters in a module; none if it has no PEFT layers."""
    configs: Any = getattr(module, "peft_config", None)
    return [str(name) for name in configs] if isinstance(configs, Mapping) else []


def base_name(name: str) -> str | None:
    """What a tensor or module of a network with adapters is called without them; None if it is an adapter's."""
    parts = name.split(".")
    if any(part.startswith(_OWN) for part in parts):
        return None
    return ".".join(part for part in parts if part != _INNER)


def base_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the network itself by upstream name, without its PEFT adapters; of a network
    that has none, all of them.
    """
    tensors = state_tensors(module)
    if not adapter_names(module):
        return tensors
    return {own: tensor for name, tensor in tensors.items() if (own := base_name(name)) is not None}


def adapter_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network's PEFT adapters by the module's names."""
    if not adapter_names(module):
        return {}
    return {name: tensor for name, tensor in state_tensors(module).items() if base_name(name) is None}


def kept_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a module: everything, but of a network with PEFT adapters only what is trained. The rest
    is as it was in the folder that it came from.
    """
    tensors = state_tensors(module)
    if not adapter_names(module):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
