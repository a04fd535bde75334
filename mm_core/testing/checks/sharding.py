"""A predictor's sharding policy against the module that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.sharding import ShardingPlan
    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

PREDICTOR = ("predictor",)
PREFIX = "predictor"


def plan_of(case: Case, module: torch.nn.Module) -> ShardingPlan:
    """The plan that the core makes of the registered policy, or of the structure if there is none.

    Raises:
        CheckFailed: it cannot be made.
    """
    from mm_core.config.fsdp2 import Fsdp2Config
    from mm_core.sharding import ShardingPolicy, build_plan
    from mm_registry.errors import UserError

    policy = builds.sharding_policy(case) or ShardingPolicy()
    try:
        return build_plan(module, policy, Fsdp2Config(), PREFIX)
    except UserError as error:
        raise CheckFailed(f"no plan can be made of the sharding policy: {error}") from error


@check("the sharding policy makes a plan: each pattern matches a module that can be a unit",
       stage="build", roles=PREDICTOR)  # fmt: skip
def policy_makes_a_plan(case: Case) -> None:
    if case.policy_spec is None:
        raise CheckSkipped("the component registers no sharding policy; blocks are found by structure")
    module = builds.as_module(builds.build(case, "meta"))
    plan = plan_of(case, module)
    policy = builds.sharding_policy(case)
    if policy is not None and policy.units and not plan.units:
        raise CheckFailed("none of the policy's units is left in the plan")


@check("each parameter is in exactly one unit, or in the root, or ignored", stage="build", roles=PREDICTOR)
def policy_covers_each_parameter_once(case: Case) -> None:
    module = builds.as_module(builds.build(case, "meta"))
    plan = plan_of(case, module)
    owned = [info.name for unit in (*plan.units, plan.root) for info in unit.parameters]
    owned += plan.ignored_parameters
    names = [name for name, _ in module.named_parameters()]
    if twice := sorted({name for name in owned if owned.count(name) > 1}):
        raise CheckFailed(f"in two units: {', '.join(twice[:4])}")
    if absent := sorted(set(names) - set(owned)):
        raise CheckFailed(f"in no unit: {', '.join(absent[:4])}")


@check("there are FSDP units besides the root, and none holds most of the model alone",
       stage="build", roles=PREDICTOR)  # fmt: skip
def units_are_worth_it(case: Case) -> None:
    """A rank gathers one unit at a time: a model in one unit needs the memory of all of it on every rank."""
    module = builds.as_module(builds.build(case, "meta"))
    plan = plan_of(case, module)
    if not plan.units:
        raise CheckFailed(
            "there is no unit besides the root, so every rank would gather the whole model at once; register a policy "
            "whose units are the blocks"
        )
    largest = max(plan.units, key=lambda unit: unit.numel)
    total = sum(unit.numel for unit in (*plan.units, plan.root))
    if len(plan.units) == 1 and largest.numel > 0.9 * total:
        raise CheckFailed(
            f"{largest.path} holds {largest.numel / total:.0%} of the parameters and is the only unit; name its blocks"
        )


@check("units run in the order in which the policy lists them", stage="build", roles=PREDICTOR)
def units_run_in_order(case: Case) -> None:
    """Prefetching follows that order, and a unit that is never called itself stays in shards."""
    module = builds.lively(case)
    plan = plan_of(case, module)
    order = [unit.path for unit in plan.units]
    if not order:
        raise CheckSkipped("there are no units")
    called: list[str] = []
    for path in order:
        module.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.append(path))
    with torch.no_grad():
        builds.run(case, module, builds.inputs(case))
    if absent := [path for path in order if path not in called]:
        raise CheckFailed(
            f"the forward pass never calls {', '.join(absent[:3])}; FSDP gathers a unit when it is called, so its "
            "parameters would stay in shards"
        )
    first_calls = list(dict.fromkeys(called))
    if first_calls != order:
        at = next(i for i, (a, b) in enumerate(zip(first_calls, order, strict=True)) if a != b)
        raise CheckFailed(
            f"the forward pass calls {first_calls[at]} where the plan has {order[at]}; prefetching would gather the wrong "
            "unit"
        )


@check("each alias of the policy names a module that is there", stage="build", roles=PREDICTOR)
def aliases_name_modules(case: Case) -> None:
    from mm_core.sharding.patterns import ModulePaths
    from mm_registry.errors import UserError

    policy = builds.sharding_policy(case)
    if policy is None or not policy.aliases:
        raise CheckSkipped("the policy has no aliases")
    paths = ModulePaths(name for name, _ in builds.as_module(builds.build(case, "meta")).named_modules())
    for alias, target in policy.aliases.items():
        try:
            paths.match(target, where=f'alias "{alias}"')
        except UserError as error:
            raise CheckFailed(str(error)) from error


@check("fp32_inputs of the policy are arguments of forward", stage="build", roles=PREDICTOR)
def fp32_inputs_are_arguments(case: Case) -> None:
    import inspect

    policy = builds.sharding_policy(case)
    if policy is None:
        raise CheckSkipped("the component registers no sharding policy")
    module: Any = builds.as_module(builds.build(case, "meta"))
    declared = inspect.signature(module.forward).parameters
    if wrong := [name for name in policy.fp32_inputs if name not in declared]:
        raise CheckFailed(
            f"fp32_inputs names {', '.join(wrong)}, which forward({', '.join(declared)}) does not have; it would be "
            "rounded to bf16"
        )
