"""From a policy and fsdp2.yaml to a checked plan.

Nothing is changed in the model, which may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mm_core.accelerator import parse_dtype
from mm_core.config.fsdp2 import PATTERN_FIELDS, Fsdp2Config
from mm_core.sharding.fitness import check_modules, unit_left_empty, units_of_a_tie
from mm_core.sharding.patterns import ModulePaths, Problems
from mm_core.sharding.plan import (
    ALIGNED,
    ParameterInfo,
    ShardingError,
    ShardingPlan,
    Unit,
    describe_parameter,
    is_inside,
)
from mm_core.sharding.policy import ShardingPolicy, policy_problem
from mm_core.sharding.resolve import COMPOSITE, Chosen, Resolver, relative_to

_SETTINGS = {
    "reshard_after_forward": "reshard_after_forward",
    "param_dtype": "param_dtype",
    "reduce_dtype": "reduce_dtype",
    "output_dtype": "output_dtype",
    "cast_forward_inputs": "cast_forward_inputs",
    "offload_to_cpu": "offload_to_cpu",
    "pin_memory": "pin_memory",
    "use_reentrant": "use_reentrant",
    "num_to_forward_prefetch": "forward_prefetch",
    "num_to_backward_prefetch": "backward_prefetch",
    "reshard_local_experts": "reshard_local_experts",
}
"""Key of fsdp2.yaml -> field of the plan. A policy names its field as fsdp2.yaml does, if it has one."""


def build_plan(
    root: nn.Module,
    policy: ShardingPolicy,
    fsdp2: Fsdp2Config,
    prefix: str = "predictor",
    *,
    neighbours: Collection[str] = COMPOSITE,
    composite: ModulePaths | None = None,
) -> ShardingPlan:
    """Resolve a policy and fsdp2.yaml on the bare module tree of one FSDP root, and check the result.

    A field that fsdp2.yaml writes replaces the policy's; an empty list there means none. Patterns in
    fsdp2.yaml begin with the prefix; those of other parts of the composite are not for this root and are
    passed over.

    Args:
        root: the component, unwrapped, on any device.
        policy: what its author registered.
        prefix: the component's path in the composite; `""` if it is the whole model.
        neighbours: names that patterns may begin with besides the prefix.
        composite: module tree of the whole model; the names of classes that only other parts have are passed
            over too.

    Raises:
        ShardingError, PatternError: a pattern matches nothing, two patterns claim a module, a unit cannot be
            one. `field` and `pattern` say which line of fsdp2.yaml is to blame, if one is.
        CombinedPlanError: several of these.
    """
    wrong = policy_problem(policy)
    if wrong is not None:
        raise ShardingError(f"policy of {prefix or 'the model'}, {wrong}.")
    problems = Problems()
    modules = dict(root.named_modules())
    find = Resolver(ModulePaths.of(modules), policy, fsdp2, prefix, neighbours, problems, composite)
    experts_over = fsdp2.expert_parallel_size or 1
    fields = [name for name in PATTERN_FIELDS if name != "moe_modules" or experts_over > 1]
    chosen = {name: find.choose(name) for name in fields}
    known, gathered = find.of_policy("units"), find.of_policy("keep_gathered")
    values, sources = _settings(policy, fsdp2)
    aligned = find.of_policy("aligned") if values.pop("align_fsdp_param_groups") else ()
    joint, tensor, context = find.of_policy("joint_vision"), find.tensor(), find.context()
    problems.raise_any()

    units = chosen["sub_modules_to_wrap"]
    if units.source == "policy" and not policy.units:
        units = Chosen("structure", tuple(blocks_by_structure(root)))
    experts = chosen["moe_modules"].paths if experts_over > 1 else ()
    own = [path for path in units.paths if path and path not in experts]
    ordered = _with_experts(_forward_order(own, known, modules), experts, list(modules))
    sources |= {
        name: choice.source if choice.paths or choice.source != "policy" else "default"
        for name, choice in chosen.items()
    }
    sources["sub_modules_to_wrap"] = units.source
    # Parameters are dealt out last, when the modules are known to be fit.
    plan = ShardingPlan(
        prefix=prefix,
        units=(),
        root=Unit("", ()),
        offload_activations=chosen["offload_activations"].paths,
        compiled=chosen["compile_modules"].paths,
        experts=experts,
        aligned=aligned,
        ignored=chosen["ignored_modules"].paths,
        fp32_inputs=policy.fp32_inputs,
        joint_vision=joint,
        tensor=tensor,
        context=context,
        pipeline=policy.pipeline,
        sources=sources,
        expert_parallel_size=experts_over,
        **values,
    )
    with problems.of():
        plan = _with_recompute(plan, policy, fsdp2, chosen["recompute_modules"], own)
    authors = {name: choice.authors for name, choice in chosen.items()}
    check_modules(plan, modules, own, authors, problems)
    _check_settings(plan, policy, fsdp2, problems)
    unsharded = [path for path in gathered if path not in ordered]
    if unsharded and units.source == "policy":
        with problems.of():
            raise ShardingError(
                f"policy of {prefix or 'the model'}, keep_gathered: {unsharded[0]} is not among its units."
            )
    problems.raise_any()
    return _with_parameters(plan, root, ordered, set(gathered), authors["sub_modules_to_wrap"])


def build_plans(
    roots: Mapping[str, nn.Module],
    policies: Mapping[str, ShardingPolicy],
    fsdp2: Fsdp2Config,
    composite: nn.Module,
) -> dict[str, ShardingPlan]:
    """The plans of all FSDP roots of a composite model, with the patterns that name its other parts checked
    too.

    Args:
        roots: path in the composite -> module.
        policies: path -> policy.

    Raises:
        ShardingError, PatternError, CombinedPlanError: as `build_plan`; also for a pattern that names a part that is
            not trained, or not there.
    """
    children = [name for name, _ in composite.named_children()]
    tree = ModulePaths.of(dict(composite.named_modules()))
    plans = {}
    problems = Problems()
    for prefix, root in roots.items():
        with problems.of():
            plans[prefix] = build_plan(
                root, policies[prefix], fsdp2, prefix, neighbours=children, composite=tree
            )
    for name in PATTERN_FIELDS if "" not in roots else ():
        for pattern in getattr(fsdp2, name) or ():
            with problems.of(name, pattern):
                if not _is_elsewhere(pattern, roots, tree):
                    continue
                if name != "ignored_modules":
                    raise ShardingError(
                        f'{name}: "{pattern}" names a part that is not trained and therefore not sharded; '
                        f"only modules of {', '.join(roots)} can stand here."
                    )
                part, _, rest = pattern.strip().partition(".")
                if rest and part in tree and not tree.children(part):
                    raise ShardingError(
                        f'{name}: "{pattern}" lies in "{part}", which is not trained and never sharded as a whole; '
                        f'write "{part}".'
                    )
                tree.match(pattern, where=name)
    problems.raise_any()
    return plans


def blocks_by_structure(root: nn.Module) -> list[str]:
    """Paths of the members of every outermost `ModuleList` that holds at least two modules of one class; a module
    that stands there twice, once.
    """
    found: list[str] = []
    first = {id(module): path for path, module in root.named_modules()}
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path and is_inside(path, block) for block in found):
            continue
        if len(module) >= 2 and len({type(child) for child in module}) == 1:
            blocks = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
            found += [
                name
                for name, child in blocks.items()
                if first[id(child)] == name and any(True for _ in child.parameters())
            ]
    return found


def _is_elsewhere(pattern: str, roots: Collection[str], tree: ModulePaths) -> bool:
    """Whether a pattern is for a part that no plan is made of; one that names nothing is found by every plan."""
    if pattern.strip().partition(".")[0] in tree.children(""):
        return all(relative_to(pattern, prefix) is None for prefix in roots)
    if not tree.has_class(pattern):
        return False
    return not any(is_inside(path, prefix) for path in tree.match(pattern) for prefix in roots)


def _settings(policy: ShardingPolicy, fsdp2: Fsdp2Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a plan's fields, and where each came from by the key of fsdp2.yaml."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, field in {**_SETTINGS, "align_fsdp_param_groups": "align_fsdp_param_groups"}.items():
        value, source = _setting(policy, fsdp2, key)
        values[field] = _dtype(value) if key.endswith("_dtype") else value
        sources[key] = source
    sources["expert_parallel_size"] = _setting(policy, fsdp2, "expert_parallel_size")[1]
    sources["sharding_size"] = _setting(policy, fsdp2, "sharding_size")[1]
    return values, sources


def _setting(policy: ShardingPolicy, fsdp2: Fsdp2Config, key: str) -> tuple[Any, str]:
    if (source := fsdp2.source(key)) is not None:
        return getattr(fsdp2, key), source
    value = getattr(policy, key, None)
    return (value, "policy") if value is not None else (getattr(fsdp2, key), "default")


def _with_recompute(
    plan: ShardingPlan, policy: ShardingPolicy, fsdp2: Fsdp2Config, chosen: Chosen, units: Sequence[str]
) -> ShardingPlan:
    """Say what is recomputed, and how.

    Args:
        chosen: the modules that `recompute_modules`, or the policy, names.
        units: in forward order.
    """
    granularity, granularity_source = _setting(policy, fsdp2, "recompute_granularity")
    number, number_source = _setting(policy, fsdp2, "recompute_num_layers")
    paths, source = list(chosen.paths), chosen.source
    if source == "policy" and not paths:
        source = "default"
        if granularity is not None:
            source = "units"
            paths = [path for path in units if not any(u != path and is_inside(path, u) for u in units)]
    if number is not None:
        paths = paths[:number]
    sources = {
        **plan.sources,
        "recompute_modules": source,
        "recompute_granularity": granularity_source,
        "recompute_num_layers": number_source,
    }
    return replace(plan, recompute=tuple(paths), recompute_granularity=granularity or "full", sources=sources)


def _check_settings(
    plan: ShardingPlan, policy: ShardingPolicy, fsdp2: Fsdp2Config, problems: Problems
) -> None:
    """Check settings against each other and against what was found."""
    name = plan.full_path("")
    with problems.of("use_reentrant"):
        if plan.recompute and plan.use_reentrant and plan.recompute_granularity == "selective":
            raise ShardingError(
                "use_reentrant: true cannot recompute selectively, since the older form of recomputation keeps nothing but "
                "the inputs; write use_reentrant: false or recompute_granularity: full."
            )
    with problems.of("recompute_num_layers"):
        if fsdp2.recompute_num_layers is not None and not plan.recompute and not fsdp2.recompute_modules:
            raise ShardingError(
                f"recompute_num_layers: {fsdp2.recompute_num_layers} has nothing to count, since no module of {name} is "
                "recomputed; name some in recompute_modules, or write recompute_granularity: full."
            )
    with problems.of("expert_parallel_size"):
        if plan.expert_parallel_size > 1 and not plan.experts and not fsdp2.moe_modules:
            raise ShardingError(
                f"expert_parallel_size: {plan.expert_parallel_size} has nothing to distribute, since neither moe_modules "
                f"nor the sharding policy names modules of {name} that hold experts; name them in moe_modules, or write 1."
            )
    with problems.of("align_fsdp_param_groups"):
        if _setting(policy, fsdp2, "align_fsdp_param_groups")[0] and not plan.aligned:
            raise ShardingError(
                f"align_fsdp_param_groups: the sharding policy of {name} names no norms or gates to put in a group; write "
                "false."
            )


def _forward_order(units: Sequence[str], known: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The policy's order if it knows all of the units, else the order in which modules were registered."""
    rank = {path: i for i, path in enumerate(known if set(units) <= set(known) else modules)}
    return sorted(units, key=rank.__getitem__)


