"""Pipeline stages: what each has of a model.

Stages are cut from the bare module tree before anything else is done to it. What a stage does not have is taken out,
not replaced by something else, and what it has keeps its name (`blocks.10.attn1.to_q`), so that checkpoints and
folders of weights mean the same on any number of stages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from mm_core.config.parallel import ParallelSizes
from mm_core.config.pipeline_stages import layout_problem, stage_blocks
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.plan import ALIGNED, ShardingPlan, Unit, is_inside
from mm_core.sharding.policy import PipelinePolicy

_ATTRIBUTE = "_mm_pipeline"


@dataclass(frozen=True, slots=True)
class StageCall:
    """What a component is told with one call of one of its stages.

    Args:
        first: whether the stage begins the model: it is given nothing, and starts from the inputs.
        last: whether it ends the model, and returns what the whole model would.
        blocks: names of the blocks to run, in order, in the `ModuleList` of the policy.
        received: what the stage before returned.
    """

    first: bool
    last: bool
    blocks: tuple[str, ...]
    received: tuple[torch.Tensor, ...] = ()


class PipelineComponent(Protocol):
    """A component that can be cut into stages. Both methods are given the inputs of the whole model on every stage."""

    def forward(self, *args: Any, stage: StageCall | None = None, **kwargs: Any) -> Any:
        """Run one stage; all that is not the last one's returns the tensors of `stage_boundary`.

        All that the next stage needs and that has a gradient, or that comes of a trained module, has to travel.
        """
        ...

    def stage_boundary(
        self, *args: Any, dtype: torch.dtype, share: Callable[[int], int] = int, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """What a stage hands to the next: tensors on the meta device, in the dtype that the model computes in.

        Args:
            dtype: that dtype.
            share: how many of a sequence's tokens this rank has, by the length of the sequence; only components that can
                also be context parallel need it.
        """
        ...


@dataclass(frozen=True, slots=True)
class StagePart:
    """One of the stages that a rank has.

    Args:
        index: of the `count` stages of the model, in the order of the forward pass.
        blocks: names of its blocks.
        absent: paths of the modules on this rank that the part does not run.
    """

    index: int
    count: int
    blocks: tuple[str, ...]
    absent: tuple[str, ...] = ()

    @property
    def first(self) -> bool:
        """Whether the model begins with it."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the model ends with it."""
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class RankStages:
    """What a rank has of a model that is cut into stages.

    Args:
        parts: its stages.
        elsewhere: names of the parameters and persistent buffers that other ranks have.
    """

    parts: tuple[StagePart, ...]
    elsewhere: frozenset[str]


