"""`ShardingPlan`: which parameters are gathered together, what is recomputed, what stays whole.

Plain data, ready to print and store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from mm_core.accelerator import dtype_name
from mm_core.sharding.context_policy import ContextPolicy
from mm_core.sharding.patterns import PlanError
from mm_core.sharding.policy import PipelinePolicy

_WRAPPER = "_checkpoint_wrapped_module"
ALIGNED = "(aligned)"
"""Path of the unit that is made of the modules `ShardingPlan.aligned`; no module has such a name."""
_PATHS = ("recompute", "offload_activations", "compiled", "experts", "aligned", "ignored", "joint_vision")
_SETTINGS = (
    "reshard_after_forward",
    "param_dtype",
    "reduce_dtype",
    "output_dtype",
    "cast_forward_inputs",
    "offload_to_cpu",
    "pin_memory",
    "forward_prefetch",
    "backward_prefetch",
    "recompute_granularity",
    "use_reentrant",
    "expert_parallel_size",
    "reshard_local_experts",
)


class ShardingError(PlanError):
    """What a policy or fsdp2.yaml asks for cannot be done with this model or this number of ranks."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of a unit; `shape` is that of the whole tensor, whoever holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def shard_numel(self, shards: int) -> int:
        """Elements on the rank that holds most, when dimension 0 is cut into `shards`."""
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / shards) * math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered and freed together.

    Args:
        path: module path relative to the root; `""` is the root itself, which holds what no other unit has.
        parameters: what it holds.
        keep_gathered: stays gathered between forward and backward.
    """

    path: str
    parameters: tuple[ParameterInfo, ...]
    keep_gathered: bool = False

    @property
    def numel(self) -> int:
        """Elements of all its parameters, whole."""
        return sum(p.numel for p in self.parameters)


@dataclass(frozen=True)
class ShardingPlan:
    """How one FSDP root is sharded.

    Args:
        prefix: path of the root in the composite model (`predictor`), as users write it.
        units: in the order of the forward pass, without the root.
        root: what is left.
        recompute: paths of modules whose activations are recomputed.
        recompute_granularity: `full`, or `selective`: the results of expensive operations are kept.
        offload_activations: paths of modules whose saved activations wait in host memory.
        compiled: paths of modules whose forward is compiled by `torch.compile`.
        experts: paths of modules whose parameters hold one expert an index of dimension 0, when they are
            distributed over ranks.
        aligned: paths of the modules that make up the unit `ALIGNED`, if there is one.
        cut: name of each parameter that tensor parallelism cuts -> over how many ranks; known of a module that is sharded.
        ignored: paths of frozen modules that are not sharded, and their parameters' names.
        fp32_inputs: forward arguments of the root that keep their dtype.
        joint_vision: paths of modules that see images and videos in one call.
        tensor: path of each layer that the policy lets tensor parallelism cut -> its style.
        context: where the root's sequences are split over ranks, with paths in place of patterns.
        pipeline: where the root can be cut into pipeline stages.
        sources: field of fsdp2.yaml -> where it came from: `fsdp2.yaml`, `policy` or `structure`.
        reshard_after_forward, …, backward_prefetch: as in fsdp2.yaml.
    """

    prefix: str
    units: tuple[Unit, ...]
    root: Unit
    recompute: tuple[str, ...] = ()
    recompute_granularity: str = "full"
    offload_activations: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    cut: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_parameters: tuple[str, ...] = ()
    fp32_inputs: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    reshard_after_forward: bool | int = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True
    offload_to_cpu: bool = False
    pin_memory: bool = False
    use_reentrant: bool = False
    forward_prefetch: int = 0
    backward_prefetch: int = 0
    expert_parallel_size: int = 1
    reshard_local_experts: bool = True
    joint_vision: tuple[str, ...] = ()
    tensor: Mapping[str, str] = field(default_factory=dict)
    context: ContextPolicy | None = None
    pipeline: PipelinePolicy | None = None

    def as_dict(self, shards: int, ranks: int | None = None) -> dict[str, Any]:
        """The plan as JSON-able data, to be stored with the run.

        Args:
            shards: number of ranks that a parameter is cut over.
            ranks: data-parallel ranks; None if their number is not known.
        """
        from mm_core.sharding.rows import (
            is_wrapped,
            peak_memory,
            unit_rows,
        )  # they describe plans, and import this

        peak = peak_memory(self, shards, wrapped=ranks is None or is_wrapped(self, ranks))
        settings = {
            name: dtype_name(value) if isinstance(value, torch.dtype) else value
            for name in _SETTINGS
            for value in [getattr(self, name)]
        }
        paths = {name: [self.full_path(path) for path in getattr(self, name)] for name in _PATHS}
        return {
            "prefix": self.prefix,
            "shards": shards,
            "ranks": ranks,
            "sources": dict(self.sources),
            **settings,
            **paths,
            "cut": {self.full_path(name): ranks for name, ranks in self.cut.items()},
            "tensor": {self.full_path(path): style for path, style in self.tensor.items()},
            "fp32_inputs": list(self.fp32_inputs),
            "context": None if self.context is None else asdict(self.context),
            "pipeline": None if self.pipeline is None else asdict(self.pipeline),
            "memory": {**asdict(peak), "peak": peak.total},
            "units": unit_rows(self, shards),
        }

    @property
    def parameter_names(self) -> set[str]:
        """Names of all parameters, those that are not sharded too."""
        owned = {info.name for unit in (*self.units, self.root) for info in unit.parameters}
        return owned | set(self.ignored_parameters)

    def full_path(self, path: str) -> str:
        """A path as users write it, with the prefix; the root's is the prefix, or `(root)` without one."""
        return f"{self.prefix}.{path}" if self.prefix and path else self.prefix or path or "(root)"


def is_inside(path: str, other: str) -> bool:
    """Whether `path` is `other` or below it."""
    return not other or path == other or path.startswith(other + ".")


def bare_name(name: str) -> str:
    """A module's or parameter's path without the names that wrappers put in."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER)


def describe_parameter(name: str, parameter: nn.Parameter) -> ParameterInfo:
    """The entry of one parameter. For a DTensor the shape is the whole tensor's."""
    return ParameterInfo(bare_name(name), tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
