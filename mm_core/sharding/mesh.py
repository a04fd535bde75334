"""The device meshes that parameters are sharded over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_core.accelerator import Accelerator
from mm_core.sharding.fitness import reshard_problem
from mm_core.sharding.plan import ShardingError

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

SHARD, REPLICATE = "dp_shard", "dp_replicate"
EP, EP_SHARD, EP_REPLICATE = "ep", "ep_shard", "ep_replicate"


def shard_size(fsdp2: Fsdp2Config, world_size: int) -> int:
    """How many ranks a parameter is cut over: `sharding_size`, where `auto` and an absent field mean all of
    them.

    Raises:
        ShardingError: it, or the number in `reshard_after_forward`, does not divide the number of ranks.
    """
    size = fsdp2.shard_group_size(world_size)
    if world_size % size:
        raise ShardingError(
            f"sharding_size: {size} does not divide the {world_size} data-parallel ranks; "
            f"use auto or one of {_divisors(world_size)}."
        )
    reshard = fsdp2.reshard_after_forward
    if not isinstance(reshard, bool) and size % reshard:
        raise ShardingError(reshard_problem(reshard, size))
    return size


def build_device_mesh(fsdp2: Fsdp2Config, process_group: dist.ProcessGroup | None = None) -> DeviceMesh:
    """The mesh of a process group: `[dp_shard]`, or `[dp_replicate, dp_shard]` when `sharding_size` is
    smaller than the group.

    Every rank of the group calls this. With `sharding_size: 1` parameters are replicated and only gradients
    are exchanged.

    Args:
        process_group: ranks that share the data-parallel work; all ranks by default.

    Raises:
        ShardingError: `sharding_size` does not divide the number of ranks.
    """
    ranks = (
        dist.get_process_group_ranks(process_group) if process_group else list(range(dist.get_world_size()))
    )
    shards = shard_size(fsdp2, len(ranks))
    replicas = len(ranks) // shards
    if replicas > 1:
        return _mesh(ranks, {REPLICATE: replicas, SHARD: shards}, Accelerator.current().type)
    if process_group is not None and len(ranks) < dist.get_world_size():
        return DeviceMesh.from_group(process_group, Accelerator.current().type, mesh_dim_names=(SHARD,))
    return _mesh(ranks, {SHARD: shards}, Accelerator.current().type)


def build_expert_mesh(mesh: DeviceMesh, size: int) -> DeviceMesh:
    """The ranks of a data-parallel mesh in the order in which experts are dealt out: `[ep_shard, ep]`, or
    `[ep_replicate, ep_shard, ep]` over a mesh that replicates.

    Ranks that follow each other share the experts of a layer (`ep`); those that hold the same experts shard
    their parameters (`ep_shard`) as far as `sharding_size` goes, and replicate them beyond. Every rank of the
    mesh calls this.

    Args:
        mesh: what `build_device_mesh` returned.
        size: how many ranks share the experts of a layer.

    Raises:
        ShardingError: `size` does not divide the number of ranks, or does not go with `sharding_size`.
    """
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) % size:
        raise ShardingError(
            f"expert_parallel_size: {size} does not divide the {len(ranks)} data-parallel ranks; "
            f"use one of {_divisors(len(ranks))}."
        )
    shards = mesh.size(-1)
    if shards % size and size % shards:
        fitting = [n for n in _all_divisors(len(ranks)) if not (shards % n and n % shards)]
        raise ShardingError(
            f"expert_parallel_size: groups of {size} ranks do not fit into the {shards} ranks of sharding_size, "
            f"nor these into them; use one of {', '.join(map(str, fitting))}."
        )
    shape = {EP_SHARD: max(1, shards // size), EP: size}
    replicas = len(ranks) // (shape[EP_SHARD] * size)
    return _mesh(ranks, {EP_REPLICATE: replicas, **shape} if replicas > 1 else shape, mesh.device_type)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in _all_divisors(number))


def _all_divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _mesh(ranks: list[int], shape: dict[str, int], device_type: str) -> DeviceMesh:
    """A mesh of these ranks, by the name and the size of each dimension."""
    names, sizes = tuple(shape), tuple(shape.values())
    if len(ranks) == dist.get_world_size():
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)
    # The other ranks do not call, so each group is made by its members only.
    grid = torch.tensor(ranks, dtype=torch.int).view(sizes)
    place = tuple(int(i) for i in (grid == dist.get_rank()).nonzero()[0])
    groups = []
    for dimension in range(grid.ndim):
        line = grid[tuple(slice(None) if i == dimension else at for i, at in enumerate(place))]
        groups.append(dist.new_group(line.tolist(), use_local_synchronization=True))
    return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=names)
