"""A predictor's sharding policy against the module that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.sharding import ShardingPlan, ShardingPolicy
    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

PREDICTOR = ("predictor",)
TRAINED = ("predictor", "transformers_model")
PREFIX = "predictor"
ALIGNED = "(aligned)"  # of mm_core.sharding.plan, which imports torch


def plan_of(case: Case, module: torch.nn.Module, **fsdp2: Any) -> ShardingPlan:
    """The checked plan that the core makes of the registered policy, or of the structure if there is none.

    Args:
        fsdp2: what fsdp2.yaml writes.

    Raises:
        CheckFailed: it cannot be made.
    """
    from mm_core.config.fsdp2 import Fsdp2Config
    from mm_core.sharding import ShardingPolicy, build_plan
    from mm_core.sharding.fitness import check_plan
    from mm_registry.errors import UserError

    policy = builds.sharding_policy(case) or ShardingPolicy()
    try:
        plan = build_plan(module, policy, Fsdp2Config(**fsdp2), PREFIX)
        check_plan(plan, module)
        return plan
    except UserError as error:
        raise CheckFailed(f"no plan can be made of the sharding policy: {error}") from error


@check("the sharding policy makes a plan: each pattern matches a module that can be a unit",
       stage="build", roles=TRAINED)  # fmt: skip
def policy_makes_a_plan(case: Case) -> None:
    if case.policy_spec is None:
        raise CheckSkipped("the component registers no sharding policy; blocks are found by structure")
    module = builds.as_module(builds.build(case, "meta"))
    plan = plan_of(case, module)
    policy = builds.sharding_policy(case)
    if policy is not None and policy.units and not plan.units:
        raise CheckFailed("none of the policy's units is left in the plan")
    if plan.pipeline is not None:
        from mm_core.config.parallel import ParallelSizes
        from mm_core.sharding.pipeline import pipeline_problem

        problem = pipeline_problem(module, plan, ParallelSizes())
        if problem is not None:
            raise CheckFailed(problem.removesuffix("."))


@check("each parameter is in exactly one unit, or in the root, or ignored", stage="build", roles=TRAINED)
def policy_covers_each_parameter_once(case: Case) -> None:
    module = builds.as_module(builds.build(case, "meta"))
    plan = plan_of(case, module)  # which is checked for it
    if not plan.parameter_names >= {name for name, _ in module.named_parameters()}:
        raise CheckFailed("a parameter is in no unit")


@check(
    "experts, the aligned group and offloaded modules of the policy fit the model",
    stage="build",
    roles=TRAINED,
)
def policy_fits_with_all_of_it(case: Case) -> None:
    """With `expert_parallel_size` above 1 and `align_fsdp_param_groups: true`, which are off by default."""
    policy = builds.sharding_policy(case)
    if policy is None or not (policy.experts or policy.aligned or policy.offload_activations):
        raise CheckSkipped("the policy names no experts, no aligned modules and no activations to offload")
    module = builds.as_module(builds.build(case, "meta"))
    written: dict[str, Any] = {"align_fsdp_param_groups": bool(policy.aligned)}
    if policy.experts:
        written["expert_parallel_size"] = _divisor_of_experts(policy, module)
    plan_of(case, module, **written)


def _divisor_of_experts(policy: ShardingPolicy, module: torch.nn.Module) -> int:
    """The smallest number of ranks above 1 that the experts can be dealt out over; 2 if there are none to ask."""
    from mm_core.sharding.patterns import ModulePaths
    from mm_registry.errors import UserError

    paths = ModulePaths.of(dict(module.named_modules()))
    try:
        first = module.get_submodule(paths.match(policy.experts[0])[0])
    except UserError:
        return 2  # the plan says what is wrong
    number = next((p.shape[0] for p in first.parameters() if p.ndim), 2)
    return next((n for n in range(2, number + 1) if number % n == 0), 2)


@check("there are FSDP units besides the root, and none holds most of the model alone",
       stage="build", roles=TRAINED)  # fmt: skip
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


@check("units run in the order in which the policy lists them", stage="build", roles=TRAINED)
def units_run_in_order(case: Case) -> None:
    """Prefetching follows that order, and a unit that is never called itself stays in shards."""
    from mm_core.sharding.joint_vision import join_vision_calls

    module = builds.lively(case)
    plan = plan_of(case, module)
    for path in plan.joint_vision:
        seen: Any = module.get_submodule(path)
        join_vision_calls(seen, seen.forward, path)
    order = [unit.path for unit in plan.units if unit.path != ALIGNED]
    if not order:
        raise CheckSkipped("there are no units")
    named = {*order, *_named_modules(case, module)}
    called: list[str] = []
    for path in named:
        module.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.append(path))
    with torch.no_grad():
        builds.run(case, module, builds.inputs(case))
    if unused := sorted(named - {*order, *called}):
        raise CheckFailed(
            f"the forward pass never calls {', '.join(unused[:3])}, which the policy recomputes, offloads, aligns or deals "
            "out: nothing would happen there"
        )
    if absent := [path for path in order if path not in called]:
        raise CheckFailed(
            f"the forward pass never calls {', '.join(absent[:3])}; FSDP gathers a unit when it is called, so its "
            "parameters would stay in shards"
        )
    first_calls = [path for path in dict.fromkeys(called) if path in set(order)]
    if first_calls != order:
        at = next(i for i, (a, b) in enumerate(zip(first_calls, order, strict=True)) if a != b)
        raise CheckFailed(
            f"the forward pass calls {first_calls[at]} where the plan has {order[at]}; prefetching would gather the wrong "
            "unit"
        )


def _named_modules(case: Case, module: torch.nn.Module) -> set[str]:
    """What the policy names besides units; it has been checked that the names are right."""
    from mm_core.sharding.patterns import ModulePaths
    from mm_registry.errors import UserError

    policy = builds.sharding_policy(case)
    if policy is None:
        return set()
    paths = ModulePaths.of(dict(module.named_modules()))
    patterns = (*policy.recompute, *policy.offload_activations, *policy.experts, *policy.aligned)
    try:
        return {path for pattern in patterns for path in paths.match(pattern)}
    except UserError as error:
        raise CheckFailed(str(error)) from error


@check("each alias of the policy names a module that is there", stage="build", roles=TRAINED)
def aliases_name_modules(case: Case) -> None:
    from mm_core.sharding.patterns import ModulePaths
    from mm_registry.errors import UserError

    policy = builds.sharding_policy(case)
    if policy is None or not policy.aliases:
        raise CheckSkipped("the policy has no aliases")
    paths = ModulePaths.of(dict(builds.as_module(builds.build(case, "meta")).named_modules()))
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


@check("two pipeline stages, one after the other, compute what the whole component does, and its gradients",
       stage="build", roles=PREDICTOR)  # fmt: skip
def stages_compute_the_whole(case: Case) -> None:
    """What one hands to the other is what `stage_boundary` says."""
    from mm_core.config.parallel import ParallelSizes
    from mm_core.sharding.pipeline import StageCall, cut_for, pipeline_problem, stages_of

    policy, whole, given = builds.sharding_policy(case), builds.lively(case), builds.inputs(case)
    if policy is None or policy.pipeline is None:
        raise CheckSkipped("the policy does not say where the component can be cut into pipeline stages")
    sizes = ParallelSizes(pp=2)
    problem = pipeline_problem(whole, plan_of(case, whole), sizes)
    if problem is not None:
        raise CheckFailed(problem.removesuffix("."))
    expected = builds.run(case, whole, builds.copied(given))
    expected.square().mean().backward()
    wanted: Any = whole
    boundary = wanted.stage_boundary(**builds.copied(given), dtype=torch.float32)
    travelling: tuple[torch.Tensor, ...] = ()
    stages: list[Any] = [builds.lively(case) for _ in range(sizes.pp)]
    for rank, stage in enumerate(stages):
        cut_for(stage, plan_of(case, stage), sizes, rank)
        found = stages_of(stage)
        assert found is not None
        part = found.parts[0]
        travelling = stage(
            **builds.copied(given), stage=StageCall(part.first, part.last, part.blocks, travelling)
        )
        if not part.last and [t.shape for t in travelling] != [t.shape for t in boundary]:
            shapes = [[list(t.shape) for t in tensors] for tensors in (boundary, travelling)]
            raise CheckFailed(
                f"stage_boundary says that {shapes[0]} travel, but the first stage returns {shapes[1]}"
            )
    output: Any = travelling
    builds.must_be_close(output, expected, 1e-5, "the stages compute something else than the whole component")
    output.square().mean().backward()
    gradients = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    for name, parameter in whole.named_parameters():
        if parameter.grad is None:
            continue
        if gradients[name] is None:
            raise CheckFailed(
                f"{name} has no gradient in its stage: what comes of it does not travel, or without it"
            )
        builds.must_be_close(
            gradients[name], parameter.grad, 1e-4, f"{name} has another gradient in its stage"
        )
