"""Which plan a sharded module shows, however it came about, and where that differs from what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from mm_core.accelerator import dtype_name
from mm_core.sharding.mesh import EP, TP
from mm_core.sharding.plan import (
    ALIGNED,
    ParameterInfo,
    ShardingError,
    ShardingPlan,
    Unit,
    bare_name,
    describe_parameter,
    is_inside,
)
from mm_core.sharding.prefetch import prefetch_lists


def observe_plan(root: nn.Module, plan: ShardingPlan) -> ShardingPlan:
    """The plan that a sharded module shows; checked as a plan is.

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
    groups = list(_groups(root))
    owned = _owned(root, plan, groups)
    intended = {unit.path: unit for unit in plan.units}
    order = {path: i for i, path in enumerate(intended)}
    units = [group for group in groups if group.path]
    if {group.path for group in units} <= set(order):
        units.sort(key=lambda group: order[group.path])
    seen = {group.path: group.settings for group in groups}
    known = all(settings is not None for settings in seen.values())
    reshard = [s.reshard for g in units if g.path not in (ALIGNED, *plan.experts) and (s := g.settings)]
    general = next((value for value in reshard if value is not False), False) if reshard else None
    made = []
    for group in units:
        kept = group.path in intended and intended[group.path].keep_gathered
        if group.settings is not None and group.path not in plan.experts:
            # Where no unit is freed, none of them is kept in particular.
            kept = group.settings.reshard is False and (general is not False or group.path == ALIGNED or kept)
        made.append(Unit(group.path, tuple(owned[group.path]), kept))
    found = replace(
        plan,
        units=tuple(made),
        root=Unit("", tuple(owned[""])),
        experts=tuple(
            path for path in plan.experts if _is_dealt_out(root.get_submodule(path), intended.get(path))
        ),
        aligned=next((group.modules for group in units if group.path == ALIGNED), ()),
        cut=_cut(root),
        **_recompute(root, plan),
    )
    return _with_settings(found, plan, {p: s for p, s in seen.items() if s}, general) if known else found


def shard_sizes(root: nn.Module, plan: ShardingPlan) -> set[int]:
    """Over how many ranks FSDP2 cuts the parameters, experts aside."""
    return {
        _shards(parameter.device_mesh)
        for name, parameter in root.named_parameters()
        if isinstance(parameter, DTensor)
        and not any(is_inside(bare_name(name), path) for path in plan.experts)
    }


def _shards(mesh: DeviceMesh) -> int:
    """Tensor parallelism's dimension comes last, behind that of FSDP2."""
    own = mesh.ndim - (TP in (mesh.mesh_dim_names or ()))
    return mesh.size(own - 1) if own else 1


def differences(asked: ShardingPlan, seen: ShardingPlan) -> dict[str, str]:
    """Keys of fsdp2.yaml that a module did not follow, with what was asked for and what is there.

    Args:
        asked: the plan of the policy and fsdp2.yaml.
        seen: what `observe_plan` returned for it.
    """
    found: dict[str, str] = {}

    def compare(key: str, wanted: Any, has: Any) -> None:
        if wanted != has:
            found[key] = f"{_shown(wanted)} was asked for, {_shown(has)} is there"

    def paths(plan: ShardingPlan) -> list[str]:
        return sorted(u.path for u in plan.units if u.path != ALIGNED and u.path not in plan.experts)

    compare("sub_modules_to_wrap", paths(asked), paths(seen))
    compare("recompute_modules", sorted(asked.recompute), sorted(seen.recompute))
    compare("ignored_modules", sorted(asked.ignored_parameters), sorted(seen.ignored_parameters))
    compare("align_fsdp_param_groups", sorted(asked.aligned), sorted(seen.aligned))
    compare("moe_modules", sorted(asked.experts), sorted(seen.experts))
    if asked.recompute and seen.recompute:
        compare("use_reentrant", asked.use_reentrant, seen.use_reentrant)
    if asked.units and seen.units:
        compare("reshard_after_forward", asked.reshard_after_forward, seen.reshard_after_forward)
    for name in ("param_dtype", "reduce_dtype", "output_dtype"):
        compare(name, _dtype(getattr(asked, name)), _dtype(getattr(seen, name)))
    compare("offload_to_cpu", asked.offload_to_cpu, seen.offload_to_cpu)
    if asked.param_dtype is not None and not asked.cast_forward_inputs:
        compare("cast_forward_inputs", False, seen.cast_forward_inputs)
    # As deep as the units that are there allow.
    possible = prefetch_lists(
        replace(seen, forward_prefetch=asked.forward_prefetch, backward_prefetch=asked.backward_prefetch)
    )
    for key, wanted, has in (
        ("num_to_forward_prefetch", max(map(len, possible[0].values())), seen.forward_prefetch),
        ("num_to_backward_prefetch", max(map(len, possible[1].values())), seen.backward_prefetch),
    ):
        if wanted != min(has, wanted) or (not wanted and has):
            compare(key, wanted, has)
    return found


