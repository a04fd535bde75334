"""The device meshes that parameters are sharded over, and on which ranks share one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_core.accelerator import Accelerator
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding.fitness import reshard_problem
from mm_core.sharding.plan import ShardingError

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

PP, CP, TP = "pp", "cp", "tp"
SHARD, REPLICATE = "dp_shard", "dp_replicate"
SHARD_CP = "dp_shard_cp"
EP, EP_SHARD, EP_REPLICATE = "ep", "ep_shard", "ep_replicate"


@dataclass(frozen=True)
class ParallelMesh:
    """All ranks of a job as one mesh, and the parts of it that each kind of parallelism works on.

    Args:
        sizes: how many ranks share one model, and in which way.
        root: dimensions `(pp, dp_replicate, dp_shard, cp, tp)`, without those of size 1; `dp_shard` is always there. Ranks
            count as in Megatron: tensor fastest, then context, data, pipeline.
        fsdp: what FSDP2 shards over: `[dp_shard]`, `[dp_replicate, dp_shard]`, or with context parallelism
            `[dp_shard_cp]`, `[dp_replicate, dp_shard_cp]`: ranks that share a sequence hold shards of the same parameters.
        pp, cp, tp: 1-D; None where the size is 1. DTensors of `tp` go with those of `fsdp`.
        dp_rank, dp_size: which of how many equal parts of each batch this rank works on. Ranks that differ in pp, cp or
            tp alone have the same.
        pp_rank: this rank's pipeline stage.
    """

    sizes: ParallelSizes
    root: DeviceMesh
    fsdp: DeviceMesh
    pp: DeviceMesh | None
    cp: DeviceMesh | None
    tp: DeviceMesh | None
    dp_rank: int
    dp_size: int
    pp_rank: int = 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the beginning of the model."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the model, and so has losses."""
        return self.pp_rank == self.sizes.pp - 1

    @property
    def pp_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the other stages of the same model; None without pipeline parallelism."""
        return None if self.pp is None else self.pp.get_group()

    @property
    def told_stage(self) -> int | None:
        """The stage that this rank speaks of, as the first of its ranks; None for the others, and without stages."""
        if self.pp is None:
            return None
        place = self.root.get_coordinate()
        assert place is not None, "every rank is part of the mesh"
        return None if any(place[1:]) else self.pp_rank

    @property
    def stage_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups over which, one after the other, a sum becomes that of all ranks of this stage."""
        groups = [self.fsdp.get_group(i) for i in range(self.fsdp.ndim) if self.fsdp.size(i) > 1]
        if self.tp is not None:
            groups.append(self.tp.get_group())
        return tuple(groups)


def build_parallel_mesh(
    fsdp2: Fsdp2Config, sizes: ParallelSizes | None = None, process_group: dist.ProcessGroup | None = None
) -> ParallelMesh:
    """The mesh of a job. Every rank of the job calls this, or of the process group if one is given.

    Args:
        sizes: by default nothing but data parallelism; then the mesh is that of `build_device_mesh`.
        process_group: ranks that share the data-parallel work; all ranks by default.

    Raises:
        ShardingError: sizes do not divide the number of ranks or `sharding_size`, or a group is given with more than
            data parallelism.
    """
    sizes = sizes or ParallelSizes()
    if sizes.together == 1:
        mesh = build_device_mesh(fsdp2, process_group)
        place = mesh.mesh.flatten().tolist().index(dist.get_rank())
        return ParallelMesh(sizes, mesh, mesh, None, None, None, place, mesh.size())
    if process_group is not None:
        raise ShardingError(
            f"process_group: {sizes} is parallelism over all ranks of the job; leave the group out, or leave pipeline, "
            "context and tensor parallelism to whoever made it."
        )
    world = dist.get_world_size()
    place = sizes.place(dist.get_rank(), world)
    shards = context_shard_size(fsdp2, sizes, world)
    replicas = sizes.sharing(world) // shards
    device = Accelerator.current().type
    every = list(range(world))
    outer, inner = {PP: sizes.pp, REPLICATE: replicas}, {TP: sizes.tp}
    root = _mesh(every, _present({**outer, SHARD: shards // sizes.cp, CP: sizes.cp, **inner}), device)
    # The same ranks once more, with `dp_shard` and `cp` as one dimension: torch's own way to join two, `_flatten`, is private.
    folded, shard = root, SHARD
    if sizes.cp > 1:
        folded, shard = _mesh(every, _present({**outer, SHARD_CP: shards, **inner}), device), SHARD_CP
    return ParallelMesh(
        sizes,
        root,
        fsdp=folded[REPLICATE, shard] if replicas > 1 else folded[shard],
        pp=root[PP] if sizes.pp > 1 else None,
        cp=root[CP] if sizes.cp > 1 else None,
        tp=folded[TP] if sizes.tp > 1 else None,
        dp_rank=place.dp,
        dp_size=sizes.data_parallel(world),
        pp_rank=place.pp,
    )


def context_shard_size(fsdp2: Fsdp2Config, sizes: ParallelSizes, world_size: int) -> int:
    """How many ranks a parameter is cut over, of those that share no stage and no tensor: `sharding_size`.

    Raises:
        ShardingError: it does not divide them, or would part ranks that share a sequence.
    """
    shards = shard_size(fsdp2, sizes.sharing(world_size))
    if shards % sizes.cp:
        raise ShardingError(
            f"sharding_size: {shards} is no multiple of the {sizes.cp} ranks that share a sequence; use auto or a multiple."
        )
    return shards


def _present(shape: dict[str, int]) -> dict[str, int]:
    """The dimensions that there are; the one that shards always is."""
    return {name: size for name, size in shape.items() if size > 1 or name in (SHARD, SHARD_CP)}


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
