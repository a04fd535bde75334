"""Building on the meta device before a rank is started: what can be known without weights, data or devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.config import ConfigError, Finding, TrainingJob
from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, expanded
from mm_core.config.flags import world_size
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.parallel import ParallelSizes
from mm_core.models.factory import TRAINED, build_component, sharding_policy
from mm_core.models.pretrained import folder_differences
from mm_core.models.sora import EXPERTS
from mm_core.models.transformers_model import NETWORK
from mm_core.sharding import ShardingPlan, ShardingPolicy, build_plans
from mm_core.sharding.combinations import check_parallel
from mm_core.sharding.fitness import check_plan
from mm_core.sharding.patterns import CombinedPlanError, PlanError
from mm_core.sharding.plan import ShardingError
from mm_core.training.parameter_groups import check_groups
from mm_core.weights import find_adapter, is_hf_folder, resolve_load
from mm_core.weights.fit import FolderFit, check_fit
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_registry.hooks import ActiveHooks


def check_build(job: TrainingJob) -> dict[str, ShardingPlan]:
    """Build the trained predictors on meta, and the whole sharding plan; find the checkpoint that `--load` means, or
    compare the names and shapes of the weights that the run starts from.

    Returns:
        The plan of each FSDP root.

    Raises:
        ConfigError: a pattern of fsdp2.yaml, or a folder of weights, does not fit the model; the finding points at it.
        UserError: fields that the model refuses, patterns that match nothing, a wrong weights adapter, a `--load`
            without a complete checkpoint.
    """
    check_checkpoint(job.flags.load)
    predictors = {
        name: build_on_meta(job.components[name], job.hooks) for name in TRAINED if name in job.components
    }
    for name in predictors:
        find_adapter(job.components[name])
    _check_start(job, predictors)
    policies = {name: sharding_policy(job.components[name]) or ShardingPolicy() for name in predictors}
    check_groups(predictors, job.flags, policies)
    return check_patterns(
        job.components,
        predictors,
        job.fsdp2,
        job.documents["fsdp2"],
        ranks=world_size(job.flags),
        sizes=job.parallel,
    )


def check_checkpoint(load: str | None) -> None:
    """`--load` must be a folder of weights or have a complete checkpoint.

    Raises:
        UserError: it has none.
    """
    if load is not None and not is_hf_folder(expanded(load)):
        resolve_load(expanded(load))


def _check_start(job: TrainingJob, predictors: Mapping[str, nn.Module]) -> None:
    """Compare the folders that predictors start from with what is to be loaded, by config.json and headers.

    Raises:
        ConfigError: one does not fit.
    """
    findings = []
    load = job.flags.load
    for name, module in predictors.items():
        component = job.components[name]
        if name in (EXPERTS[0], NETWORK) and load is not None:  # it counts, whatever the section says
            if is_hf_folder(expanded(load)):
                _, problems = compare_folder(component, module, expanded(load))
                findings += [job.flags.finding("load", "weights", problem) for problem in problems]
        elif component.from_pretrained and component.init == "pretrained":
            _, problems = compare_folder(component, module, expanded(component.from_pretrained))
            findings += [folder_finding(job.documents["model"], component, problem) for problem in problems]
    if findings:
        raise ConfigError(findings)


def compare_folder(
    component: ComponentConfig, module: nn.Module, folder: Path
) -> tuple[FolderFit | None, list[str]]:
    """Compare a folder of weights with a predictor: its config.json, then names and shapes by the headers.

    Args:
        module: the predictor, on the meta device.

    Returns:
        What the headers say, None if they cannot be compared; and what is wrong, a sentence each.
    """
    label = f"{dotted(component.path) or component.role} ({component.model_id})"
    try:
        adapter = find_adapter(component)
        differences = folder_differences(module, folder / "config.json", adapter, component)
        fit = check_fit(module, folder, adapter, label=label)
    except UserError as error:
        return None, [one_line(str(error))]
    problems = [f"{folder} {problem}" for problem in fit.problems]
    if differences:
        what = one_line("; ".join(differences))
        problems.insert(0, f"{folder}/config.json describes another network than {label}: {what}")
    return fit, problems


def folder_finding(document: Document, component: ComponentConfig, message: str) -> Finding:
    """Return the error about the folder that a section names, at its name."""
    path = component.weights_path
    return Finding.at(document.origin(path), "error", "weights", message, path=path)


def one_line(text: str) -> str:
    """Return an error's text as the message of a finding."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return " ".join(lines).removesuffix(".")