@dataclass(frozen=True)
class _Settings:
    reshard: bool | int
    param_dtype: Any
    reduce_dtype: Any
    output_dtype: Any
    casts_inputs: bool
    offload_to_cpu: bool
    pin_memory: bool
    forward_prefetch: int
    backward_prefetch: int


@dataclass(frozen=True)
class _Group:
    """Modules that one call of `fully_shard` made one unit of."""

    path: str
    modules: tuple[str, ...]
    settings: _Settings | None


def _groups(root: nn.Module) -> Iterator[_Group]:
    by_state: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule):
            state = _state(module)
            key = id(module) if state is None else id(state)
            by_state.setdefault(key, (module, []))[1].append(bare_name(name))
    several = 0
    for module, names in by_state.values():
        paths = tuple(dict.fromkeys(names))
        several += len(paths) > 1
        path = ALIGNED if len(paths) > 1 and several == 1 else paths[0]
        yield _Group(path, paths, _settings(module))


def _state(module: FSDPModule) -> Any:
    """FSDP2's state of a module. It has setters only, no public way to read them; nothing here is changed.

    None where a release of torch has it elsewhere: settings are then taken to be what was asked for.
    """
    try:
        return module._get_fsdp_state()
    except AttributeError:
        return None


def _settings(module: FSDPModule) -> _Settings | None:
    state = _state(module)
    try:
        groups = getattr(state, "_fsdp_param_groups", None)
        group = next(iter(groups), None) if groups is not None else state._fsdp_param_group
        policy = state._mp_policy
        offload = getattr(group, "offload_policy", None)
        return _Settings(
            reshard=True if group is None else _reshard(group),
            param_dtype=policy.param_dtype,
            reduce_dtype=policy.reduce_dtype,
            output_dtype=policy.output_dtype,
            casts_inputs=policy.cast_forward_inputs,
            offload_to_cpu=isinstance(offload, CPUOffloadPolicy),
            pin_memory=isinstance(offload, CPUOffloadPolicy) and offload.pin_memory,
            forward_prefetch=len(state._states_to_forward_prefetch),
            backward_prefetch=len(state._states_to_backward_prefetch),
        )
    except AttributeError:
        return None


def _reshard(group: Any) -> bool | int:
    after = group.post_forward_mesh_info
    if after is None:
        return False
    return True if after is group.mesh_info else int(after.shard_mesh_size)


