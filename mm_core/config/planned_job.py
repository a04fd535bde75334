"""A training job that is planned rather than run: its weights and data need not be here. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mm_core.config.assemble import Assembly, used_plugins
from mm_core.config.findings import (
    NOT_AVAILABLE,
    ConfigError,
    Finding,
    has_errors,
    sort_findings,
)
from mm_core.config.flag_parsing import parse_train_flags
from mm_core.config.flags import TrainFlags
from mm_core.config.job import TrainingJob, draft_training_job, file_order
from mm_registry import PluginManager, default_manager

_ELSEWHERE = ("missing-path", "weights")
"""Codes of findings about what must be there when the job runs."""


def load_planned_job(
    argv: Sequence[str], ranks: int | None = None, *, manager: PluginManager | None = None
) -> TrainingJob:
    """Read, resolve, check and merge the job of a command line of `mm train`, for a plan.

    What a run needs and a plan does not (weights, data files, the number of steps) is not asked for: folders and files that
    are not here, and what the data section asks for that this version cannot load, are notes.

    Args:
        argv: flags, a job file, `key.path=value`.
        ranks: how many ranks to plan for; by default those that the flags ask for.

    Raises:
        ConfigError: with everything that is wrong with flags and files.
    """
    flags = parse_train_flags(argv)
    if ranks is not None:
        flags = flags.model_copy(update={"nproc_per_node": ranks, "nnodes": None, "node_rank": None})
    assembly = Assembly(manager or default_manager())
    draft = draft_training_job(flags, assembly, to_run=False)
    data = flags.source("data")
    findings = sort_findings([_for_a_plan(one, data) for one in assembly.findings], file_order(flags))
    missing = [_missing(flags, name) for name in ("model", "data") if flags.source(name) is None]
    if missing or has_errors(findings):
        raise ConfigError([*missing, *findings])
    given: dict[str, Any] = {name: getattr(draft, name) for name in ("model", "data", "tools", "fsdp2")}
    return TrainingJob(
        **given,
        flags=draft.flags,
        components=draft.components,
        callbacks=draft.callbacks,
        findings=findings,
        plugins=used_plugins(draft.components.values(), assembly.hooks, draft.callbacks),
        hooks=assembly.hooks,
        overwrites=tuple(assembly.overwrites),
        documents=draft.documents,
    )


def _for_a_plan(finding: Finding, data: str | None) -> Finding:
    """What is elsewhere is a note; what this version cannot do an error, except with data, which a plan does not read."""
    if finding.code in _ELSEWHERE or (finding.code == NOT_AVAILABLE and finding.file == data):
        return dataclasses.replace(finding, level="note")
    if finding.code == NOT_AVAILABLE:
        return dataclasses.replace(finding, level="error")
    return finding


def _missing(flags: TrainFlags, name: str) -> Finding:
    what = {"model": "what is trained", "data": "how large a sample is"}[name]
    flag = f"mm_{name}"
    return flags.finding(
        flag, "missing-flag", f"it is required: it says {what}", f"Add {flags.spelling(flag)} FILE"
    )
