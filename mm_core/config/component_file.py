"""One component of a model file by itself: what is asked for when weights are to be understood and nothing is run.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, has_errors
from mm_core.config.job_file import from_document
from mm_core.config.kinds import JOB_KINDS, Kind, detect_kind, without_schema
from mm_core.config.parts import check_part, find_part
from mm_registry import PluginManager, default_manager

if TYPE_CHECKING:
    from mm_registry.hooks import ActiveHooks

#: Sections of which a component can be taken, and their roles.
SECTIONS = {"predictor": "predictor", "low_noise_predictor": "predictor", "model": "transformers_model"}


@dataclass(frozen=True)
class LoneComponent:
    """A component, and the hooks that see it when it is built."""

    component: ComponentConfig
    hooks: ActiveHooks


def read_component(path: str, name: str, *, manager: PluginManager | None = None) -> LoneComponent:
    """Read a section of a training file, an inference file or a job file; the rest of the file is not checked. What this
    version cannot run yet is no error here.

    Args:
        name: of `SECTIONS`. A second expert that is only a path, or not there, is the network of the first.

    Raises:
        ConfigError: the file cannot be read, has no such section, or something is wrong with it.
    """
    document = without_schema(read_document(path))
    if detect_kind(document) in JOB_KINDS:
        job = from_document(document)
        if "model" not in job.sections and "mm_model" in job.flags:
            return read_component(str(job.flags["mm_model"].value), name, manager=manager)
        document = job.sections.get("model", document)
    if detect_kind(document) is Kind.TRANSFORMERS:
        name = "model"
    elif name != "predictor" and not isinstance(document.data.get(name), Mapping):
        name = "predictor"
    return _checked(document, name, manager or default_manager(), written=True)


def stored_component(values: Mapping[str, Any], name: str, source: str) -> LoneComponent:
    """Take a section of the model file that a run stored with a checkpoint, as hooks left it.

    Args:
        values: `model` of the stored values.
        source: of the checkpoint, for messages.

    Raises:
        ConfigError: there is no such section, or the installed plugins do not take it.
    """
    document = Document.from_data(values)
    try:
        return _checked(document, name, default_manager(), written=False)
    except ConfigError as error:
        text = f"{source} was written by a job that this installation does not understand: {error}"
        mend = "Install the plugins that it was trained with, or give --mm-model FILE"
        raise ConfigError([Finding("error", "stored-config", text, suggestion=mend)]) from error


def _checked(document: Document, name: str, manager: PluginManager, *, written: bool) -> LoneComponent:
    assembly = Assembly(manager)
    assembly.select(document)
    if name == "model":
        return _network(document, assembly)
    part, found = find_part(document, name, SECTIONS[name], (name,))
    assembly.findings += found
    if part is None and not has_errors(found):
        text, mend = (
            f'there is no section "{name}"',
            "Name the model file of the training job, or that of the pipeline",
        )
        raise ConfigError(
            [Finding("error", "missing-key", text, document.path or None, path=name, suggestion=mend)]
        )
    parts = assembly.resolve_all([part] if part is not None else [], document)
    assembly.activate(parts, document)
    component: ComponentConfig | None = None
    if parts and written:
        component = assembly.build(parts, document)[1].get(name)
    elif parts:  # hooks have filled it already
        component, found = check_part(parts[0], document, manager)
        assembly.findings += found
    if component is None or has_errors(assembly.findings):
        raise ConfigError(assembly.findings)
    return LoneComponent(component, assembly.hooks)


def _network(document: Document, assembly: Assembly) -> LoneComponent:
    """The network of a transformers model's file, whose sections are not all its own."""
    from mm_core.config.transformers_check import NAME, check_transformers_model

    draft = check_transformers_model(document, assembly, "error", load="")  # weights are what is converted
    component = draft.components.get(NAME)
    if component is None or has_errors(assembly.findings):
        raise ConfigError(assembly.findings)
    assembly.activate(draft.parts, document)
    return LoneComponent(component, assembly.hooks)
