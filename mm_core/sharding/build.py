"""From a policy and fsdp2.yaml to a checked plan.

Nothing is changed in the model, which may be on the meta device.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from mm_core.accelerator import parse_dtype
from mm_core.sharding.patterns import ModulePaths, apply_aliases, blaming, split_pattern
from mm_core.sharding.plan import (
    ParameterInfo,
    ShardingError,
    ShardingPlan,
    Unit,
    describe_parameter,
    is_inside,
)
from mm_core.sharding.policy import ShardingPolicy

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

_COMPOSITE = ("predictor", "low_noise_predictor", "ae", "text_encoder", "diffusion", "i2v_processor")
_PATTERN_FIELDS = ("sub_modules_to_wrap", "recompute_modules", "ignored_modules")


def build_plan(
    root: nn.Module,
    policy: ShardingPolicy,
    fsdp2: Fsdp2Config,
    prefix: str = "predictor",
    *,
    neighbours: Collection[str] = _COMPOSITE,
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

    Raises:
        ShardingError, PatternError: a pattern matches nothing, two patterns claim a module, a unit cannot be
            one. `field` and `pattern` say which line of fsdp2.yaml is to blame, if one is.
    """
    paths = ModulePaths(name for name, _ in root.named_modules())
    modules = dict(root.named_modules())
    written = {name: _written(fsdp2, name, prefix, neighbours) for name in _PATTERN_FIELDS}
    from_policy = {
        "sub_modules_to_wrap": policy.units,
        "recompute_modules": policy.recompute,
        "ignored_modules": policy.ignored,
    }
    sources: dict[str, str] = {}
    resolved: dict[str, list[str]] = {}
    authors: dict[str, dict[str, str]] = {name: {} for name in _PATTERN_FIELDS}
    for name in _PATTERN_FIELDS:
        patterns = written[name]
        if patterns is not None:
            sources[name] = "fsdp2.yaml"
            authors[name] = _resolve_written(paths, patterns, policy, name, prefix)
            resolved[name] = list(authors[name])
        elif name == "sub_modules_to_wrap" and not policy.units:
            sources[name] = "structure"
            resolved[name] = blocks_by_structure(root)
        else:
            sources[name] = "policy"
            resolved[name] = _resolve(paths, from_policy[name], f"policy of {prefix or 'the model'}", prefix)

    units = [path for path in resolved["sub_modules_to_wrap"] if path]
    recompute, ignored = resolved["recompute_modules"], resolved["ignored_modules"]
    gathered = _resolve(
        paths, policy.keep_gathered, f"policy of {prefix or 'the model'}, keep_gathered", prefix
    )
    # Parameters are dealt out last, when the modules are known to be fit.
    plan = ShardingPlan(
        prefix=prefix,
        units=(),
        root=Unit("", ()),
        recompute=tuple(recompute),
        ignored=tuple(ignored),
        fp32_inputs=policy.fp32_inputs,
        sources=sources,
        reshard_after_forward=fsdp2.reshard_after_forward,
        param_dtype=_dtype(fsdp2.param_dtype),
        reduce_dtype=_dtype(fsdp2.reduce_dtype),
        output_dtype=_dtype(fsdp2.output_dtype),
        cast_forward_inputs=fsdp2.cast_forward_inputs,
        offload_to_cpu=fsdp2.offload_to_cpu,
        pin_memory=fsdp2.pin_memory,
        use_reentrant=fsdp2.use_reentrant,
        forward_prefetch=fsdp2.num_to_forward_prefetch,
        backward_prefetch=fsdp2.num_to_backward_prefetch,
    )
    _check_modules(plan, modules, units, authors)
    unsharded = [path for path in gathered if path not in units]
    if unsharded and sources["sub_modules_to_wrap"] == "policy":
        raise ShardingError(
            f"policy of {prefix or 'the model'}, keep_gathered: {unsharded[0]} is not among its units."
        )
    ordered = _forward_order(units, _policy_order(paths, policy), modules)
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
        ShardingError, PatternError: as `build_plan`; also for a pattern that names a part that is not
            trained, or not there.
    """
    children = [name for name, _ in composite.named_children()]
    plans = {}
    for prefix, root in roots.items():
        plans[prefix] = build_plan(root, policies[prefix], fsdp2, prefix, neighbours=children)
    if "" in roots:
        return plans
    paths = ModulePaths(name for name, _ in composite.named_modules())
    for name in _PATTERN_FIELDS:
        for pattern in getattr(fsdp2, name) or ():
            if any(_relative(pattern, prefix) is not None for prefix in roots):
                continue
            with blaming(name, pattern):
                paths.match(pattern, where=name)
                if name != "ignored_modules":
                    raise ShardingError(
                        f'{name}: "{pattern}" names a part that is not trained and therefore not sharded; '
                        f"only modules of {', '.join(roots)} can stand here."
                    )
    return plans


def blocks_by_structure(root: nn.Module) -> list[str]:
    """Paths of the members of every outermost `ModuleList` that holds at least two modules of one class."""
    found: list[str] = []
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path and is_inside(path, block) for block in found):
            continue
        if len(module) >= 2 and len({type(child) for child in module}) == 1:
            found += [
                f"{path}.{i}" if path else str(i)
                for i, child in enumerate(module)
                if any(True for _ in child.parameters())
            ]
    return found


def _written(
    fsdp2: Fsdp2Config, name: str, prefix: str, neighbours: Collection[str]
) -> dict[str, str] | None:
    """A field's patterns for this root, as written -> without the prefix; `None` if the file says nothing
    about it.
    """
    value: Sequence[str] | None = getattr(fsdp2, name)
    if value is None or name not in fsdp2.model_fields_set:
        return None
    if not value:
        return {}
    own: dict[str, str] = {}
    for pattern in value:
        with blaming(name, pattern):
            relative = _relative(pattern, prefix)
            if relative is not None:
                if pattern in own:
                    raise ShardingError(f'{name}: "{pattern}" stands there twice; keep one of them.')
                own[pattern] = relative
                continue
            first = split_pattern(pattern, f'{name}: "{pattern}"')[0]
            if first not in neighbours:
                raise _unknown_part(name, pattern, first, prefix, neighbours)
    # A list that names only other parts (ignored_modules: [ae, text_encoder]) says nothing about this one.
    return own or None


def _unknown_part(name: str, pattern: str, first: str, prefix: str, known: Iterable[str]) -> ShardingError:
    parts = sorted({part for part in (prefix, *known) if part})
    if first in _COMPOSITE:
        why = (
            f'this model has no "{first}" (its section is absent, or it was not built); take the pattern out'
        )
    else:
        near = difflib.get_close_matches(first, parts, n=1, cutoff=0.6)
        better = ".".join([near[0], *pattern.split(".")[1:]]) if near else f"{prefix}.{pattern}"
        why = f'the model has no "{first}", only {", ".join(parts)}'
        return ShardingError(f'{name}: "{pattern}" matches no module: {why}.', f"Closest: {better}.")
    return ShardingError(f'{name}: "{pattern}" matches no module: {why}.')


def _relative(pattern: str, prefix: str) -> str | None:
    """The pattern without the prefix; `None` if it names another part."""
    pattern = pattern.strip()
    if not prefix:
        return pattern
    if pattern == prefix:
        return ""
    return pattern[len(prefix) + 1 :] if pattern.startswith(prefix + ".") else None


def _resolve_written(
    paths: ModulePaths, patterns: Mapping[str, str], policy: ShardingPolicy, name: str, prefix: str
) -> dict[str, str]:
    """Match a field's patterns, given as written -> relative; module path -> the pattern as written."""
    authors: dict[str, str] = {}
    for written, relative in patterns.items():
        with blaming(name, written):
            pattern = apply_aliases(relative, policy.aliases, paths) if relative else relative
            for path in _match(paths, pattern, name, prefix):
                _claim(authors, path, written, name, prefix)
    return authors


