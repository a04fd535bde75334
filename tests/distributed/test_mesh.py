"""Meshes: HSDP, experts, groups that are part of the world, and what does not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding import build_device_mesh
from mm_core.sharding.mesh import build_expert_mesh, build_parallel_mesh
from mm_core.sharding.plan import ShardingError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)


def test_sharding_size_gives_rows_that_shard_and_columns_that_replicate():
    def run() -> list[Any]:
        meshes = [build_device_mesh(Fsdp2Config(sharding_size=size)) for size in (2, 1, 4, "auto", None)]
        return [(mesh.mesh_dim_names, mesh.mesh.tolist()) for mesh in meshes]

    flat = (("dp_shard",), [0, 1, 2, 3])
    assert run_ranks(run, 4)[0] == [
        (("dp_replicate", "dp_shard"), [[0, 1], [2, 3]]),
        (("dp_replicate", "dp_shard"), [[0], [1], [2], [3]]),
        flat, flat, flat,
    ]  # fmt: skip


def test_experts_are_shared_by_neighbours_and_sharded_as_far_as_sharding_size_goes():
    def run() -> list[Any]:
        found = []
        for sharding_size, size in ((4, 2), (4, 4), (2, 2), (1, 2), (2, 4)):
            mesh = build_expert_mesh(build_device_mesh(Fsdp2Config(sharding_size=sharding_size)), size)
            found.append((mesh.mesh_dim_names, mesh.mesh.tolist()))
        return found

    two, three = ("ep_shard", "ep"), ("ep_replicate", "ep_shard", "ep")
    assert run_ranks(run, 4)[0] == [
        (two, [[0, 1], [2, 3]]),
        (two, [[0, 1, 2, 3]]),
        (three, [[[0, 1]], [[2, 3]]]),
        (three, [[[0, 1]], [[2, 3]]]),
        (two, [[0, 1, 2, 3]]),
    ]


def message_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except ShardingError as error:
        return str(error)
    return "nothing raised"


def test_sizes_that_do_not_divide_are_named_with_those_that_do():
    def run() -> list[str]:
        return [
            message_of(build_device_mesh, Fsdp2Config(sharding_size=4)),
            message_of(build_device_mesh, Fsdp2Config(sharding_size=3, reshard_after_forward=2)),
            message_of(build_expert_mesh, build_device_mesh(Fsdp2Config()), 4),
            message_of(build_expert_mesh, build_device_mesh(Fsdp2Config(sharding_size=2)), 3),
        ]

    assert run_ranks(run, 6)[0] == [
        "sharding_size: 4 does not divide the 6 data-parallel ranks; use auto or one of 1, 2, 3, 6.",
        "reshard_after_forward: 2 does not divide the 3 ranks that share the parameters; "
        "use true, false or 3.",
        "expert_parallel_size: 4 does not divide the 6 data-parallel ranks; use one of 1, 2, 3, 6.",
        "expert_parallel_size: groups of 3 ranks do not fit into the 2 ranks of sharding_size, nor these into them; "
        "use one of 1, 2, 6.",
    ]


def test_a_mesh_over_part_of_the_ranks():
    def run() -> tuple[Any, ...]:
        groups = [dist.new_group([0]), dist.new_group([1])]
        mesh = build_device_mesh(Fsdp2Config(), groups[dist.get_rank()])
        return mesh.mesh_dim_names, mesh.mesh.tolist()

    assert run_ranks(run, 2) == [(("dp_shard",), [0]), (("dp_shard",), [1])]


@pytest.mark.parametrize("experts", [False, True])
def test_meshes_inside_a_group_leave_the_other_ranks_alone(experts):
    """MindSpeed-MM takes the whole world for its experts, whatever group it was given."""

    def run() -> Any:
        group = dist.new_group([1, 2, 3, 4])
        if dist.get_rank() == 0:
            return None
        mesh = build_device_mesh(Fsdp2Config(sharding_size="auto" if experts else 2), group)
        if experts:
            mesh = build_expert_mesh(mesh, 2)
        sums = []
        for name in mesh.mesh_dim_names:
            value = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(value, group=mesh.get_group(name))
            sums.append(value.item())
        return mesh.mesh.tolist(), sums

    grid = [[1, 2], [3, 4]]
    assert run_ranks(run, 5) == [None, (grid, [4, 3]), (grid, [6, 3]), (grid, [4, 7]), (grid, [6, 7])]


def test_ranks_that_share_a_model_stand_in_megatrons_order():
    def run() -> Any:
        mesh = build_parallel_mesh(Fsdp2Config(), ParallelSizes(pp=2, cp=2, tp=2))
        parts = (mesh.root, mesh.fsdp, mesh.pp, mesh.cp, mesh.tp)
        own = [(part.mesh_dim_names, part.mesh.tolist()) for part in parts]
        total = torch.ones(())
        for group in mesh.stage_groups:
            dist.all_reduce(total, group=group)
        return (
            own,
            (
                mesh.dp_rank,
                mesh.dp_size,
                mesh.pp_rank,
                mesh.is_first_stage,
                mesh.is_last_stage,
                mesh.told_stage,
            ),
            total.item(),
        )

    found = run_ranks(run, 8)
    grid = torch.arange(8).view(2, 1, 2, 2).tolist()
    assert found[0] == (
        [
            (("pp", "dp_shard", "cp", "tp"), grid),
            (("dp_shard_cp",), [0, 2]),
            (("pp",), [0, 4]),
            (("cp",), [0, 2]),
            (("tp",), [0, 1]),
        ],
        (0, 1, 0, True, False, 0),
        4.0,
    )
    own, place, total = found[7]
    assert [ranks for _, ranks in own[1:]] == [[5, 7], [3, 7], [5, 7], [6, 7]]
    assert (place, total) == ((0, 1, 1, False, True, None), 4.0)


def test_ranks_that_share_a_sequence_shard_parameters_and_see_the_same_samples():
    def run() -> Any:
        mesh = build_parallel_mesh(Fsdp2Config(sharding_size=4), ParallelSizes(cp=2))
        assert mesh.cp is not None
        return (
            mesh.root.mesh_dim_names,
            mesh.fsdp.mesh_dim_names,
            mesh.fsdp.mesh.tolist(),
            mesh.dp_rank,
            mesh.dp_size,
        )

    found = run_ranks(run, 8)
    names = (
        ("dp_replicate", "dp_shard", "cp"),
        ("dp_replicate", "dp_shard_cp"),
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    )
    assert found == [(*names, rank // 2, 4) for rank in range(8)]


def test_a_mesh_of_data_parallel_ranks_alone_is_the_one_that_it_was():
    def run() -> Any:
        mesh = build_parallel_mesh(Fsdp2Config(sharding_size=1))
        parts = (mesh.pp, mesh.cp, mesh.tp, mesh.pp_group)
        return (
            mesh.root is mesh.fsdp,
            mesh.fsdp.mesh_dim_names,
            parts,
            mesh.dp_rank,
            mesh.dp_size,
            mesh.is_last_stage,
        )

    names = ("dp_replicate", "dp_shard")
    assert run_ranks(run, 2) == [(True, names, (None,) * 4, rank, 2, True) for rank in range(2)]


def test_meshes_that_would_part_a_sequence_are_refused():
    def run() -> list[str]:
        sizes = ParallelSizes(cp=2)
        return [
            message_of(build_parallel_mesh, Fsdp2Config(sharding_size=1), sizes),
            message_of(build_parallel_mesh, Fsdp2Config(), sizes, dist.group.WORLD),
        ]

    assert run_ranks(run, 2)[0] == [
        "sharding_size: 1 is no multiple of the 2 ranks that share a sequence; use auto or a multiple.",
        "process_group: context 2 (ulysses) is parallelism over all ranks of the job; leave the group out, or leave "
        "pipeline, context and tensor parallelism to whoever made it.",
    ]
