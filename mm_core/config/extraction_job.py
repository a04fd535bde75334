"""The job whose features are extracted: a training job, of which the encoders and the dataset are needed. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.cross_checks.features import CODE, TEXT, VIDEO
from mm_core.config.cross_checks.ranks import check_ranks
from mm_core.config.features import STORED
from mm_core.config.findings import ConfigError, Finding, has_errors, sort_findings, unavailable_is_error
from mm_core.config.flag_parsing import parse_train_flags
from mm_core.config.flags import world_size
from mm_core.config.job import TrainingDraft, draft_training_job, file_order
from mm_registry import PluginManager, default_manager

if TYPE_CHECKING:
    from mm_core.config.data import DataConfig
    from mm_core.config.flags import TrainFlags
    from mm_registry.hooks import ActiveHooks

_OF_A_RUN = ("no-weights", "weights")
"""Codes of findings about weights that the predictor starts from, which are not needed here."""


@dataclasses.dataclass(frozen=True)
class ExtractionJob:
    """What is encoded, and by what.

    Attributes:
        components: `dataset`, and of `ae`, `ae.i2v_processor` and `text_encoder` those that are used.
        video, text: which halves are extracted.
        output: the folder that tools.json names (`sorafeature.save_path`), or None.
    """

    flags: TrainFlags
    data: DataConfig
    components: Mapping[str, ComponentConfig]
    hooks: ActiveHooks
    findings: tuple[Finding, ...]
    video: bool
    text: bool
    output: str | None = None

    def encoders(self, *heads: str) -> dict[str, ComponentConfig]:
        """The components of some sections and what is inside them."""
        return {name: c for name, c in self.components.items() if name.split(".")[0] in heads}


def load_extraction_job(
    argv: Sequence[str], what: Sequence[str], *, manager: PluginManager | None = None
) -> ExtractionJob:
    """Read and check the job of a command line of `mm train`.

    What `load_video_features` and `load_text_features` say does not matter: this comes before.

    Args:
        what: of `video` and `text`.

    Raises:
        ConfigError: with everything that is wrong with flags and files.
    """
    video, text = "video" in what, "text" in what
    overrides = [f"model.{name}=false" for name, asked in ((VIDEO, video), (TEXT, text)) if asked]
    flags = parse_train_flags([*argv, *overrides])
    assembly = Assembly(manager or default_manager())
    draft = draft_training_job(flags, assembly, to_run=False)
    other = _of_the_ranks(draft)
    findings = [
        one
        for one in assembly.findings
        if one.code != CODE and one not in other and not _of_the_predictor(one)
    ]
    findings += [_missing(flags, name) for name in ("model", "data") if flags.source(name) is None]
    heads = (*(("ae",) if video else ()), *(("text_encoder",) if text else ()))
    components = {n: c for n, c in draft.components.items() if n.split(".")[0] in (*heads, "dataset")}
    basic = components["dataset"].fields.get("basic_parameters") if "dataset" in components else None
    if isinstance(basic, Mapping) and basic.get("data_storage_mode") == STORED:
        path = ("dataset_param", "basic_parameters", "data_storage_mode")
        told = f'"{STORED}" names features that were extracted before'
        mend = "Give the data file with the videos"
        origin = draft.documents["data"].origin(path)
        findings.append(Finding.at(origin, "error", CODE, told, path=path, suggestion=mend))
    checked = sort_findings(unavailable_is_error(findings), file_order(flags))
    if has_errors(checked):
        raise ConfigError(checked)
    assert draft.data is not None
    place = (
        None if draft.tools is None or draft.tools.sorafeature is None else draft.tools.sorafeature.save_path
    )
    return ExtractionJob(draft.flags, draft.data, components, assembly.hooks, checked, video, text, place)


def _of_the_ranks(draft: TrainingDraft) -> list[Finding]:
    """What does not fit the number of ranks, which is another one than that of the training."""
    if draft.fsdp2 is None or draft.tools is None:
        return []
    ranks = world_size(draft.flags)
    return list(check_ranks(draft.flags, draft.fsdp2, draft.documents["fsdp2"], draft.tools, ranks))


def _of_the_predictor(finding: Finding) -> bool:
    return finding.code in _OF_A_RUN and finding.path.startswith(("predictor", "low_noise_predictor"))


def _missing(flags: TrainFlags, name: str) -> Finding:
    what = {"model": "which encoders there are", "data": "what is encoded"}[name]
    flag = f"mm_{name}"
    return flags.finding(
        flag, "missing-flag", f"it is required: it says {what}", f"Add {flags.spelling(flag)} FILE"
    )
