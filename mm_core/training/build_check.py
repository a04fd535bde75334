"""What can be said of a job by building its parts on the meta device and reading the headers of their weights: no
tensor is read and no device is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.config import ConfigError, Finding, TrainFlags
from mm_core.config.component import WITH_WEIGHTS, ComponentConfig
from mm_core.config.document import Document, expanded
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.parallel import ParallelSizes
from mm_core.config.section import SectionModel
from mm_core.models.factory import TRAINED, build_component, sharding_policy
from mm_core.models.pretrained import load_pretrained
from mm_core.models.skeleton import collect_skeletons
from mm_core.models.sora import EXPERTS
from mm_core.models.transformers_model import NETWORK
from mm_core.sharding.policy import ShardingPolicy
from mm_core.sharding.table import plan_texts
from mm_core.training.parameter_groups import check_groups
from mm_core.training.precheck import (
    build_on_meta,
    check_checkpoint,
    check_patterns,
    compare_folder,
    one_line,
)
from mm_core.weights import is_hf_folder
from mm_core.weights.fit import FolderFit
from mm_core.weights.headers import read_headers
from mm_core.weights.hf_folder import weight_files
from mm_registry import default_manager
from mm_registry.errors import UserError
from mm_registry.words import described

if TYPE_CHECKING:
    from mm_core.sharding import ShardingPlan
    from mm_registry.hooks import ActiveHooks


@dataclass(frozen=True)
class Buildable:
    """What of a job, or of a single file, is to be built.

    Attributes:
        components: those whose sections have no error.
        document: the file that they stand in.
        hooks: activated plugins; their `post_build` sees each module.
        fsdp2, fsdp2_document: how predictors are sharded; None where nothing is.
        ranks: of the job, None if it is not said how many there will be.
        parallel: how many of them share one model.
        flags: of a training job, whose names of parameters are looked up.
        load: `--load` or `load`, and where it is said.
        load_origin: a finding about it begins as this one.
        findings: of the ordinary check. What this version cannot run need not be built.
    """

    components: Mapping[str, ComponentConfig]
    document: Document
    hooks: ActiveHooks | None = None
    fsdp2: Fsdp2Config | None = None
    fsdp2_document: Document | None = None
    load: str | None = None
    load_origin: Finding | None = None
    findings: tuple[Finding, ...] = ()
    ranks: int | None = None
    parallel: ParallelSizes = field(default_factory=ParallelSizes)
    flags: TrainFlags | None = None


@dataclass
class BuildReport:
    """Findings, a line for each component that says what was built and compared, and how it is sharded: as tables and
    as data.
    """

    findings: list[Finding] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    tables: str = ""
    sharding: list[dict[str, Any]] = field(default_factory=list)


def check_buildable(job: Buildable) -> BuildReport:
    """Build the components with weights on the meta device; check the sharding file's patterns against the predictors
    and every folder of weights against what is to be loaded from it.

    A folder that does not exist is the ordinary check's.
    """
    report = BuildReport()
    predictors = _predictors(job, report)
    plans = _plans(job, predictors, report)
    _groups(job, predictors, report)
    for name, module in predictors.items():
        fits = _folders(job, name, module, report)
        report.summary.append(_line(job.components[name], module, fits, plans.get(name)))
    for component in job.components.values():
        if component.role in WITH_WEIGHTS - {"predictor"}:
            _encoder(job, component, report)
    return report


def _predictors(job: Buildable, report: BuildReport) -> dict[str, nn.Module]:
    built: dict[str, nn.Module] = {}
    for name in TRAINED:
        component = job.components.get(name)
        if component is None:
            continue
        try:
            built[name] = build_on_meta(component, job.hooks)
        except UserError as error:
            _not_built(job, component, error, report)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            # A class that checks its fields as Python does; `mm train` would end with this.
            _not_built(
                job, component, UserError(f"{_name(component)} cannot be built: {described(error)}"), report
            )
    return built


def _plans(
    job: Buildable, predictors: Mapping[str, nn.Module], report: BuildReport
) -> dict[str, ShardingPlan]:
    if job.fsdp2 is None or not predictors:
        return {}
    document = job.fsdp2_document or Document.from_data({})
    plans: dict[str, ShardingPlan] = {}
    try:
        ranks, sizes = job.ranks, job.parallel
        plans = check_patterns(job.components, predictors, job.fsdp2, document, ranks=ranks, sizes=sizes)
        if ranks is not None and ranks % sizes.together:
            return plans  # said by the ordinary check; a table of it would be of no run
        ranks = ranks if ranks is None else sizes.sharing(ranks)
        shards = job.fsdp2.shard_group_size(ranks) if ranks is not None else 1
        if ranks is not None and ranks % shards:
            return plans  # the same
        report.tables += plan_texts(plans, shards, ranks)
        report.sharding += [plan.as_dict(shards, ranks) for plan in plans.values()]
    except ConfigError as error:
        report.findings += error.findings
    except UserError as error:
        report.findings.append(_finding(job, (), "bad-pattern", str(error)))
    return plans


def _groups(job: Buildable, predictors: Mapping[str, nn.Module], report: BuildReport) -> None:
    """Look up the parameters that flags of the optimizer name."""
    if job.flags is None or not predictors:
        return
    try:
        policies = {name: sharding_policy(job.components[name]) or ShardingPolicy() for name in predictors}
        check_groups(predictors, job.flags, policies)
    except ConfigError as error:
        report.findings += error.findings
    except UserError:
        return  # the policy fails, as the plan says


def _folders(job: Buildable, name: str, module: nn.Module, report: BuildReport) -> list[FolderFit]:
    """Compare the folder of the section, and the one of `--load` for the first predictor."""
    component = job.components[name]
    fits = []
    if component.from_pretrained and component.init == "pretrained":
        path = component.weights_path
        fits += _compare(job, component, module, expanded(component.from_pretrained), path, report)
    if name in (EXPERTS[0], NETWORK) and job.load is not None:
        place = expanded(job.load)
        if is_hf_folder(place):
            fits += _compare(job, component, module, place, None, report)
        elif place.exists():
            try:
                check_checkpoint(job.load)
            except UserError as error:
                report.findings.append(_finding(job, None, "weights", str(error)))
    return fits


def _compare(
    job: Buildable,
    component: ComponentConfig,
    module: nn.Module,
    folder: Path,
    path: KeyPath | None,
    report: BuildReport,
) -> list[FolderFit]:
    if not folder.is_dir() or (path is not None and _only_described(component, folder)):
        return []
    fit, problems = compare_folder(component, module, folder)
    report.findings += [_finding(job, path, "weights", problem) for problem in problems]
    return [] if fit is None else [fit]


def _only_described(component: ComponentConfig, folder: Path) -> bool:
    """Whether a folder has the config.json that a network is built from and no weights yet, which is told already."""
    return component.role == "transformers_model" and not any(folder.glob("*.safetensors"))


def _encoder(job: Buildable, component: ComponentConfig, report: BuildReport) -> None:
    """Build a frozen component from its folder's config.json, or from its section if it starts from random weights."""
    path = (*component.path, "from_pretrained")
    try:
        cls: Any = default_manager().load(component.spec)
    except UserError as error:
        _not_built(job, component, error, report)
        return
    pretrained = component.init == "pretrained" and component.from_pretrained is not None
    folder = expanded(component.from_pretrained) if component.from_pretrained else Path()
    if pretrained and not folder.is_dir():
        report.summary.append(
            f"{_name(component)}: not built, there is no folder {component.from_pretrained}"
        )
        return
    if pretrained and not _loads_by_library(cls):
        _headers_only(job, component, folder, report)
        return
    if not pretrained and component.init != "random" and hasattr(cls, "from_pretrained"):
        report.summary.append(f"{_name(component)}: not built, it has no weights")
        return
    try:
        with collect_skeletons() as fits:
            # What has no weights is small, and need not be made for the meta device.
            weightless = isinstance(component.config, SectionModel) and not component.config.has_weights
            module = build_component(_as_fields(component), "cpu" if weightless else "meta", hooks=job.hooks)
    except UserError as error:
        where = path if pretrained else component.path
        _not_built(job, component, error, report, where)
        return
    except Exception as error:  # noqa: BLE001 - a plugin's class need not be made for the meta device
        report.summary.append(
            f"{_name(component)}: not built, its class cannot be on the meta device ({described(error)})"
        )
        return
    for fit in fits:
        report.findings += [
            _finding(job, path, "weights", f"{fit.folder} {problem}") for problem in fit.problems
        ]
    report.summary.append(_line(component, module, fits, None))