def _resolve(paths: ModulePaths, patterns: Iterable[str], where: str, prefix: str) -> list[str]:
    """Match a policy's patterns; a module that two of them claim is an error."""
    owner: dict[str, str] = {}
    for pattern in patterns:
        for path in _match(paths, pattern, where, prefix):
            _claim(owner, path, pattern, where, prefix)
    return list(owner)


def _match(paths: ModulePaths, pattern: str, where: str, prefix: str) -> list[str]:
    return paths.match(pattern, where=where, prefix=prefix) if pattern else [""]


def _claim(owner: dict[str, str], path: str, pattern: str, where: str, prefix: str) -> None:
    if path in owner:
        shown = f"{prefix}.{path}" if prefix and path else prefix or path
        raise ShardingError(
            f'{where}: "{shown}" is claimed twice, by "{owner[path]}" and by "{pattern}"; keep one of them.'
        )
    owner[path] = pattern


def _check_modules(
    plan: ShardingPlan,
    modules: Mapping[str, nn.Module],
    units: Sequence[str],
    authors: Mapping[str, Mapping[str, str]],
) -> None:
    """Check each chosen module by itself.

    Args:
        authors: field of fsdp2.yaml -> module path -> the pattern that names it there.
    """
    chosen = {
        "sub_modules_to_wrap": units,
        "recompute_modules": plan.recompute,
        "ignored_modules": plan.ignored,
    }
    for name, paths in chosen.items():
        for path in paths:
            with blaming(name, authors[name].get(path)):
                _check_module(plan, modules, name, path)