def pipeline_problem(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> str | None:
    """Why a model cannot be cut into so many stages, as a sentence; None if it can.

    Args:
        root: the bare component, whole, on any device.
        plan: of it.
    """
    return next(_problems(root, plan, sizes), None)


def _problems(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> Iterator[str]:
    name, policy = plan.full_path(""), plan.pipeline
    flag = f"--pipeline-model-parallel-size {sizes.pp}"
    if policy is None:
        yield f"{flag}: the sharding policy of {name} does not say where it can be cut into pipeline stages; use 1."
        return
    for other, size in (("tensor", sizes.tp), ("expert", sizes.ep)):
        if size > 1:
            yield f"{flag} does not go with --{other}-model-parallel-size {size} in this version; use 1 for one of them."
    blamed = f"policy of {name}, pipeline"
    if not callable(getattr(root, "stage_boundary", None)):
        yield f"{blamed}: {type(root).__name__} has no method stage_boundary, so its stages have nothing to exchange."
        return
    boundary: Any = root.stage_boundary
    if sizes.cp > 1 and "share" not in inspect.signature(boundary).parameters:
        yield (
            f"{flag} does not go with --context-parallel-size {sizes.cp} for {name}, whose stage_boundary takes no share of "
            "a sequence; use 1 for one of them."
        )
    modules = dict(root.named_modules())
    blocks = modules.get(policy.blocks)
    if not isinstance(blocks, nn.ModuleList):
        kind = "no module" if blocks is None else f"a {type(blocks).__name__}"
        yield f'{blamed}: blocks "{policy.blocks}" is {kind}, expected the path of a ModuleList.'
        return
    names = {*modules, *(n for n, _ in root.named_parameters())}
    for path in (*policy.first, *policy.last):
        if path not in names:
            yield f'{blamed}: "{path}" is neither a module nor a parameter of {type(root).__name__}.'
    problem = layout_problem(len(blocks), sizes)
    if problem is not None:
        yield problem + "."
        return
    yield from _misplaced(root, plan, policy)
    if sizes.vpp > 1 and plan.aligned:
        yield (
            f"align_fsdp_param_groups: true gathers norms of all blocks together, but with "
            f"--virtual-pipeline-model-parallel-size {sizes.vpp} a rank does not run them all in turn; write false."
        )


def _misplaced(root: nn.Module, plan: ShardingPlan, policy: PipelinePolicy) -> Iterator[str]:
    """Parameters that no stage has, or that several would have."""
    homes: dict[int, tuple[str, str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        home = next((kind for kind in ("first", "last") if _is_among(name, getattr(policy, kind))), None)
        if home is None and is_inside(name, policy.blocks):
            home = name[len(policy.blocks) + 1 :].partition(".")[0]
        if home is None:
            yield (
                f"policy of {plan.full_path('')}, pipeline: {name} belongs to no stage; name it, or a module around it, "
                "under first or last."
            )
            return
        other, place = homes.setdefault(id(parameter), (name, home))
        if place != home:
            yield (
                f"--pipeline-model-parallel-size: {plan.full_path(name)} is the same tensor as {plan.full_path(other)}, "
                "which another stage has; untie them (tie_word_embeddings: false), or use 1."
            )
            return


def cut_stage(root: nn.Module, plan: ShardingPlan, mesh: ParallelMesh) -> ShardingPlan:
    """Leave in a model, in place, what this rank's stages need; see `cut_for`."""
    return cut_for(root, plan, mesh.sizes, mesh.pp_rank)


def cut_for(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes, rank: int) -> ShardingPlan:
    """Leave in a model, in place, what the stages of one of the pipeline's ranks need.

    Args:
        root: the bare component, whole, on any device.
        plan: of it; `pipeline_problem` has nothing to say.
        rank: of `sizes.pp`.

    Returns:
        The plan of what is left.
    """
    policy = plan.pipeline
    assert policy is not None, "pipeline_problem refuses what has no policy"
    blocks = root.get_submodule(policy.blocks)
    names = [name for name, _ in blocks.named_children()]
    layout = stage_blocks(len(names), sizes)
    own = [index for index in range(len(layout)) if index % sizes.pp == rank]
    kept = {names[i] for index in own for i in layout[index]}
    before = set(root.state_dict(keep_vars=True))
    for name in names:
        if name not in kept:
            delattr(blocks, name)  # `del blocks[i]` would give the others new names
    ends = {"first": own[0] == 0, "last": own[-1] == len(layout) - 1}
    for kind, here in ends.items():
        for path in () if here else getattr(policy, kind):
            parent, _, attribute = path.rpartition(".")
            setattr(root.get_submodule(parent), attribute, None)
    parts = []
    for index in own:
        run = tuple(names[i] for i in layout[index])
        absent = [f"{policy.blocks}.{name}" for name in names if name in kept and name not in run]
        absent += policy.first if ends["first"] and index else ()
        absent += policy.last if ends["last"] and index != own[-1] else ()
        parts.append(StagePart(index, len(layout), run, tuple(absent)))
    root.register_forward_pre_hook(_only_as_a_stage, with_kwargs=True)
    left = set(root.state_dict(keep_vars=True))
    setattr(root, _ATTRIBUTE, RankStages(tuple(parts), frozenset(before - left)))
    return _plan_of_the_rest(root, plan, keeps_output_dtype=ends["last"])


def stages_of(root: nn.Module) -> RankStages | None:
    """What `cut_stage` left in a component; None if it is whole."""
    found: RankStages | None = getattr(root, _ATTRIBUTE, None)
    return found


def tensors_elsewhere(root: nn.Module) -> frozenset[str]:
    """Names of the parameters and persistent buffers of a component that other stages have."""
    stages = stages_of(root)
    return frozenset() if stages is None else stages.elsewhere


def _only_as_a_stage(root: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("stage") is None:
        raise RuntimeError(
            f"this rank has pipeline stages of {type(root).__name__}, which run through "
            "mm_core.training.pipeline.PipelineStep; there is no whole model to call."
        )


def _plan_of_the_rest(root: nn.Module, plan: ShardingPlan, keeps_output_dtype: bool) -> ShardingPlan:
    modules = {name for name, _ in root.named_modules()}
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}

    def here(paths: Collection[str]) -> tuple[str, ...]:
        return tuple(path for path in paths if path in modules)

    def of(unit: Unit) -> Unit:
        return replace(unit, parameters=tuple(p for p in unit.parameters if p.name in parameters))

    context = plan.context
    if context is not None:
        points = ("split_inputs", "split_outputs", "gather_outputs")
        left: dict[str, Any] = {
            name: {p: v for p, v in getattr(context, name).items() if p in modules} for name in points
        }
        context = replace(context, attention=here(context.attention), **left)
    units = [of(unit) for unit in plan.units if unit.path == ALIGNED or unit.path in modules]
    return replace(
        plan,
        units=tuple(unit for unit in units if unit.parameters),
        root=of(plan.root),
        recompute=here(plan.recompute),
        offload_activations=here(plan.offload_activations),
        compiled=here(plan.compiled),
        experts=here(plan.experts),
        aligned=here(plan.aligned),
        context=context,
        ignored=here(plan.ignored),
        ignored_parameters=tuple(name for name in plan.ignored_parameters if name in parameters),
        # What travels between stages stays in the dtype of computation.
        output_dtype=plan.output_dtype if keeps_output_dtype else None,
    )


def _is_among(name: str, paths: Collection[str]) -> bool:
    return any(is_inside(name, path) for path in paths)
