"""Whether the modules that a plan names can be what it makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from mm_core.sharding.expert_form import check_form
from mm_core.sharding.patterns import Problems
from mm_core.sharding.plan import ALIGNED, ShardingError, ShardingPlan, is_inside


def check_modules(
    plan: ShardingPlan,
    modules: Mapping[str, nn.Module],
    units: Sequence[str],
    authors: Mapping[str, Mapping[str, str]],
    problems: Problems,
) -> None:
    """Check each module that a plan names, by itself and against the others.

    Args:
        modules: of the bare root, by path.
        units: paths of the units, without `ALIGNED` and the experts.
        authors: field of fsdp2.yaml -> module path -> the pattern that names it there.
    """
    fields: dict[str, Sequence[str]] = {
        "ignored_modules": plan.ignored,
        "sub_modules_to_wrap": units,
        "recompute_modules": plan.recompute,
        "offload_activations": plan.offload_activations,
        "compile_modules": plan.compiled,
        "moe_modules": plan.experts,
        "align_fsdp_param_groups": plan.aligned,
    }
    said = set()
    for name, paths in fields.items():
        for path in paths:
            author = authors.get(name, {}).get(path)
            in_file = author is not None or (name not in authors and plan.sources.get(name) == "fsdp2.yaml")
            with problems.of(name if in_file else None, author) as problem:
                if name == "ignored_modules":
                    _check_ignored(plan, modules[path], path)
                    continue
                _check_called(plan, modules[path], name, path)
                if name == "sub_modules_to_wrap":
                    _check_unit(plan, modules[path], path)
                elif name == "recompute_modules":
                    _check_recompute(plan, path)
                elif name == "offload_activations":
                    _check_offload(plan, path)
                elif name == "compile_modules":
                    _check_compiled(plan, path, units)
                elif name == "moe_modules":
                    _check_experts(plan, modules[path], path)
                else:
                    _check_aligned(plan, modules[path], path, units)
            if problem.found:  # what is wrong with each of 40 blocks is said of the first
                same = (name, author, re.sub(r"\d+", "#", str(problems.errors[-1])))
                if same in said:
                    problems.errors.pop()
                said.add(same)


def _check_ignored(plan: ShardingPlan, module: nn.Module, path: str) -> None:
    trained = next((n for n, p in module.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise ShardingError(
            f'ignored_modules: "{plan.full_path(path)}" has trained parameters ({trained}), whose gradients would '
            "differ between ranks; freeze it, or take it out of the list."
        )


def _check_called(plan: ShardingPlan, module: nn.Module, name: str, path: str) -> None:
    """Check that it is a part of the model whose `forward` is called, and that it is sharded at all."""
    shown = plan.full_path(path)
    if not path:
        raise ShardingError(f'{name}: "{shown}" is the whole model; name modules inside it.')
    if type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ShardingError(
            f'{name}: "{shown}" is a {type(module).__name__}, which is never called itself; '
            f'write "{shown}.{{*}}".'
        )
    outside = _around(path, plan.ignored)
    if outside is not None:
        raise ShardingError(
            f'{name}: "{shown}" lies in "{plan.full_path(outside)}", which ignored_modules leaves out.'
        )
    experts = _around(path, plan.experts)
    if experts is not None and experts != path:
        raise ShardingError(
            f'{name}: "{shown}" lies in "{plan.full_path(experts)}", whose experts are distributed over ranks as a '
            "whole; take it out of the list."
        )


def _check_unit(plan: ShardingPlan, module: nn.Module, path: str) -> None:
    if not any(True for _ in module.parameters()):
        raise ShardingError(f'sub_modules_to_wrap: "{plan.full_path(path)}" has no parameters to shard.')


def _check_recompute(plan: ShardingPlan, path: str) -> None:
    outer = _around(path, (other for other in plan.recompute if other != path))
    if outer is not None:
        raise ShardingError(
            f'recompute_modules: "{plan.full_path(path)}" lies in "{plan.full_path(outer)}", which is recomputed as a '
            "whole; keep one of them."
        )


def _check_compiled(plan: ShardingPlan, path: str, units: Sequence[str]) -> None:
    """Whatever is wrapped is wrapped around compiled code, never inside it."""
    shown = plan.full_path(path)
    inner = {
        "sub_modules_to_wrap": units,
        "align_fsdp_param_groups": plan.aligned,
        "compile_modules": plan.compiled,
        "recompute_modules": plan.recompute,
        "offload_activations": plan.offload_activations,
    }
    for name, paths in inner.items():
        found = next((other for other in paths if other != path and is_inside(other, path)), None)
        if found is not None:
            raise ShardingError(
                f'compile_modules: "{shown}" holds "{plan.full_path(found)}" of {name}, which cannot happen inside compiled '
                "code; name the one or the other."
            )


def _check_offload(plan: ShardingPlan, path: str) -> None:
    """A recomputed module may lie in an offloaded one, whose saved activations are then its inputs."""
    shown = plan.full_path(path)
    outer = _around(path, (other for other in plan.offload_activations if other != path))
    if outer is not None:
        raise ShardingError(
            f'offload_activations: "{shown}" lies in "{plan.full_path(outer)}", whose activations are offloaded as a '
            "whole; keep one of them."
        )


def _check_experts(plan: ShardingPlan, module: nn.Module, path: str) -> None:
    shown, size = plan.full_path(path), plan.expert_parallel_size
    counts = {name: (tuple(p.shape) or (1,))[0] for name, p in module.named_parameters()}
    if not counts:
        raise ShardingError(f'moe_modules: "{shown}" has no parameters, so it holds no experts.')
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:4])
        raise ShardingError(
            f'moe_modules: the parameters of "{shown}" do not agree on a number of experts in dimension 0 ({listed}); '
            "name the module that holds the experts alone."
        )
    check_form(module, shown)
    number = next(iter(counts.values()))
    if number % size:
        allowed = _divisors(number)
        raise ShardingError(
            f'moe_modules: "{shown}" holds {number} experts, which expert_parallel_size {size} does not divide; use one '
            f"of {allowed}."
        )


def _check_aligned(plan: ShardingPlan, module: nn.Module, path: str, units: Sequence[str]) -> None:
    shown = plan.full_path(path)
    place = "align_fsdp_param_groups"
    if not any(True for _ in module.parameters()):
        raise ShardingError(f'{place}: "{shown}" has no parameters to shard.')
    inner = next((u for u in (*units, *plan.experts) if is_inside(u, path)), None)
    if inner is not None:
        what = "is a unit itself" if inner == path else f'has the unit "{plan.full_path(inner)}" inside'
        raise ShardingError(
            f'{place}: "{shown}" {what}, and only modules that are part of a unit can join the aligned group; take it '
            "out of sub_modules_to_wrap, or write align_fsdp_param_groups: false."
        )
    outer = _around(path, (other for other in plan.aligned if other != path))
    if outer is not None:
        raise ShardingError(
            f'{place}: "{shown}" lies in "{plan.full_path(outer)}", which is aligned as a whole; keep one of them in '
            "the policy."
        )


def _around(path: str, others: Iterable[str]) -> str | None:
    return next((other for other in others if is_inside(path, other)), None)


def units_of_a_tie(plan: ShardingPlan, units: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """The units that the root takes over because they share one tensor, which no two units can gather.

    Args:
        units: all of them.
        names: the tensor's names -> the unit around each; not all the same.

    Raises:
        ShardingError: one of them holds the tensor deeper inside, or lies in another unit, so that the root cannot.
    """
    taken = {owner for owner in names.values() if owner}
    for name, owner in names.items():
        layer = name.rpartition(".")[0]
        if owner and (layer != owner or any(other != owner and is_inside(owner, other) for other in units)):
            other_name, other = next((n, o) for n, o in names.items() if o != owner)
            raise ShardingError(
                f"{plan.full_path(name)} is the same tensor as {plan.full_path(other_name)}, but the units "
                f'"{plan.full_path(owner)}" and "{plan.full_path(other)}" would gather it apart; '
                "let one unit hold both."
            )
    return taken


def unit_left_empty(plan: ShardingPlan, path: str, aligned: bool) -> ShardingError:
    """The error of a unit whose parameters all went to others."""
    if aligned:
        return ShardingError(
            f'sub_modules_to_wrap: all parameters of "{plan.full_path(path)}" went to the group of '
            f'align_fsdp_param_groups, "{plan.full_path(ALIGNED)}", which leaves the unit empty; take the unit out, or '
            "write align_fsdp_param_groups: false."
        )
    return ShardingError(
        f'sub_modules_to_wrap: all parameters of "{plan.full_path(path)}" belong to units inside it; take one level out.'
    )


def check_plan(
    plan: ShardingPlan, root: nn.Module, *, ranks: int | None = None, shards: int | None = None
) -> None:
    """Check a finished plan against its model, without training: each parameter in exactly one unit, each unit in
    its place, and numbers that divide the ranks.

    Args:
        root: the bare component, on any device.
        ranks: data-parallel ranks, if their number is known.
        shards: of these, how many share one copy of the parameters; all by default.

    Raises:
        ShardingError, CombinedPlanError: what is wrong.
    """
    problems = Problems()
    modules = dict(root.named_modules())
    own = [unit.path for unit in plan.units if unit.path != ALIGNED and unit.path not in plan.experts]
    missing = [path for path in (*own, *plan.experts, *plan.aligned) if path not in modules]
    with problems.of():
        if missing:
            raise ShardingError(
                f'"{plan.full_path(missing[0])}" is a unit of the plan, and no module of the model.'
            )
    problems.raise_any()
    check_modules(plan, modules, own, {}, problems)
    _check_owners(plan, root, problems)
    order = [unit.path for unit in plan.units]
    for i, path in enumerate(order):
        with problems.of("sub_modules_to_wrap"):
            early = next((inner for inner in order[:i] if is_inside(inner, path)), None)
            if early is not None:
                raise ShardingError(
                    f'"{plan.full_path(early)}" comes before "{plan.full_path(path)}", in which it lies and which runs first.'
                )
    if ranks is not None:
        _check_ranks(plan, ranks, shards or ranks, problems)
    problems.raise_any()


def _check_owners(plan: ShardingPlan, root: nn.Module, problems: Problems) -> None:
    owners: dict[str, list[str]] = {name: [] for name, _ in root.named_parameters()}
    for name in plan.ignored_parameters:
        owners.setdefault(name, []).append("ignored_modules")
    for unit in (*plan.units, plan.root):
        for info in unit.parameters:
            owners.setdefault(info.name, []).append(f'"{plan.full_path(unit.path)}"')
            with problems.of():
                if unit.path != ALIGNED and not is_inside(info.name, unit.path):
                    raise ShardingError(
                        f'{plan.full_path(info.name)} is in the unit "{plan.full_path(unit.path)}", but not in that module.'
                    )
    for name, found in owners.items():
        with problems.of():
            if not found:
                raise ShardingError(
                    f"{plan.full_path(name)} is in no unit and not under ignored_modules; every rank would train its own copy."
                )
            if len(found) > 1:
                raise ShardingError(f"{plan.full_path(name)} is in several units: {', '.join(found)}.")


def _check_ranks(plan: ShardingPlan, ranks: int, shards: int, problems: Problems) -> None:
    reshard, experts = plan.reshard_after_forward, plan.expert_parallel_size
    by_policy = plan.sources.get("reshard_after_forward") == "policy"
    with problems.of(None if by_policy else "reshard_after_forward"):
        if not isinstance(reshard, bool) and shards % reshard:
            place = f"policy of {plan.full_path('') or 'the model'}, " if by_policy else ""
            raise ShardingError(place + reshard_problem(reshard, shards))
    with problems.of("expert_parallel_size"):
        if ranks % experts:
            raise ShardingError(
                f"expert_parallel_size: {experts} does not divide the {ranks} data-parallel ranks; use one of "
                f"{_divisors(ranks)}."
            )
        if shards % experts and experts % shards:
            fitting = ", ".join(
                str(n) for n in range(1, ranks + 1) if not ranks % n and not (shards % n and n % shards)
            )
            raise ShardingError(
                f"expert_parallel_size: groups of {experts} ranks do not fit into the {shards} ranks of sharding_size, nor "
                f"these into them; use one of {fitting}."
            )


def reshard_problem(reshard: int, shards: int) -> str:
    """The error of a number in `reshard_after_forward` that does not divide the ranks of `sharding_size`."""
    numbers = [str(n) for n in range(2, shards + 1) if shards % n == 0]
    allowed = (
        f"true, false or {'one of ' if len(numbers) > 1 else ''}{', '.join(numbers)}"
        if numbers
        else "true or false"
    )
    ranks = f"the {shards} ranks that share" if shards > 1 else "the one rank that holds"
    return f"reshard_after_forward: {reshard} does not divide {ranks} the parameters; use {allowed}."


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
