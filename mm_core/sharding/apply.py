"""From a checked plan to a sharded module: recompute, FSDP2 from the inside out, prefetch.

And back: which plan a module shows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from mm_core.accelerator import Accelerator
from mm_core.sharding.activations import wrap_activations
from mm_core.sharding.plan import (
    ParameterInfo,
    ShardingError,
    ShardingPlan,
    Unit,
    bare_name,
    describe_parameter,
    is_inside,
)
from mm_core.sharding.prefetch import set_prefetch


def apply_plan(root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh) -> None:
    """Carry out a plan, in place. The module may be on the meta device; `materialize` fills it afterwards.

    Units are wrapped around recomputed modules: a block is gathered once for its recomputation and its
    backward pass. One rank that computes in the parameters' own dtype has nothing to shard or cast: there
    the plan is checked and its recompute applied, but no module is wrapped (see `needs_sharding`).

    Args:
        root: the module that the plan was built from, untouched since.
        mesh: 1-D (`dp_shard`) or 2-D (`dp_replicate`, `dp_shard`).
    """
    # An in-place operation on such an output would lose its gradient. Nothing of ours does one, and every
    # model's gradients are tested against the unsharded model; the line would greet every user of a final
    # Linear.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    modules = dict(root.named_modules())  # names are resolved once, before any module is wrapped
    wrap_activations(modules, plan)
    if not needs_sharding(root, plan, mesh):
        _cast_inputs(root, plan)
        return
    settings = fsdp_settings(root, plan, mesh)
    gathered = {unit.path for unit in plan.units if unit.keep_gathered}
    for path in sorted((unit.path for unit in plan.units), key=lambda path: -path.count(".")):
        own = {**settings, "reshard_after_forward": False} if path in gathered else settings
        fully_shard(modules[path], **own)
    _shard_root(root, plan, settings)
    root._mm_offload_to_cpu = plan.offload_to_cpu  # where materialize() puts the parameters
    set_prefetch(root, [modules[unit.path] for unit in plan.units], plan)


def needs_sharding(root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh) -> bool:
    """Whether FSDP2 would change anything: several ranks, another dtype, or parameters kept on the host.

    Without that its hooks only cost time: 10 to 20 % of a step of a small model on a CPU.
    """
    stored = {
        p.dtype for name, p in root.named_parameters() if bare_name(name) not in plan.ignored_parameters
    }
    dtypes = {plan.param_dtype, plan.reduce_dtype, plan.output_dtype} - {None}
    return mesh.size() > 1 or plan.offload_to_cpu or (bool(dtypes) and dtypes != stored)


def fsdp_settings(root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh) -> dict[str, Any]:
    """Keyword arguments of `torch.distributed.fsdp.fully_shard` for the units of a plan.

    Units do not cast their inputs: the root has cast its own, and what it hands on it has given the dtype
    that it wants; casting again would round RoPE tables to bf16.
    """
    ignored = {p for name, p in root.named_parameters() if bare_name(name) in set(plan.ignored_parameters)}
    pin = plan.pin_memory and Accelerator.current().has_pinned_memory
    return {
        "mesh": mesh,
        "reshard_after_forward": plan.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=plan.param_dtype, reduce_dtype=plan.reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if plan.offload_to_cpu else OffloadPolicy(),
        "ignored_params": ignored or None,
    }


def observe_plan(root: nn.Module, plan: ShardingPlan) -> ShardingPlan:
    """The plan that a sharded module shows, however it came about; checked as a plan is.

    Args:
        root: a module after `fully_shard`.
        plan: what was intended; settings that cannot be seen are taken from it.

    Raises:
        ShardingError: the root is not sharded, or a parameter is outside every unit.
    """
    if not isinstance(root, FSDPModule):
        raise ShardingError(
            f'"{plan.full_path("")}" says that it sharded itself, but its root is no FSDP module.'
        )
    modules = [(bare_name(name), module) for name, module in root.named_modules()]
    units = list(dict.fromkeys(name for name, module in modules if name and isinstance(module, FSDPModule)))
    recompute = tuple(
        dict.fromkeys(name for name, module in modules if isinstance(module, CheckpointWrapper))
    )
    owned: dict[str, list[ParameterInfo]] = {path: [] for path in ["", *units]}
    deepest_first = sorted(units, key=lambda path: -path.count("."))
    for name, parameter in root.named_parameters():
        bare = bare_name(name)
        if isinstance(parameter, DTensor):
            owner = next((path for path in deepest_first if is_inside(bare, path)), "")
            owned[owner].append(describe_parameter(bare, parameter))
        elif bare not in plan.ignored_parameters:
            raise ShardingError(
                f"{plan.full_path(bare)} is in no FSDP unit and not under ignored_modules; "
                "every rank would train its own copy."
            )
    order = {unit.path: i for i, unit in enumerate(plan.units)}
    if set(units) <= set(order):
        units.sort(key=order.__getitem__)
    gathered = {unit.path for unit in plan.units if unit.keep_gathered}
    return replace(
        plan,
        units=tuple(Unit(path, tuple(owned[path]), path in gathered) for path in units),
        root=Unit("", tuple(owned[""])),
        recompute=recompute if set(recompute) != set(plan.recompute) else plan.recompute,
    )


def _shard_root(root: nn.Module, plan: ShardingPlan, settings: dict[str, Any]) -> None:
    _cast_inputs(root, plan)
    mp_policy = MixedPrecisionPolicy(
        param_dtype=plan.param_dtype,
        reduce_dtype=plan.reduce_dtype,
        # On the root only: an inner module would hand fp32 to the next one's bf16 weights.
        output_dtype=plan.output_dtype,
        cast_forward_inputs=False,
    )
    # The backward pass begins with the root's parameters: freeing them would only gather them again.
    reshard = None if plan.reshard_after_forward else False
    fully_shard(root, **{**settings, "mp_policy": mp_policy, "reshard_after_forward": reshard})


def _cast_inputs(root: nn.Module, plan: ShardingPlan) -> None:
    """Cast the root's inputs, which FSDP2 would do too, but without exceptions."""
    if plan.param_dtype is not None and plan.cast_forward_inputs:
        hook = _input_cast(root.forward, plan.param_dtype, plan.fp32_inputs)
        root.register_forward_pre_hook(hook, with_kwargs=True)


def _input_cast(
    forward: Callable[..., Any], dtype: torch.dtype, kept: Collection[str]
) -> Callable[..., tuple[Any, Any]]:
    """A pre-forward hook that casts floating-point inputs, except the arguments named `kept`."""
    names = [
        p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]

    def cast(value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        positional = tuple(
            value if i < len(names) and names[i] in kept else cast(value) for i, value in enumerate(args)
        )
        return positional, {name: value if name in kept else cast(value) for name, value in kwargs.items()}

    return hook
