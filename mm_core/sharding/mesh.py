"""The device mesh that parameters are sharded over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_core.accelerator import Accelerator
from mm_core.sharding.plan import ShardingError

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

SHARD, REPLICATE = "dp_shard", "dp_replicate"


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
        raise ShardingError(
            f"reshard_after_forward: {reshard} does not divide the {size} ranks that share the parameters; "
            f"use true, false or one of {_divisors(size)}."
        )
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
    device_type = Accelerator.current().type
    ranks = (
        dist.get_process_group_ranks(process_group) if process_group else list(range(dist.get_world_size()))
    )
    shards = shard_size(fsdp2, len(ranks))
    replicas = len(ranks) // shards
    whole_world = len(ranks) == dist.get_world_size()
    if replicas == 1:
        if whole_world or process_group is None:
            return init_device_mesh(device_type, (shards,), mesh_dim_names=(SHARD,))
        return DeviceMesh.from_group(process_group, device_type, mesh_dim_names=(SHARD,))
    if whole_world:
        return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=(REPLICATE, SHARD))
    return _mesh_inside(ranks, (replicas, shards), device_type)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _mesh_inside(ranks: list[int], shape: tuple[int, int], device_type: str) -> DeviceMesh:
    """A 2-D mesh over part of the world.

    The other ranks do not call, so each group is made by its members only.
    """
    grid = torch.tensor(ranks, dtype=torch.int).view(shape)
    row, column = (int(i) for i in (grid == dist.get_rank()).nonzero()[0])
    replicate = dist.new_group(grid[:, column].tolist(), use_local_synchronization=True)
    shard = dist.new_group(grid[row].tolist(), use_local_synchronization=True)
    return DeviceMesh.from_group(
        [replicate, shard], device_type, mesh=grid, mesh_dim_names=(REPLICATE, SHARD)
    )