def _owned(root: nn.Module, plan: ShardingPlan, groups: list[_Group]) -> dict[str, list[ParameterInfo]]:
    owner_of = {path: group.path for group in groups for path in group.modules}
    deepest_first = sorted(owner_of, key=lambda path: -path.count(".") if path else 1)
    asked = {p.name: unit.path for unit in (*plan.units, plan.root) for p in unit.parameters}
    shared = {name for names in _tied(root) for name in names}
    owned: dict[str, list[ParameterInfo]] = {group.path: [] for group in groups}
    for name, parameter in root.named_parameters():
        bare = bare_name(name)
        if isinstance(parameter, DTensor):
            owner = owner_of[next(path for path in deepest_first if is_inside(bare, path))]
            # A tied parameter lies inside several units; which one took it, the module tree does not tell.
            if bare in shared and asked.get(bare) in owned:
                owner = asked[bare]
            owned[owner].append(describe_parameter(bare, parameter))
        elif bare not in plan.ignored_parameters:
            raise ShardingError(
                f"{plan.full_path(bare)} is in no FSDP unit and not under ignored_modules; "
                "every rank would train its own copy."
            )
    return owned


def _tied(root: nn.Module) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(bare_name(name))
    return [names for names in places.values() if len(names) > 1]


def _recompute(root: nn.Module, plan: ShardingPlan) -> dict[str, Any]:
    wrappers = {
        bare_name(name): module
        for name, module in root.named_modules()
        if isinstance(module, CheckpointWrapper)
    }
    paths = tuple(wrappers)
    reentrant = any(module.checkpoint_impl is CheckpointImpl.REENTRANT for module in wrappers.values())
    return {
        "recompute": paths if set(paths) != set(plan.recompute) else plan.recompute,
        "use_reentrant": reentrant if wrappers else plan.use_reentrant,
    }


def _with_settings(
    found: ShardingPlan, asked: ShardingPlan, seen: dict[str, _Settings], reshard: bool | int | None
) -> ShardingPlan:
    root, units = seen[""], [settings for path, settings in seen.items() if path]
    # A number that is that of all ranks means the same as true.
    asks_number = not isinstance(asked.reshard_after_forward, bool)
    if reshard is None or (reshard is True and asks_number):
        reshard = asked.reshard_after_forward
    return replace(
        found,
        ignored_parameters=tuple(name for name in asked.ignored_parameters if name not in _names(found)),
        reshard_after_forward=reshard,
        param_dtype=root.param_dtype,
        reduce_dtype=root.reduce_dtype,
        output_dtype=root.output_dtype,
        # The engine casts in a hook of its own, FSDP2 in each unit.
        cast_forward_inputs=root.casts_inputs or asked.cast_forward_inputs,
        offload_to_cpu=root.offload_to_cpu,
        pin_memory=root.pin_memory or (asked.pin_memory and root.offload_to_cpu == asked.offload_to_cpu),
        forward_prefetch=max([root.forward_prefetch, *(s.forward_prefetch for s in units)]),
        backward_prefetch=max([root.backward_prefetch, *(s.backward_prefetch for s in units)]),
    )


def _names(plan: ShardingPlan) -> set[str]:
    return {p.name for unit in (*plan.units, plan.root) for p in unit.parameters}


def _is_dealt_out(module: nn.Module, asked: Unit | None) -> bool:
    """Whether ranks hold different experts: their parameters lie on a mesh of their own, or show fewer experts."""
    wanted = {p.name.rpartition(".")[2]: p.shape for p in asked.parameters} if asked is not None else {}
    for name, parameter in module.named_parameters():
        whole = wanted.get(bare_name(name).rpartition(".")[2], tuple(parameter.shape))
        own_mesh = isinstance(parameter, DTensor) and EP in (parameter.device_mesh.mesh_dim_names or ())
        if not own_mesh and tuple(parameter.shape)[:1] == whole[:1]:
            return False
    return True


def _cut(root: nn.Module) -> dict[str, int]:
    """Name of each parameter of which the ranks of tensor parallelism hold parts -> their number."""
    found = {}
    for name, parameter in root.named_parameters():
        names = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
        if TP in names and not parameter.placements[names.index(TP)].is_replicate():
            found[bare_name(name)] = parameter.device_mesh.size(names.index(TP))
    return found


def _dtype(dtype: Any) -> str | None:
    return None if dtype is None else dtype_name(dtype)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(value[:4])}{f', … {len(value) - 4} more' if len(value) > 4 else ''}]"
    return str(value)
