"""Building on the meta device before a rank is started: what can be known without weights, data or devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_core.config import ConfigError, Finding, TrainingJob
from mm_core.config.origin import KeyPath
from mm_core.models.factory import build_component, sharding_policy
from mm_core.models.sora import EXPERTS
from mm_core.sharding import ShardingPlan, ShardingPolicy, build_plans
from mm_core.sharding.patterns import PlanError
from mm_core.weights import find_adapter, is_hf_folder, resolve_load


def check_build(job: TrainingJob) -> dict[str, ShardingPlan]:
    """Build the trained predictors on meta, and the whole sharding plan; find the checkpoint that `--load` means.

    Returns:
        The plan of each FSDP root.

    Raises:
        ConfigError: a pattern of fsdp2.yaml does not fit the model; the finding points at it.
        UserError: fields that the model refuses, patterns that match nothing, a wrong weights adapter, a `--load`
            without a complete checkpoint.
    """
    load = job.flags.load
    if load is not None and not is_hf_folder(Path(load)):
        resolve_load(Path(load))
    # Frozen parts take part in the plan by their names only (`ignored_modules: [ae]`), so placeholders stand in for them.
    composite = nn.Module()
    for name, component in job.components.items():
        head, _, index = name.partition(".")
        if component.role in ("ae", "text_encoder"):
            if index:
                if not hasattr(composite, head):
                    composite.add_module(head, nn.ModuleList())
                several: Any = composite.get_submodule(head)
                several.append(nn.Identity())
            else:
                composite.add_module(head, nn.Identity())
    policies: dict[str, ShardingPolicy] = {}
    for name in EXPERTS:
        if name in job.components:
            with torch.no_grad():
                composite.add_module(name, build_component(job.components[name], "meta", hooks=job.hooks))
            policies[name] = sharding_policy(job.components[name]) or ShardingPolicy()
            find_adapter(job.components[name])
    roots = {name: composite.get_submodule(name) for name in policies}
    try:
        return build_plans(roots, policies, job.fsdp2, composite)
    except PlanError as error:
        finding = _at_its_pattern(error, job)
        if finding is None:  # a policy or the model itself is to blame
            raise
        raise ConfigError([finding]) from error


def _at_its_pattern(error: PlanError, job: TrainingJob) -> Finding | None:
    """The error as a finding at the pattern of fsdp2.yaml that it is about; `None` if it is about none."""
    if error.field is None or error.pattern is None:
        return None
    patterns: tuple[str, ...] = getattr(job.fsdp2, error.field)
    path: KeyPath = (error.field, len(patterns) - 1 - patterns[::-1].index(error.pattern))
    return Finding.at(
        job.documents["fsdp2"].origin(path),
        "error",
        "bad-pattern",
        error.problem.removesuffix("."),
        path=path,
        suggestion=error.suggestion.removesuffix("."),
    )
