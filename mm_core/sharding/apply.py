"""From a checked plan to a sharded module: experts, activations, FSDP2 from the inside out, prefetch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils._pytree import tree_map_only

from mm_core.accelerator import Accelerator
from mm_core.sharding.activations import wrap_activations
from mm_core.sharding.compiled import compile_modules
from mm_core.sharding.context import share_attention, share_sequences
from mm_core.sharding.experts import distribute_experts, expert_settings
from mm_core.sharding.ignored import compute_in_own_dtype
from mm_core.sharding.joint_vision import join_vision_calls
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.participation import every_rank_takes_part
from mm_core.sharding.plan import ALIGNED, ShardingError, ShardingPlan, Unit, bare_name
from mm_core.sharding.prefetch import set_prefetch
from mm_core.sharding.tensor import apply_tensor_parallel


def apply_plan(
    root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, parallel: ParallelMesh | None = None
) -> None:
    """Carry out a plan, in place. The module may be on the meta device; `materialize` fills it afterwards.

    Units are wrapped around recomputed modules: a block is gathered once for its recomputation and its
    backward pass. One rank that computes in the parameters' own dtype has nothing to shard or cast: there
    the plan is checked and its recompute applied, but no module is wrapped (see `needs_sharding`).

    Args:
        root: the module that the plan was built from, untouched since.
        mesh: 1-D (`dp_shard`) or 2-D (`dp_replicate`, `dp_shard`).
        parallel: the mesh of which it is a part, if the model is shared in other ways too.

    Raises:
        ShardingError: the experts cannot be distributed over these ranks, or a parameter has no dimension to cut.
    """
    # An in-place operation on such an output would lose its gradient. Nothing of ours does one, and every
    # model's gradients are tested against the unsharded model; the line would greet every user of a final
    # Linear.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    bare = dict(root.named_modules())
    modules, expert_mesh = prepare_modules(root, plan, mesh, parallel)
    compile_modules(bare, plan)
    if not needs_sharding(root, plan, mesh):
        return
    settings = fsdp_settings(root, plan, mesh)
    _refuse_numbers(plan)
    for unit in _inside_out(plan):
        own = settings
        if unit.path in plan.experts and expert_mesh is not None:
            own = expert_settings(settings, plan, modules[unit.path], expert_mesh)
        if unit.keep_gathered or unit.path == ALIGNED:
            own = {**own, "reshard_after_forward": False}
        fully_shard(
            [modules[path] for path in plan.aligned] if unit.path == ALIGNED else modules[unit.path], **own
        )
    _shard_root(root, plan, settings)
    _only_sums(root)
    root._mm_offload_to_cpu = plan.offload_to_cpu  # where materialize() puts the parameters
    set_prefetch(unit_modules(root, modules, plan), plan)
    every_rank_takes_part(root, plan)


def prepare_modules(
    root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, parallel: ParallelMesh | None = None
) -> tuple[dict[str, nn.Module], DeviceMesh | None]:
    """The part of `apply_plan` that comes before FSDP2: what a rank computes, and what it keeps for backward.

    Returns:
        The modules by their bare paths, wrapped ones in their wrappers; and the mesh of experts that are dealt out.
    """
    modules = dict(root.named_modules())  # names are resolved once, before any module is wrapped
    if parallel is not None and parallel.tp is not None:
        apply_tensor_parallel(root, plan, parallel.tp)
    expert_mesh = distribute_experts(root, plan, mesh)
    context = share_attention(root, modules, plan, parallel)
    bare = dict(modules)
    wrap_activations(modules, plan)
    for path in plan.joint_vision:
        join_vision_calls(modules[path], bare[path].forward, plan.full_path(path))
    if context is not None:
        share_sequences(modules, bare, context)
    compute_in_own_dtype(modules, plan)
    _cast_inputs(root, plan)
    return modules, expert_mesh


def unit_modules(root: nn.Module, modules: dict[str, nn.Module], plan: ShardingPlan) -> dict[str, nn.Module]:
    """The module of each unit, by the unit's path; any module of a group stands for all of them."""
    found = {
        unit.path: modules[plan.aligned[0] if unit.path == ALIGNED else unit.path] for unit in plan.units
    }
    return {"": root, **found}


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


def _inside_out(plan: ShardingPlan) -> list[Unit]:
    """Units in the order in which modules are sharded: what is inside others goes first."""
    return sorted(plan.units, key=lambda unit: (unit.path != ALIGNED, -unit.path.count(".")))


def _refuse_numbers(plan: ShardingPlan) -> None:
    for parameter in (p for unit in (*plan.units, plan.root) for p in unit.parameters):
        if not parameter.shape:
            raise ShardingError(
                f"{plan.full_path(parameter.name)} is a single number without a dimension, which FSDP2 cannot cut; "
                "give it the shape [1], or freeze it and name its module under ignored_modules."
            )


def _only_sums(root: nn.Module) -> None:
    """Reduce gradients by sums and divide them in a step of its own, on devices that know no other reduction."""
    if Accelerator.current().forces_sum_reduction:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _shard_root(root: nn.Module, plan: ShardingPlan, settings: dict[str, Any]) -> None:
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
