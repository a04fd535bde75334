"""Which kinds of parallelism go with a model, and with each other. What does not is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mm_core.config.parallel import ParallelSizes
from mm_core.sharding.plan import ShardingError, ShardingPlan


def check_parallel(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> None:
    """Refuse sizes that a model, or its plan, cannot be shared in.

    Args:
        root: the bare component, on any device.

    Raises:
        ShardingError: the first reason.
    """
    for problem in parallel_problems(root, plan, sizes):
        raise ShardingError(problem)


def parallel_problems(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> Iterator[str]:
    """Why a model cannot be shared in this way: whole sentences, each naming the flag."""
    if plan.compiled:
        from mm_core.sharding.compiled import compile_problem

        yield from _said(compile_problem(plan, sizes))
    # Few jobs share a model, and each of these is a good part of the engine.
    if sizes.cp > 1:
        from mm_core.sharding.context import context_problem

        yield from _said(context_problem(root, plan, sizes))
    if sizes.tp > 1:
        from mm_core.sharding.tensor import tensor_problem

        yield from _said(tensor_problem(root, plan, sizes))
    if sizes.pp > 1:
        from mm_core.sharding.pipeline import pipeline_problem

        yield from _said(pipeline_problem(root, plan, sizes))


def _said(problem: str | None) -> Iterator[str]:
    if problem is not None:
        yield problem
