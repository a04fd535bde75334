"""Running a module's own forward on other tensors than its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def with_parameters(
    module: nn.Module,
    cls: type[nn.Module],
    tensor_of: Callable[[nn.Parameter], torch.Tensor],
    changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A shallow copy of a module without hooks, of the class that it had before FSDP2, whose own parameters are exchanged.

    To be made anew in each call: FSDP2 puts other parameters in place for each forward and backward pass.

    Args:
        cls: of the module, before FSDP2.
        tensor_of: what the copy has in place of a parameter.
        changes: attributes of the copy that differ.
    """
    copy: nn.Module = object.__new__(cls)
    copy.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
    copy.__dict__.update(changes or {})
    copy._parameters = {
        name: None if parameter is None else tensor_of(parameter)
        for name, parameter in module._parameters.items()
    }
    return copy


def own_part(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank has of a parameter, differentiated."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