def _as_fields(component: ComponentConfig) -> ComponentConfig:
    return (
        replace(component, from_pretrained=str(expanded(component.from_pretrained)))
        if component.from_pretrained
        else component
    )


def _headers_only(job: Buildable, component: ComponentConfig, folder: Path, report: BuildReport) -> None:
    """A class that loads its weights in a way of its own would read them all."""
    try:
        count = len(read_headers(weight_files(folder)))
    except UserError as error:
        report.findings.append(_finding(job, (*component.path, "from_pretrained"), "weights", str(error)))
        return
    report.summary.append(
        f"{_name(component)}: not built, its class loads weights in a way of its own; {folder} has {count} tensors"
    )


def _loads_by_library(cls: type) -> bool:
    """Whether a class loads folders by `load_pretrained`, of which there are skeletons."""
    modules = (sys.modules.get(base.__module__) for base in cls.__mro__)
    return any(load_pretrained in vars(module).values() for module in modules if module is not None)


def _not_built(
    job: Buildable,
    component: ComponentConfig,
    error: UserError,
    report: BuildReport,
    path: KeyPath | None = None,
) -> None:
    """What this version cannot run is said already; anything else is an error of the section."""
    prefix = dotted(component.path)
    if any(f.code == "not-available" and _is_within(f.path, prefix) for f in job.findings):
        report.summary.append(f"{_name(component)}: not built, this version cannot run it")
        return
    report.findings.append(_finding(job, component.path if path is None else path, "build", str(error)))


