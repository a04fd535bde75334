"""Checking one file by itself: what it is, is told by its keys."""

from __future__ import annotations

from collections.abc import Sequence

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly
from mm_core.config.component import WITH_WEIGHTS
from mm_core.config.document import Document, link_notes, read_document
from mm_core.config.findings import ConfigError, Finding, sort_findings
from mm_core.config.generation_job import check_generation_file
from mm_core.config.kinds import CLASSES, JOB_KINDS, Kind, detect_kind, without_schema
from mm_core.config.model import ModelConfig
from mm_core.config.parts import Part, find_callbacks, find_part, find_parts, resolve
from mm_core.config.second_expert import check_both_experts, with_second_expert, without_repeated
from mm_core.config.section import check_section
from mm_registry import PluginManager, default_manager

_DATA_PATHS = (
    ("basic_parameters", "data_path", "file"),
    ("basic_parameters", "val_data_path", "file"),
    ("tokenizer_config", "from_pretrained", "folder"),
)


def check_file(path: str, *, manager: PluginManager | None = None) -> tuple[Finding, ...]:
    """Return the findings of one file, of a job file those of all its sections. Folders of weights and data that do not
    exist are notes: the file may be for elsewhere.
    """
    return (*link_notes(path), *_check_file(path, manager))


def _check_file(path: str, manager: PluginManager | None) -> tuple[Finding, ...]:
    try:
        document = without_schema(read_document(path))
    except ConfigError as error:
        return error.findings
    kind = detect_kind(document)
    if kind is None:
        known = ", ".join((*CLASSES, Kind.JOB))
        message = "none of its keys is known, so it cannot be told what it configures"
        return (Finding("error", "unknown-file", message, path, 1, 1, suggestion=f"Known are: {known}"),)
    manager = manager or default_manager()
    if kind in JOB_KINDS:
        from mm_core.config.job_check import check_job_document

        return check_job_document(document, manager)
    return check_document(document, kind, manager, label=path)


def check_document(
    document: Document, kind: Kind, manager: PluginManager, *, label: str, load: str | None = None
) -> tuple[Finding, ...]:
    """Return the findings of one file of a known kind, or of one section of a job file, by itself.

    Args:
        label: what its top level is called.
        load: where the predictor's weights are, if not in the file.
    """
    if kind is Kind.INFERENCE:
        return check_generation_file(document, manager=manager)
    assembly = Assembly(manager)
    if kind is Kind.TRANSFORMERS:
        assembly.attempt(lambda: _check_transformers(document, assembly, load))
        return sort_findings(assembly.findings)
    assembly.findings += check_section(CLASSES[kind], document, label=label).findings
    if kind is Kind.MODEL:
        assembly.attempt(lambda: _check_model(document, assembly, load))
    elif kind is Kind.DATA:
        assembly.attempt(lambda: _check_data(document, assembly))
    return sort_findings(assembly.findings)


def _check_transformers(document: Document, assembly: Assembly, load: str | None) -> None:
    from mm_core.config.transformers_check import check_transformers_model  # few files are of this kind

    assembly.select(document)
    draft = check_transformers_model(document, assembly, load=load)
    assembly.activate(draft.parts, document)


def _check_data(document: Document, assembly: Assembly) -> None:
    assembly.select(None)
    part, findings = find_part(document, "dataset", "dataset", ("dataset_param",), "dataset_type")
    assembly.findings += findings
    _build([part] if part else [], document, assembly)
    for *path, what in _DATA_PATHS:
        assembly.findings += cross.check_path(document, ("dataset_param", *path), what, "note")


def _check_model(document: Document, assembly: Assembly, load: str | None) -> None:
    assembly.select(document)
    written = document
    document, sections = with_second_expert(document)
    parts, findings = find_parts(document, sections)
    assembly.findings += findings
    task = document.data.get("task_id", ModelConfig.model_fields["task_id"].default)
    if isinstance(task, str) and task:
        _, findings = resolve(
            Part("task", "task", ("task_id",), ("task_id",), task), document, assembly.manager
        )
        assembly.findings += findings
    _build(parts, document, assembly, find_callbacks(document), load)
    assembly.findings = without_repeated(assembly.findings, written)


def _build(
    parts: list[Part],
    document: Document,
    assembly: Assembly,
    callbacks: Sequence[Part] = (),
    load: str | None = None,
) -> None:
    parts = assembly.resolve_all(parts, document)
    callbacks = assembly.resolve_all(callbacks, document)
    assembly.activate([*parts, *callbacks], document)
    document, components = assembly.build(parts, document)
    assembly.findings += cross.check_folders(components.values(), document, "note")
    weighted = {name: part for name, part in components.items() if part.role in WITH_WEIGHTS}
    assembly.findings += cross.check_weights(weighted, document, load=load, level="note")
    assembly.findings += cross.check_channels(components, document)
    if "predictor" in components:
        assembly.findings += cross.check_conditions(components, document, level="note")
    assembly.findings += cross.check_layers(components, document)
    assembly.findings += check_both_experts(components, document)
    assembly.findings += cross.check_data_files(document, "note")