def build_on_meta(component: ComponentConfig, hooks: ActiveHooks | None) -> nn.Module:
    """Build a predictor without storage.

    Raises:
        UserError: the class refuses the fields, or cannot be imported.
    """
    with torch.no_grad():
        module: nn.Module = build_component(component, "meta", hooks=hooks)
    return module


def check_patterns(
    components: Mapping[str, ComponentConfig],
    predictors: Mapping[str, nn.Module],
    fsdp2: Fsdp2Config,
    document: Document,
    ranks: int | None = None,
    sizes: ParallelSizes | None = None,
) -> dict[str, ShardingPlan]:
    """Return the sharding plan of each predictor, of all pipeline stages.

    Args:
        components: of the job; those that are not trained are known by their names only.
        predictors: by name, on the meta device.
        document: the sharding file.
        ranks: of the job, if their number is known; that `sharding_size` divides it is checked elsewhere.
        sizes: how many of them share one model.

    Raises:
        ConfigError: patterns of the sharding file do not fit; a finding points at each.
        UserError: a policy does not fit, or the model cannot be shared in these ways.
    """
    sizes = sizes or ParallelSizes()
    composite = _with_placeholders(components.items())
    for name, module in predictors.items():
        composite.add_module(name, module)
    policies = {name: sharding_policy(components[name]) or ShardingPolicy() for name in predictors}
    try:
        plans = build_plans(predictors, policies, fsdp2, composite)
        if ranks is not None:
            # What FSDP2 shards over; that the sizes divide the ranks is said elsewhere.
            ranks = None if ranks % sizes.together else sizes.sharing(ranks)
        shards = ranks if ranks is None else fsdp2.shard_group_size(ranks)
        if ranks is not None and shards is not None and ranks % shards:
            ranks = shards = None  # said elsewhere, and nothing can be counted with it
        if sizes.pp > 1 and len(plans) > 1:
            raise ShardingError(
                f"--pipeline-model-parallel-size: {sizes.pp} stages are cut from one network, but the job trains "
                f"{' and '.join(plans)}; train one of them, or set it to 1."
            )
        for name, plan in plans.items():
            check_plan(plan, predictors[name], ranks=ranks, shards=shards)
            check_parallel(predictors[name], plan, sizes)
        return plans
    except PlanError as error:
        errors = error.errors if isinstance(error, CombinedPlanError) else (error,)
        if all(one.field is None for one in errors):  # a policy or the model itself is to blame
            raise
        raise ConfigError(_in_the_file(one, fsdp2, document) for one in errors) from error


def _with_placeholders(components: Iterable[tuple[str, ComponentConfig]]) -> nn.Module:
    """Frozen parts take part in the plan by their names only (`ignored_modules: [ae]`)."""
    composite = nn.Module()
    for name, component in components:
        head, _, index = name.partition(".")
        if component.role in ("ae", "text_encoder"):
            if index:
                if not hasattr(composite, head):
                    composite.add_module(head, nn.ModuleList())
                several: Any = composite.get_submodule(head)
                several.append(nn.Identity())
            else:
                composite.add_module(head, nn.Identity())
    return composite


def _in_the_file(error: PlanError, fsdp2: Fsdp2Config, document: Document) -> Finding:
    """The error as a finding at the pattern or the key of fsdp2.yaml that it is about, if it is about one."""
    path: KeyPath = ()
    if error.field is not None:
        path = (error.field,)
        if error.pattern is not None:
            patterns: tuple[str, ...] = getattr(fsdp2, error.field)
            path = (error.field, len(patterns) - 1 - patterns[::-1].index(error.pattern))
    return Finding.at(
        document.origin(path),
        "error",
        "bad-pattern" if error.pattern is not None else "sharding",
        error.problem.removesuffix("."),
        path=path,
        suggestion=error.suggestion.removesuffix("."),
    )
