"""Several files on one command line: how those that form one job fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, sort_findings
from mm_core.config.kinds import Kind, detect_kind, without_schema
from mm_core.config.parts import find_part, find_parts
from mm_registry import PluginManager, default_manager

#: Sections that cross checks between files look at.
_MODEL = ("diffusion", "predictor", "ae", "text_encoder")
_MOST_MODELS = 2  # a high-noise and a low-noise expert


@dataclass
class _Job:
    models: list[Document] = field(default_factory=list)
    data: list[Document] = field(default_factory=list)
    inference: list[Document] = field(default_factory=list)

    @property
    def is_one(self) -> bool:
        """Whether the files can be those of one job: one of each kind, and a model file for each expert."""
        counts = (len(self.models), len(self.data), len(self.inference))
        return counts[0] <= _MOST_MODELS and counts[1] <= 1 and counts[2] <= 1 and sum(counts) > 1


def check_files_together(
    paths: Sequence[str], *, manager: PluginManager | None = None
) -> tuple[Finding, ...]:
    """Return what is wrong between files, each of which `check_file` looks at by itself.

    All of them are one job if there are at most two model files, one data file and one inference file among them; else
    those of one folder are, if that holds for it. Files that cannot be read, and sections with an error, are left out.
    """
    manager = manager or default_manager()
    everything: _Job = _Job()
    folders: dict[Path, _Job] = {}
    for path in dict.fromkeys(paths):
        try:
            document = without_schema(read_document(path))
        except ConfigError:
            continue
        kind = detect_kind(document)
        name = (
            {Kind.MODEL: "models", Kind.DATA: "data", Kind.INFERENCE: "inference"}.get(kind) if kind else None
        )
        if name is not None:
            for job in (everything, folders.setdefault(Path(path).parent, _Job())):
                getattr(job, name).append(document)
    jobs = [everything] if everything.is_one else [job for job in folders.values() if job.is_one]
    return sort_findings(finding for job in jobs for finding in _check(job, manager))


def check_sections_together(model: Document, data: Document, manager: PluginManager) -> tuple[Finding, ...]:
    """Return what is wrong between the model and the data section of one job file, as `check_files_together` does."""
    return tuple(_check(_Job([model], [data]), manager))


def _check(job: _Job, manager: PluginManager) -> list[Finding]:
    findings: list[Finding] = []
    models = [_components(document, manager) for document in job.models]
    for document, components in models:
        for data in job.data:
            findings += _with_data(document, components, data, manager)
    training = [(document, found["diffusion"]) for document, found in models if "diffusion" in found]
    inference, sampler = None, None
    if job.inference:
        inference, components = _components(job.inference[0], manager, ("diffusion",))
        sampler = components.get("diffusion")
    findings += cross.check_experts(training, inference, sampler)
    return findings


def _with_data(
    model: Document, components: dict[str, ComponentConfig], data: Document, manager: PluginManager
) -> list[Finding]:
    assembly = Assembly(manager)
    part, _ = find_part(data, "dataset", "dataset", ("dataset_param",), "dataset_type")
    parts = assembly.resolve_all([part] if part else [], data)
    assembly.activate(parts, data)
    data, datasets = assembly.build(parts, data)
    dataset = datasets.get("dataset")
    if dataset is None:
        return []
    tokens = dataset.fields.get("tokenizer_config", {}).get("model_max_length")
    place = ("dataset_param", "tokenizer_config", "model_max_length")
    return [
        *cross.check_clip_size(components, dataset, data),
        *cross.check_text(components, model, tokens, data, place),
    ]


def _components(
    document: Document, manager: PluginManager, sections: Sequence[str] = _MODEL
) -> tuple[Document, dict[str, ComponentConfig]]:
    """Return the components without an error; what is wrong with the others was said of the file by itself."""
    assembly = Assembly(manager)

    def build() -> tuple[Document, dict[str, ComponentConfig]]:
        assembly.select(document)
        parts, _ = find_parts(document, [(name, name) for name in sections])
        parts = assembly.resolve_all(parts, document)
        assembly.activate(parts, document)
        return assembly.build(parts, document)

    return assembly.attempt(build) or (document, {})
