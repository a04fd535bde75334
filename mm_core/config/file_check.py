"""Checking one file by itself: what it is, is told by its keys."""

from __future__ import annotations

from collections.abc import Sequence

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly
from mm_core.config.component import WITH_WEIGHTS
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, sort_findings
from mm_core.config.generation_job import check_generation_file
from mm_core.config.kinds import CLASSES, Kind, detect_kind, unsupported, without_schema
from mm_core.config.model import COMPONENT_SECTIONS, ModelConfig
from mm_core.config.parts import Part, find_callbacks, find_part, find_parts, resolve
from mm_core.config.section import check_section
from mm_registry import PluginManager, default_manager


def check_file(path: str, *, manager: PluginManager | None = None) -> tuple[Finding, ...]:
    """Return the findings of one file. Folders of weights and data that do not exist are notes: the file may
    be for elsewhere.
    """
    try:
        document = without_schema(read_document(path))
    except ConfigError as error:
        return error.findings
    kind = detect_kind(document)
    if kind is None:
        known = ", ".join(CLASSES)
        message = "none of its keys is known, so it cannot be told what it configures"
        return (Finding("error", "unknown-file", message, path, 1, 1, suggestion=f"Known are: {known}"),)
    refused = unsupported(document, kind)
    if refused is not None:
        return (refused,)
    manager = manager or default_manager()
    if kind is Kind.INFERENCE:
        return check_generation_file(document, manager=manager)
    assembly = Assembly(manager)
    assembly.findings += check_section(CLASSES[kind], document, label=path).findings
    if kind is Kind.MODEL:
        assembly.attempt(lambda: _check_model(document, assembly))
    elif kind is Kind.DATA:
        assembly.attempt(lambda: _check_data(document, assembly))
    return sort_findings(assembly.findings)


def _check_data(document: Document, assembly: Assembly) -> None:
    assembly.select(None)
    part, findings = find_part(document, "dataset", "dataset", ("dataset_param",), "dataset_type")
    assembly.findings += findings
    _build([part] if part else [], document, assembly)


def _check_model(document: Document, assembly: Assembly) -> None:
    assembly.select(document)
    parts, findings = find_parts(document, [(name, name) for name in COMPONENT_SECTIONS])
    assembly.findings += findings
    task = document.data.get("task_id", ModelConfig.model_fields["task_id"].default)
    if isinstance(task, str) and task:
        _, findings = resolve(
            Part("task", "task", ("task_id",), ("task_id",), task), document, assembly.manager
        )
        assembly.findings += findings
    _build(parts, document, assembly, find_callbacks(document))


def _build(parts: list[Part], document: Document, assembly: Assembly, callbacks: Sequence[Part] = ()) -> None:
    parts = assembly.resolve_all(parts, document)
    callbacks = assembly.resolve_all(callbacks, document)
    assembly.activate([*parts, *callbacks], document)
    document, components = assembly.build(parts, document)
    assembly.findings += cross.check_folders(components.values(), document, "note")
    weighted = {name: part for name, part in components.items() if part.role in WITH_WEIGHTS}
    assembly.findings += cross.check_weights(weighted, document, load=None, level="note")
    assembly.findings += cross.check_channels(components, document)
