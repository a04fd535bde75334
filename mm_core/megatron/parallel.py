"""Megatron's `parallel_state` from a device mesh: the same ranks in the same groups."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mm_core.megatron.installed import megatron_module
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STATE = "megatron.core.parallel_state"
#: Megatron's name of a kind of parallelism -> how it is told. Every dimension of a mesh whose name begins with `dp` is
#: data-parallel: `dp_replicate` and `dp_shard` together are Megatron's one group.
_KINDS = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline"}

_made = False


def initialize_parallel_state(mesh: DeviceMesh, *, timeout_minutes: int = 30) -> None:
    """Initialise `megatron.core.parallel_state` so that its groups have the ranks of the mesh.

    Every rank calls it, after the process group is there. If the state is there already and has these ranks, nothing
    is done. Expert parallelism and instances of Megatron's distributed optimizer stay 1: FSDP2 does the sharding.

    Args:
        mesh: over all ranks, in their order; its dimensions are named `tp`, `cp`, `pp` or begin with `dp`
            (`dp_replicate`, `dp_shard`, which stand side by side). What is absent has the size 1.
        timeout_minutes: how long a collective of these groups may wait for the other ranks.

    Raises:
        UserError: Megatron-Core is not installed, the mesh is none that it can follow, or its state is initialised
            already with other ranks.
    """
    global _made
    state = megatron_module(_STATE)
    sizes, order = _layout(mesh)
    if _initialized(state):
        different = _differences(state, mesh)
        if not different:
            return
        raise UserError(
            f"Megatron's parallel state is initialised already, with other ranks than the device mesh "
            f"{_shown(mesh)} gives rank {dist.get_rank()}: {'; '.join(different)}; initialise it in one place only, or "
            "end the other with megatron.core.parallel_state.destroy_model_parallel()"
        )
    try:
        state.initialize_model_parallel(
            tensor_model_parallel_size=sizes["tp"],
            pipeline_model_parallel_size=sizes["pp"],
            context_parallel_size=sizes["cp"],
            order=order,
            distributed_timeout_minutes=timeout_minutes,
        )
    except AssertionError as error:
        state.destroy_model_parallel()
        raise UserError(f"Megatron-Core cannot follow the device mesh {_shown(mesh)}: {error}") from error
    _made = True
    different = _differences(state, mesh)
    if different:  # another version that lays ranks out differently: going on would mix up tensors
        destroy_parallel_state()
        raise UserError(
            f"Megatron-Core made other groups than the device mesh {_shown(mesh)}: {'; '.join(different)}; "
            "use the version that `mm doctor` names"
        )


def destroy_parallel_state() -> None:
    """Make Megatron forget the groups that `initialize_parallel_state` made; a state that others made stays.

    The groups themselves end with the process group (`torch.distributed.destroy_process_group`).
    """
    global _made
    state = sys.modules.get(_STATE)
    if _made and state is not None:
        state.destroy_model_parallel()
    _made = False


def _layout(mesh: DeviceMesh) -> tuple[dict[str, int], str]:
    """Sizes by Megatron's names, and its `order`: the dimensions from the one that changes fastest."""
    names = mesh.mesh_dim_names or ()
    if not names:
        raise UserError(
            f"The dimensions of the device mesh {_shown(mesh)} have no names; name them tp, cp, dp…, or pp"
        )
    sizes = dict.fromkeys(_KINDS, 1)
    kinds: list[str] = []
    for name, size in zip(names, mesh.mesh.shape, strict=True):
        kind = _kind(name)
        if kind is None:
            raise UserError(
                f'The dimension "{name}" of the device mesh {_shown(mesh)} is none that Megatron-Core has; '
                "use tp, cp, pp or names that begin with dp"
            )
        if kind in kinds and kinds[-1] != kind:
            raise UserError(
                f"The data-parallel dimensions of the device mesh {_shown(mesh)} do not stand side by side, so they "
                "are no single group of Megatron's; move them together"
            )
        if kind not in kinds:
            kinds.append(kind)
        sizes[kind] *= size
    if mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
        raise UserError(
            f"The device mesh {_shown(mesh)} is not over all {dist.get_world_size()} ranks in their order, and "
            "Megatron's parallel state always is; make it with torch's init_device_mesh"
        )
    order = kinds[::-1]
    if "dp" not in order:
        # Megatron wants it: the data-parallel ranks of experts are those of data and context together.
        place = order.index("cp") + 1 if "cp" in order else order.index("pp") if "pp" in order else len(order)
        order.insert(place, "dp")
    return sizes, "-".join(order)


def _kind(name: str) -> str | None:
    if name.startswith("dp"):
        return "dp"
    return name if name in _KINDS else None


def _groups(mesh: DeviceMesh) -> Mapping[str, list[int]]:
    """Ranks of this rank's group in each kind of parallelism."""
    grid = mesh.mesh
    here = [int(index[0]) for index in (grid == dist.get_rank()).nonzero(as_tuple=True)]
    names = mesh.mesh_dim_names or ()
    return {
        kind: grid[
            tuple(slice(None) if _kind(n) == kind else i for n, i in zip(names, here, strict=True))
        ].flatten().tolist()
        for kind in _KINDS
    }  # fmt: skip


def _initialized(state: Any) -> bool:
    """Whether there is a state that is alive: groups of a process group that has ended since count for nothing."""
    global _made
    if not state.model_parallel_is_initialized():
        return False
    try:
        dist.get_process_group_ranks(state.get_data_parallel_group())
    except (KeyError, ValueError):  # torch knows the group no more
        state.destroy_model_parallel()
        _made = False
        return False
    return True


def _differences(state: Any, mesh: DeviceMesh) -> list[str]:
    """What of this rank's groups differs between Megatron and the mesh."""
    theirs = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
    }
    found = []
    for kind, ours in _groups(mesh).items():
        ranks = dist.get_process_group_ranks(theirs[kind])
        if ranks != ours:
            found.append(f"{_KINDS[kind]} parallel ranks {ranks}, not {ours}")
    return found


def _shown(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or ("?",) * mesh.ndim
    return f"({', '.join(f'{name} {size}' for name, size in zip(names, mesh.mesh.shape, strict=True))})"