def _check_module(plan: ShardingPlan, modules: Mapping[str, nn.Module], name: str, path: str) -> None:
    module, shown = modules[path], plan.full_path(path)
    if name == "ignored_modules":
        trained = next((n for n, p in module.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise ShardingError(
                f'{name}: "{shown}" has trained parameters ({trained}), whose gradients would differ '
                "between ranks; freeze it, or take it out of the list."
            )
        return
    if not path:
        raise ShardingError(f'{name}: "{shown}" is the whole model; name modules inside it.')
    if type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ShardingError(
            f'{name}: "{shown}" is a {type(module).__name__}, which is never called itself; '
            f'write "{shown}.{{*}}".'
        )
    outside = next((other for other in plan.ignored if is_inside(path, other)), None)
    if outside is not None:
        raise ShardingError(
            f'{name}: "{shown}" lies in "{plan.full_path(outside)}", which ignored_modules leaves out.'
        )
    if name == "sub_modules_to_wrap":
        if not any(True for _ in module.parameters()):
            raise ShardingError(f'{name}: "{shown}" has no parameters to shard.')
        return
    outer = next((o for o in plan.recompute if o != path and is_inside(path, o)), None)
    if outer is not None:
        raise ShardingError(
            f'{name}: "{shown}" lies in "{plan.full_path(outer)}", which is recomputed as a whole; '
            "keep one of them."
        )


def _policy_order(paths: ModulePaths, policy: ShardingPolicy) -> list[str]:
    return _resolve(paths, policy.units, "policy", "") if policy.units else []


def _forward_order(units: Sequence[str], known: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The policy's order if it knows all of the units, else the order in which modules were registered."""
    rank = {path: i for i, path in enumerate(known if set(units) <= set(known) else modules)}
    return sorted(units, key=rank.__getitem__)


def _with_parameters(
    plan: ShardingPlan,
    root: nn.Module,
    units: Sequence[str],
    gathered: set[str],
    authors: Mapping[str, str],
) -> ShardingPlan:
    """Give each parameter to the innermost unit around it.

    Args:
        authors: unit -> the pattern of `sub_modules_to_wrap` that names it in fsdp2.yaml.
    """
    owned: dict[str, list[ParameterInfo]] = {path: [] for path in ["", *units]}
    ignored: list[str] = []
    first_owner: dict[int, tuple[str, str]] = {}
    deepest_first = sorted(units, key=lambda path: -path.count("."))
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if any(is_inside(name, path) for path in plan.ignored):
            ignored.append(name)
            continue
        owner = next((path for path in deepest_first if is_inside(name, path)), "")
        seen = first_owner.setdefault(id(parameter), (owner, name))
        if seen[0] != owner:
            with blaming("sub_modules_to_wrap", authors.get(owner) or authors.get(seen[0])):
                raise ShardingError(
                    f"{plan.full_path(name)} is the same tensor as {plan.full_path(seen[1])}, but the units "
                    f'"{plan.full_path(owner)}" and "{plan.full_path(seen[0])}" would gather it apart; '
                    "let one unit hold both."
                )
        if seen[1] == name:
            owned[owner].append(describe_parameter(name, parameter))
    empty = next((path for path in units if not owned[path]), None)
    if empty is not None:
        with blaming("sub_modules_to_wrap", authors.get(empty)):
            raise ShardingError(
                f'sub_modules_to_wrap: all parameters of "{plan.full_path(empty)}" belong to units '
                "inside it; take one level out."
            )
    made = tuple(Unit(path, tuple(owned[path]), path in gathered) for path in units)
    return replace(plan, units=made, root=Unit("", tuple(owned[""])), ignored_parameters=tuple(ignored))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else parse_dtype(name)
