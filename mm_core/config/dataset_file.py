"""The dataset that a file of a job names, for commands that look at data without training."""

from __future__ import annotations

from dataclasses import dataclass

from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.data import DataConfig
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, has_errors
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.job_file import from_document, missing_file, read_section
from mm_core.config.kinds import JOB_KINDS, Kind, detect_kind, without_schema
from mm_core.config.parts import find_part
from mm_core.config.section import check_section
from mm_registry import PluginManager, default_manager


@dataclass(frozen=True)
class DatasetOfFile:
    """A dataset's section and how it is dealt.

    Attributes:
        component: the section, checked.
        data: the whole data file.
        seed, micro_batch_size: what the flags of a job file say; None where there are none.
        findings: notes and warnings.
    """

    component: ComponentConfig
    data: DataConfig
    seed: int | None = None
    micro_batch_size: int | None = None
    findings: tuple[Finding, ...] = ()


def read_dataset_file(path: str, manager: PluginManager | None = None) -> DatasetOfFile:
    """Read `data.json`, or the data of a job file.

    Raises:
        ConfigError: the file cannot be read, is of another kind, or something in the dataset's section is wrong.
    """
    manager = manager or default_manager()
    document = without_schema(read_document(path))
    kind = detect_kind(document)
    seed = micro_batch_size = None
    findings: list[Finding] = []
    if kind in JOB_KINDS:
        flags, found = read_command_line((), from_document(document))
        findings += found
        if (missing := missing_file(flags, "data")) is not None:
            raise ConfigError([*findings, missing])
        section, found = read_section(flags, "data", Kind.DATA)
        findings += found
        if section is None:
            raise ConfigError(findings)
        document, seed, micro_batch_size = section, flags.seed, flags.micro_batch_size
    elif kind is not Kind.DATA:
        what = f"this is a {kind} by its keys" if kind else "none of its keys is one of a data file"
        mend = "Give data.json, a job file, or annotations"
        raise ConfigError([Finding("error", "wrong-file", what, path, suggestion=mend)])
    component, data, found = _checked(document, manager, label=path)
    return DatasetOfFile(component, data, seed, micro_batch_size, (*findings, *found))


def _checked(
    document: Document, manager: PluginManager, *, label: str
) -> tuple[ComponentConfig, DataConfig, list[Finding]]:
    assembly = Assembly(manager)
    checked = check_section(DataConfig, document, label=label)
    assembly.findings += checked.findings
    assembly.select(None)
    part, found = find_part(document, "dataset", "dataset", ("dataset_param",), "dataset_type")
    assembly.findings += found
    parts = assembly.resolve_all([part] if part else [], document)
    assembly.activate(parts, document)
    _, components = assembly.build(parts, document)
    if has_errors(assembly.findings) or checked.section is None or "dataset" not in components:
        raise ConfigError(assembly.findings)
    return components["dataset"], checked.section, assembly.findings