def _with_experts(units: Sequence[str], experts: Sequence[str], registered: Sequence[str]) -> list[str]:
    """Units in forward order, with each module of experts after the units that run before it: the one around it,
    and those in the same one that were registered earlier.
    """
    rank = {path: i for i, path in enumerate(registered)}
    ordered = list(units)
    for expert in sorted(experts, key=rank.__getitem__):
        around = [path for path in ordered if is_inside(expert, path)]
        outer = max(around, key=len, default="")
        before = [u for u in ordered if u == outer or (is_inside(u, outer) and rank[u] < rank[expert])]
        ordered.insert(ordered.index(before[-1]) + 1 if before else 0, expert)
    return ordered


def _with_parameters(
    plan: ShardingPlan,
    root: nn.Module,
    units: Sequence[str],
    gathered: set[str],
    authors: Mapping[str, str],
) -> ShardingPlan:
    """Give each parameter to the aligned group, or to the innermost unit around it. Units that are one layer each and
    share a tensor (the embedding and the head) are none: the root holds them.

    Args:
        units: in forward order, the experts among them.
        gathered: those that stay gathered.
        authors: unit -> the pattern of `sub_modules_to_wrap` that names it in fsdp2.yaml.
    """
    owned: dict[str, list[ParameterInfo]] = {path: [] for path in ["", ALIGNED, *units]}
    ignored: list[str] = []
    homes: dict[int, dict[str, str]] = {}  # parameter -> the unit around it by each of its names
    parameters: dict[str, nn.Parameter] = {}
    deepest_first = sorted(units, key=lambda path: -path.count("."))
    problems = Problems()
    modules = dict(root.named_modules())  # one that stands in several places, by its first
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in modules:
            continue
        if any(is_inside(name, path) for path in plan.ignored):
            ignored.append(name)
            continue
        owner = next((path for path in deepest_first if is_inside(name, path)), "")
        if any(is_inside(name, path) for path in plan.aligned):
            owner = ALIGNED
        homes.setdefault(id(parameter), {})[name] = owner
        parameters[name] = parameter
    dissolved: set[str] = set()
    for names in homes.values():
        if len(set(names.values())) > 1:
            author = next((authors[owner] for owner in names.values() if owner in authors), None)
            with problems.of("sub_modules_to_wrap" if author else None, author):
                dissolved |= units_of_a_tie(plan, units, names)
    for names in homes.values():
        name, owner = next(iter(names.items()))
        owned["" if owner in dissolved else owner].append(describe_parameter(name, parameters[name]))
    left = [path for path in units if path not in dissolved]
    for path in left:
        if not owned[path]:
            author = authors.get(path)
            with problems.of("sub_modules_to_wrap" if author else None, author):
                lost = bool(owned[ALIGNED]) and any(is_inside(a, path) for a in plan.aligned)
                raise unit_left_empty(plan, path, lost)
    problems.raise_any()
    made = [Unit(path, tuple(owned[path]), path in gathered) for path in left]
    if owned[ALIGNED]:
        # The first unit around one of its modules begins before it.
        place = next((i + 1 for i, p in enumerate(left) if any(is_inside(a, p) for a in plan.aligned)), 0)
        made.insert(place, Unit(ALIGNED, tuple(owned[ALIGNED]), keep_gathered=True))
    return replace(
        plan, units=tuple(made), root=Unit("", tuple(owned[""])), ignored_parameters=tuple(ignored)
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else parse_dtype(name)
