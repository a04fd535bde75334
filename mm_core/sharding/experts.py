"""Expert parallelism: the experts of a layer are dealt out over ranks, and tokens travel to them and back.

An expert's parameters are DTensors over the ranks of `ep`, and FSDP2 shards them further over the ranks that
hold the same experts. Whoever asks for whole tensors (checkpoints, first values, `full_tensor()`) therefore sees
all experts, however they are dealt out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mm_core.sharding.collectives import summed, with_summed_gradient
from mm_core.sharding.expert_form import argument_order, check_form, exchanges_itself
from mm_core.sharding.grouped import (
    evenly,
    grouped_experts,
    is_grouped_form,
    is_load_even,
    tokens_of_experts,
)
from mm_core.sharding.local_copy import own_part, with_parameters
from mm_core.sharding.mesh import EP, EP_REPLICATE, EP_SHARD, build_expert_mesh
from mm_core.sharding.plan import ShardingPlan


def distribute_experts(root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh) -> DeviceMesh | None:
    """Leave each rank its own experts, in place, and let the modules exchange tokens; before `fully_shard`.

    Parameters may be on the meta device. Every rank of the mesh calls this.

    Args:
        root: the module that the plan was built from.
        mesh: of the data-parallel ranks, whose neighbours share experts.

    Returns:
        The mesh of `build_expert_mesh`, or None when each rank has all experts.

    Raises:
        ShardingError: `expert_parallel_size` does not divide the ranks, or a module is none that can be
            distributed.
    """
    if plan.expert_parallel_size == 1 or not plan.experts:
        return None
    expert_mesh = build_expert_mesh(mesh, plan.expert_parallel_size)
    for path in plan.experts:
        module = root.get_submodule(path)
        experts = _number_of_experts(module, plan, path)
        # The exchange is checked before anything is changed.
        forward = _exchange(module, plan.full_path(path), experts, expert_mesh)
        _keep_own(module, expert_mesh[EP])
        _replace_forward(module, forward)
    return expert_mesh


def expert_settings(
    settings: dict[str, Any], plan: ShardingPlan, module: nn.Module, mesh: DeviceMesh
) -> dict[str, Any]:
    """Keyword arguments of `fully_shard` for a module of experts.

    Args:
        settings: those of the other units.
        mesh: what `distribute_experts` returned.
    """
    shard_mesh = (
        mesh[EP_REPLICATE, EP_SHARD] if EP_REPLICATE in (mesh.mesh_dim_names or ()) else mesh[EP_SHARD]
    )
    shards = mesh[EP_SHARD].size()
    # A number of ranks to stay sharded over is meant for all of them, which experts are not sharded over.
    reshard = bool(plan.reshard_after_forward) and plan.reshard_local_experts
    parameters = [p for p in module.parameters() if isinstance(p, DTensor)]
    own = [p.to_local().shape for p in parameters]
    even_inside = all(len(shape) > 1 and shape[1] % shards == 0 for shape in own)
    # Few experts a rank cannot be cut between experts; then each of them is, where its size allows it.
    dimension = 1 if any(shape[0] % shards for shape in own) and even_inside else 0
    return {
        **settings,
        "mesh": shard_mesh,
        "reshard_after_forward": reshard,
        "shard_placement_fn": lambda _: Shard(dimension),
    }


def _number_of_experts(module: nn.Module, plan: ShardingPlan, path: str) -> int:
    """Dimension 0 of all its parameters; the plan has checked that they agree, and divide."""
    check_form(module, plan.full_path(path))
    (experts,) = {p.shape[0] for p in module.parameters()}
    assert experts % plan.expert_parallel_size == 0
    return experts


def _keep_own(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replace the parameters by DTensors of which this rank holds its own experts."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        # A copy: a view would keep the others' memory.
        own = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def split_experts(module: nn.Module, shown: str, mesh: DeviceMesh) -> None:
    """Leave each rank its own experts, in place, where all ranks have the same tokens (tensor parallelism): each computes
    its experts' part of every token, and the parts are summed.

    Args:
        shown: the module's path, for messages.
        mesh: 1-D, of these ranks.

    Raises:
        ShardingError: the module is none whose experts can be dealt out.
    """
    check_form(module, shown)
    index, weights = argument_order(module, shown)
    (experts,) = {p.shape[0] for p in module.parameters()}
    own = experts // mesh.size()
    first = mesh.get_local_rank() * own
    signature = inspect.signature(module.forward)
    compute = _computing(module, index, weights, experts, own, ranks=1)
    _keep_own(module, mesh)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = list(signature.bind(*args, **kwargs).arguments.values())
        hidden = with_summed_gradient(bound[0], mesh)
        shares = with_summed_gradient(bound[weights], mesh)
        tokens, top_k = bound[index].shape
        expert = bound[index].reshape(-1) - first
        if is_load_even():
            here = torch.arange(len(expert) // mesh.size(), device=expert.device)
        else:
            here = ((expert >= 0) & (expert < own)).nonzero().squeeze(1)  # the host waits for the device
        rows = _computed(compute, hidden[here // top_k], expert[here])
        parts = rows.new_zeros(tokens * top_k, rows.shape[-1]).index_copy(0, here, rows)
        parts = parts.view(tokens, top_k, -1) * shares.unsqueeze(-1)
        return summed(parts.sum(1), mesh).to(hidden.dtype)

    _replace_forward(module, forward)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]  # of who asks what it takes
    module.forward = forward


def _exchange(module: nn.Module, shown: str, experts: int, mesh: DeviceMesh) -> Callable[..., torch.Tensor]:
    """The forward of a module of experts that are dealt out."""
    cls = type(module)
    group = mesh.get_group(EP)
    if exchanges_itself(module):
        # MindSpeed-MM calls it with the group first, then the module: its modules define a static method.
        static = isinstance(inspect.getattr_static(cls, "ep_forward"), staticmethod)

        def own_exchange(*args: Any, **kwargs: Any) -> Any:
            local: Any = with_parameters(module, cls, lambda p: _own(p, mesh.size(-1)))
            return (
                local.ep_forward(group, local, *args, **kwargs)
                if static
                else local.ep_forward(group, *args, **kwargs)
            )

        return own_exchange
    index, weights = argument_order(module, shown)
    compute = _computing(module, index, weights, experts, experts // mesh.size(-1), ranks=mesh.size(-1))

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = list(signature.bind(*args, **kwargs).arguments.values())
        return exchange_tokens(bound[0], bound[index], bound[weights], compute, experts, group)

    signature = inspect.signature(module.forward)
    return forward


def _computing(
    module: nn.Module, index: int, weights: int, experts: int, own: int, ranks: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of rows `[R, H]` and the own expert of each `[R]`, which runs them through this rank's experts.

    Args:
        index, weights: places of the module's arguments.
        ranks: whose tokens these experts see, beside this rank's.
    """
    cls, grouped = type(module), is_grouped_form(module)
    # Modules know the number of their experts (num_experts, n_routed_experts, …) and size their tables by it.
    counts = {
        name: own
        for name, value in vars(module).items()
        if type(value) is int and value == experts and "expert" in name
    }

    def compute(rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        local: Any = with_parameters(module, cls, lambda p: _own(p, ranks), counts)
        if grouped:
            return grouped_experts(local, rows, expert, own)
        arguments: list[torch.Tensor] = [rows, rows, rows]
        arguments[index], arguments[weights] = expert.unsqueeze(-1), rows.new_ones(len(rows), 1)
        output: torch.Tensor = local.forward(*arguments)
        return output

    return compute


def exchange_tokens(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Send each token to the ranks of its experts, compute there, and add up what comes back. No token is dropped.

    All ranks of the group call this, with any number of tokens; the backward pass sends gradients the same ways.

    Args:
        hidden: `[T, H]`.
        index: experts of each token, `[T, K]`, 0 to `experts` - 1. Each rank has the same number of them, in the
            order of ranks.
        weights: of the experts' results, `[T, K]`.
        compute: `(rows [R, H], expert [R])` -> `[R, H]`; experts are counted from 0 on each rank.

    Returns:
        `[T, H]`, in the dtype of `hidden`.
    """
    tokens, top_k = index.shape
    ranks = group.size()
    own = experts // ranks
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sent = tokens_of_experts(flat, experts)  # [experts]
    received = torch.empty_like(sent)  # [ranks * own]: what each rank has for each of my experts
    dist.all_to_all_single(received, sent, group=group)
    splits = torch.stack([sent.view(ranks, own).sum(1), received.view(ranks, own).sum(1)])
    if is_load_even():
        to_send = to_receive = evenly(len(flat), ranks)
    else:
        to_send, to_receive = splits.tolist()  # the one time that the host waits for the device
    rows = all_to_all_single_autograd(hidden[order // top_k], to_receive, to_send, group)
    expert = torch.arange(own, device=flat.device).repeat(ranks)
    expert = expert.repeat_interleave(received, output_size=sum(to_receive))
    results = _computed(compute, rows, expert)
    results = all_to_all_single_autograd(results.contiguous(), to_send, to_receive, group)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    parts = results[place].view(tokens, top_k, hidden.shape[-1])
    return (parts * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _computed(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: torch.Tensor, expert: torch.Tensor
) -> torch.Tensor:
    if len(rows):
        return compute(rows, expert)
    # Nothing came. The experts run all the same, on a row of zeros that goes nowhere: their gradients are
    # then zero, not absent, and the backward pass has the collectives that the other ranks wait for.
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
    return compute(padded, expert.new_zeros(1))[:0]


def _own(parameter: nn.Parameter, ranks: int) -> torch.Tensor:
    """This rank's experts as a plain tensor.

    Args:
        ranks: whose tokens they see, all together. FSDP2 takes the mean over the ranks that hold the same experts; what is
            wanted is the mean over all. (`set_gradient_divide_factor` is no help everywhere: torch 2.13 divides twice
            where a sum is forced and one rank holds the experts.)
    """
    local = own_part(parameter)
    if isinstance(parameter, DTensor) and local.requires_grad and ranks > 1:
        local.register_hook(lambda gradient: gradient / ranks)
    return local
