"""Regional compilation: the forwards of single modules, such as blocks, by `torch.compile`.

Blocks of one class share their compiled code, so a model compiles as fast as its one block. What is compiled is the forward
itself: hooks, FSDP2's among them, run outside of it, parameters keep their names, and the eager twin is what the class defines.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_core.accelerator import Accelerator
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding.plan import ShardingError, ShardingPlan, is_inside
from mm_registry.words import described

log = logging.getLogger(__name__)

BACKEND = "inductor"
"""torch's own compiler: C++ on a CPU, Triton on a device."""


def compile_modules(modules: Mapping[str, nn.Module], plan: ShardingPlan, backend: str = BACKEND) -> None:
    """Compile the forwards of the modules that a plan names, in place: each when it is first called with new shapes.

    Args:
        modules: of the root, by their bare paths, not their wrappers: recomputation and FSDP2 run around what is compiled.

    Raises:
        ShardingError: `torch.compile` does not work on this machine, and why.
    """
    if not plan.compiled:
        return
    if backend == BACKEND:
        _try_out(plan)
    for path in plan.compiled:
        module: Any = modules[path]
        module.forward = torch.compile(module.forward, backend=backend)
    log.info(
        "%d modules are compiled by torch.compile (%s), the first of them %s; their first steps take longer",
        len(plan.compiled), backend, plan.full_path(plan.compiled[0]),
    )  # fmt: skip


def compile_problem(plan: ShardingPlan, sizes: ParallelSizes) -> str | None:
    """Why the modules of a plan cannot be compiled: a whole sentence; None if they can be, or none are."""
    if not plan.compiled:
        return None
    first = plan.full_path(plan.compiled[0])
    flag = next(
        (
            flag
            for size, flag in (
                (sizes.cp, "--context-parallel-size"),
                (sizes.tp, "--tensor-model-parallel-size"),
                (sizes.pp, "--pipeline-model-parallel-size"),
            )
            if size > 1
        ),
        None,
    )
    if flag is not None:
        return (
            f'compile_modules: "{first}" exchanges with other ranks inside its forward ({flag}), which is not compiled '
            "yet; set that to 1, or take compile_modules out."
        )
    exchanged = next((e for e in plan.experts if any(is_inside(e, path) for path in plan.compiled)), None)
    if exchanged is not None:
        return (
            f'compile_modules: "{first}" holds "{plan.full_path(exchanged)}", which exchanges tokens with other ranks '
            "(expert_parallel_size), and that is not compiled yet; set that to 1, or name modules beside the experts, such as "
            "attention."
        )
    if plan.recompute_granularity == "selective":
        both = next((r for r in plan.recompute for c in plan.compiled if is_inside(c, r)), None)
        if both is not None:
            return (
                f'compile_modules: "{first}" is recomputed selectively, which cannot look into compiled code; write '
                "recompute_granularity: full, or take compile_modules out."
            )
    return None


def _try_out(plan: ShardingPlan) -> None:
    """Compile a function of one line: a compiler or a package that is missing shows itself here, before the first step."""
    device = Accelerator.current().device
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        torch.compile(_line)(x).sum().backward()
    except Exception as error:  # dynamo, inductor and compilers raise what they like
        raise ShardingError(
            f'compile_modules: "{plan.full_path(plan.compiled[0])}" cannot be compiled, because torch.compile does not work '
            f"on this machine's {device.type} ({described(error)}); take compile_modules out, or mend that (a CPU needs a C++ "
            "compiler, a GPU the package triton)."
        ) from error


def _line(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1
