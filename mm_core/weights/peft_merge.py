"""What a network's own weights become when its PEFT adapters are added to them, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.sharding.plan import bare_name
from mm_core.weights.peft_names import base_name
from mm_core.weights.tensors import state_tensors, whole_tensor

Read = Callable[[str], torch.Tensor]


def merged_reader(module: nn.Module, read: Read | None = None, read_base: Read | None = None) -> Read:
    """Return a function from an upstream name to that tensor with what the adapters add, whole, on its own device.

    The sum is computed in fp32 and has the dtype of the network's own tensor. Of a sharded module each rank calls the
    function for the same names in the same order.

    Args:
        module: with PEFT layers, sharded or not; on the meta device if both of the others are given.
        read: from the module's name of a tensor that is trained to its value, whole.
        read_base: from an upstream name to the network's own tensor, whole.
    """
    tensors = state_tensors(module)
    names = {bare: name for name in tensors if (bare := base_name(name)) is not None}
    layers = _layers(module)

    def own(name: str) -> torch.Tensor:
        return _whole(tensors[name])

    def trained(name: str) -> torch.Tensor:
        return read(name) if read is not None else own(name)

    def merged(name: str) -> torch.Tensor:
        theirs = names[name]
        is_trained = tensors[theirs].requires_grad
        if is_trained:
            return trained(theirs)
        value = own(theirs) if read_base is None else read_base(name)
        for path, layer in layers.get(theirs, ()):
            delta = _delta(path, layer, trained).to(value.device)
            value = (value.float() + delta).to(value.dtype)
        return value

    return merged


def merged_values(module: nn.Module, values: Mapping[str, torch.Tensor] | None = None) -> Read:
    """As `merged_reader`, with others in the place of some of the module's tensors, such as averaged weights."""
    tensors = {**state_tensors(module), **(values or {})}
    return merged_reader(module, lambda name: _whole(tensors[name]))


def _layers(module: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """The module's name of a weight -> path and PEFT layer of each adapter that adds to it."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    places = {id(tensor): name for name, tensor in reversed(state_tensors(module).items())}
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            attribute = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            weight = getattr(layer.get_base_layer(), attribute)
            found.setdefault(places[id(weight)], []).append((bare_name(path), layer))
    return found


def _delta(path: str, layer: Any, trained: Read) -> torch.Tensor:
    """What one layer's adapters add, by PEFT's own formula on whole tensors, fp32."""
    total: Any = 0
    for adapter in layer.active_adapters:
        stand_in = copy.copy(layer)  # of the same class, with whole tensors in the place of sharded ones
        stand_in._modules = dict(layer._modules)
        for kind in ("lora_A", "lora_B"):
            inner = copy.copy(getattr(layer, kind)[adapter])
            whole = trained(f"{path}.{kind}.{adapter}.weight").float()
            inner._parameters = {**inner._parameters, "weight": nn.Parameter(whole, requires_grad=False)}
            stand_in._modules[kind] = nn.ModuleDict({adapter: inner})
        with torch.no_grad():
            total = total + _in_fp32(stand_in, adapter)
    result: torch.Tensor = total
    return result


def _in_fp32(layer: Any, adapter: str) -> torch.Tensor:
    if hasattr(layer, "parameter_name"):
        # It would round what it adds to the weight's dtype, and ask the weight where it is.
        lhs, rhs, scaling = _factors(layer, adapter)
        return scaling * (lhs @ rhs)
    delta: torch.Tensor = layer.get_delta_weight(adapter)
    return delta.float()


def _factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    if layer.num_experts == 1:
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, layer.scaling[adapter]
    stand_in = copy.copy(layer)
    stand_in.get_param = lambda: layer.lora_A[adapter].weight  # of its dtype the factors are made
    factors: tuple[torch.Tensor, torch.Tensor, float] = stand_in.get_delta_factors(adapter)
    return factors


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return whole_tensor(tensor).detach() if isinstance(tensor, DTensor) else tensor.detach()