def _is_within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith((f"{prefix}.", f"{prefix}["))


def _finding(job: Buildable, path: KeyPath | None, code: str, text: str) -> Finding:
    """An error at a place of the file, or at `load` if there is none."""
    message = one_line(text)
    if path is None and job.load_origin is not None:
        return replace(job.load_origin, level="error", code=code, message=message)
    place: KeyPath = path or ()
    origin = (
        job.document.origin(place)
        if place[-1:] in (("from_pretrained",), ("init_from_hf_path",))
        else job.document.key_origin(place)
    )
    return Finding.at(origin, "error", code, message, path=place)


def _line(
    component: ComponentConfig, module: nn.Module, fits: Sequence[FolderFit], plan: ShardingPlan | None
) -> str:
    """`predictor (wandit): 825 tensors, 14.288 B parameters, 40 units; fits weights/transformer (6 files, 28.6 GB)`."""
    state = module.state_dict()
    units = f", {_count(len(plan.units), 'unit')}" if plan is not None else ""
    parts = [
        f"{_name(component)}: {_count(len(state), 'tensor')}, {_size(module.parameters())} parameters{units}"
    ]
    parts += [
        f"{_verdict(fit)} {fit.folder} "
        f"({_count(fit.tensors, 'tensor')} in {_count(fit.files, 'file')}, {_bytes(fit.nbytes)})"
        for fit in fits
    ]
    return "; ".join(parts)


def _verdict(fit: FolderFit) -> str:
    if not fit.compared:
        return "not compared with"
    return "does not fit" if fit.problems else "fits"


def _name(component: ComponentConfig) -> str:
    """Two experts are both predictors."""
    return f"{dotted(component.path) or component.role} ({component.model_id})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(parameters: Iterable[torch.Tensor]) -> str:
    number = sum(parameter.numel() for parameter in parameters)
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3f} {letter}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} bytes"
