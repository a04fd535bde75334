"""`mm check --build`: the parts of a job on the meta device, and the headers of their weights. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from mm_core.config.assemble import Assembly
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding
from mm_core.config.flag_parsing import parse_train_flags
from mm_core.config.flags import world_size
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.generation_job import draft_generation_job
from mm_core.config.job import draft_training_job, parallel_sizes
from mm_core.config.kinds import Kind, detect_kind, without_schema
from mm_core.config.overrides import is_override
from mm_core.config.section import check_section
from mm_core.training.build_check import Buildable, BuildReport, check_buildable
from mm_registry import default_manager


def check_build(arguments: Sequence[str], findings: Sequence[Finding]) -> BuildReport:
    """Build what the command line of `mm check` names.

    Args:
        arguments: the command line without options of `mm check`: flags of `mm train`, a job file, or single files.
            A sharding file among single files is checked against the model files.
        findings: of the ordinary check; a section with an error is not built.
    """
    if any(word.startswith("-") or is_override(word) for word in arguments):
        return check_buildable(_training(arguments, findings))
    report = BuildReport()
    kinds = {word: read for word in arguments if (read := _read(word)) is not None}
    sharding = next((document for kind, document in kinds.values() if kind is Kind.FSDP2), None)
    for word, (kind, document) in kinds.items():
        job: Buildable | None = None
        if kind in (Kind.MODEL, Kind.TRANSFORMERS):
            job = _training(["--mm-model", word], findings, sharding)
        elif kind in (Kind.COMBINED, Kind.JOB):
            job = _training([word], findings)
        elif kind is Kind.INFERENCE:
            job = _generation(document, findings)
        if job is None and kind is not Kind.FSDP2:
            report.summary.append(f"{word}: a {kind} has nothing to build")
        elif job is not None:
            one = check_buildable(job)
            report.findings += one.findings
            report.summary += one.summary
            report.tables += one.tables
            report.sharding += one.sharding
    if sharding is not None and len(kinds) == 1:
        report.summary.append(
            f"{sharding.path}: give the model file as well, and the patterns are checked against it"
        )
    report.findings = list(dict.fromkeys(report.findings))
    return report


def _read(path: str) -> tuple[Kind, Document] | None:
    try:
        document = without_schema(read_document(path))
    except ConfigError:
        return None  # said by the ordinary check
    kind = detect_kind(document)
    return None if kind is None else (kind, document)


def _training(
    arguments: Sequence[str], findings: Sequence[Finding], sharding: Document | None = None
) -> Buildable:
    assembly = Assembly(default_manager())
    try:
        flags = parse_train_flags(arguments)
        draft = draft_training_job(flags, assembly, to_run=False)
    except ConfigError:
        return Buildable({}, Document.from_data({}))  # the flags are wrong, and it is said
    ranks = world_size(flags)
    fsdp2, document = draft.fsdp2, draft.documents.get("fsdp2")
    if sharding is not None:
        fsdp2, document = check_section(Fsdp2Config, sharding).section, sharding
    return Buildable(
        draft.components,
        draft.documents.get("model") or Document.from_data({}),
        assembly.hooks,
        fsdp2,
        document,
        flags.load,
        flags.finding("load", "weights", ""),
        tuple(findings),
        ranks if flags.nproc_per_node is not None or ranks > 1 else None,
        parallel_sizes(flags, fsdp2, draft.documents.get("model")),
        flags,
    )


def _generation(document: Document, findings: Sequence[Finding]) -> Buildable:
    assembly = Assembly(default_manager())
    draft = draft_generation_job(document, assembly, to_run=False)
    load = document.data.get("load")
    return Buildable(
        draft.components,
        draft.document,
        assembly.hooks,
        load=load if isinstance(load, str) and load else None,
        load_origin=Finding.at(document.origin(("load",)), "error", "weights", "", path=("load",)),
        findings=tuple(findings),
    )
