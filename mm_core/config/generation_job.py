"""A generation job: from an inference file and overrides to checked components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly, used_plugins
from mm_core.config.component import WITH_WEIGHTS, ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import (
    ConfigError,
    Finding,
    Level,
    has_errors,
    sort_findings,
    unavailable_is_error,
)
from mm_core.config.given_frames import Images, check_conditions_made, check_given_frames, read_images
from mm_core.config.inference import InferenceConfig
from mm_core.config.kinds import Kind, read_kind
from mm_core.config.model import COMPONENT_SECTIONS
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.parts import Part, config_class, find_parts
from mm_core.config.prompts import read_prompts
from mm_core.config.resolved import component_values, legacy_paths, origins_of, place, plain
from mm_core.config.second_expert import with_second_expert
from mm_core.config.secrets import without_secrets
from mm_core.config.section import check_section
from mm_core.config.tokenizer import TokenizerConfig
from mm_registry import PluginManager, RegistryError, default_manager

if TYPE_CHECKING:
    from mm_core.config.overwrite import Overwrite
    from mm_registry.hooks import ActiveHooks

#: Keys of the top level that belong to the pipeline as much as those of pipeline_config.
PIPELINE_KEYS = ("boundary_ratio", "negative_prompt", "use_prompt_preprocess")
_PIPELINE: KeyPath = ("pipeline_config",)


@dataclass(frozen=True)
class GenerationJob:
    """A generation job without an error.

    Attributes:
        model: the top level of the file, overrides applied.
        components: `pipeline`, `predictor`, `low_noise_predictor` (if there is a second expert), `ae`,
            `text_encoder` (or `text_encoder.0`, …), `diffusion`. The pipeline's fields are pipeline_config
            and the keys in `PIPELINE_KEYS` that its config class declares.
        prompts: one for each video to make.
        images: files of their first and last frames, if there are any.
        tokenizer: settings of the tokenizer.
        load: run, checkpoint or folder with the predictor's weights, or two, of both experts; or None.
        findings, plugins, hooks, overwrites: as in a training job.
        document: the file as read, with overrides and patches.
        source: the file as read, with overrides alone: what makes the same job again.
    """

    model: InferenceConfig
    components: Mapping[str, ComponentConfig]
    prompts: tuple[str, ...]
    images: Images
    tokenizer: TokenizerConfig
    load: str | list[str] | None
    findings: tuple[Finding, ...]
    plugins: tuple[tuple[str, str], ...]
    hooks: ActiveHooks
    overwrites: tuple[Overwrite, ...]
    document: Document = field(repr=False)
    source: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration, JSON-able: every value, where it was written, and what hooks
        changed.
        """
        values = plain(self.model)
        for component in self.components.values():
            if component.role == "pipeline":
                settings = component_values(component)
                settings.pop("model_id")
                values["pipeline_config"] = settings
            else:
                place(values, component.path, component_values(component))
        legacy = legacy_paths(type(self.model), self.components.values(), self.document)
        return {
            "values": values,
            "origins": origins_of("model", values, self.document, legacy),
            "overwrites": [overwrite.to_dict() for overwrite in self.overwrites],
            "plugins": [{"distribution": name, "version": version} for name, version in self.plugins],
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass
class GenerationDraft:
    document: Document
    model: InferenceConfig | None = None
    components: dict[str, ComponentConfig] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    images: Images = field(default_factory=Images)


def load_generation_job(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, manager: PluginManager | None = None
) -> GenerationJob:
    """Read, resolve, check and merge an inference file. Imports no torch.

    Args:
        overrides: dotted path -> value from the command line, such as `{"prompt": "a cat",
            "pipeline_config.seed": 1}`. They replace what the file says; None values are left out. `load`
            is a run or checkpoint with the predictor's weights.

    Raises:
        ConfigError: with everything that is wrong.
    """
    assembly = Assembly(manager or default_manager())
    return _job(_override(read_kind(str(path), Kind.INFERENCE), overrides or {}), assembly)


def repeated_generation_job(
    source: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    manager: PluginManager | None = None,
) -> GenerationJob:
    """Check an inference file again that was stored with a video, as `GenerationJob.source`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    return _job(
        _override(Document.from_data(source), overrides or {}), Assembly(manager or default_manager())
    )


def generation_job_of(document: Document, *, manager: PluginManager | None = None) -> GenerationJob:
    """Check an inference file that was read already, and perhaps changed.

    Raises:
        ConfigError: with everything that is wrong.
    """
    return _job(document, Assembly(manager or default_manager()))


def _job(document: Document, assembly: Assembly) -> GenerationJob:
    draft = draft_generation_job(document, assembly, to_run=True)
    findings = sort_findings(unavailable_is_error(assembly.findings))
    if has_errors(findings):
        raise ConfigError(findings)
    assert draft.model is not None
    return GenerationJob(
        draft.model,
        draft.components,
        draft.prompts,
        draft.images,
        draft.model.tokenizer,
        draft.model.load,
        findings,
        used_plugins(draft.components.values(), assembly.hooks),
        assembly.hooks,
        tuple(assembly.overwrites),
        draft.document,
        without_secrets(document.data),
    )


def check_generation_file(document: Document, *, manager: PluginManager | None = None) -> tuple[Finding, ...]:
    """Return the findings of an inference file that is looked at by itself: missing paths are notes."""
    assembly = Assembly(manager or default_manager())
    assembly.attempt(lambda: draft_generation_job(document, assembly, to_run=False))
    return sort_findings(assembly.findings)


def _override(document: Document, overrides: Mapping[str, Any]) -> Document:
    findings = []
    for key, value in overrides.items():
        if value is None:
            continue
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        flag = "--" + key.replace("_", "-")
        try:
            document = document.replaced(path, value, Origin("flag", detail=flag))
        except (KeyError, TypeError, IndexError):
            text = f"the file has no object {dotted(path[:-1])}, so nothing can be set in it"
            findings.append(Finding("error", "unknown-key", text, path=flag))
    if findings:
        raise ConfigError(findings)
    return document


def draft_generation_job(document: Document, assembly: Assembly, *, to_run: bool) -> GenerationDraft:
    """Resolve, check and merge an inference file as far as it allows; findings go to `assembly`."""
    checked = check_section(InferenceConfig, document, label=document.path or "the inference file")
    assembly.findings += checked.findings
    copied = isinstance(document.data.get("low_noise_predictor"), str)
    assembly.select(document)
    document, sections = with_second_expert(document)
    parts, findings = find_parts(document, sections)
    assembly.findings += findings
    pipeline = document.data.get("pipeline_class")
    if isinstance(pipeline, str) and pipeline:
        parts.insert(0, Part("pipeline", "pipeline", _PIPELINE, ("pipeline_class",), pipeline))
    parts = assembly.resolve_all(parts, document)
    draft = GenerationDraft(document, checked.section)
    assembly.activate(parts, document)
    merged = _with_pipeline_keys(document, parts, assembly)
    if isinstance(merged.data.get("pipeline_config"), Mapping):
        merged, draft.components = assembly.build(parts, merged)
    if copied:  # what holds for the first expert's section was said there
        assembly.findings = [f for f in assembly.findings if not f.path.startswith("low_noise_predictor.")]
    assembly.findings = [_at_top_level(finding, document) for finding in assembly.findings]
    draft.document = merged
    if draft.model is not None:
        draft.model = draft.model.model_copy(update={name: merged.data[name] for name in COMPONENT_SECTIONS})
        draft.components = _with_dtype(draft.components, draft.model.dtype)
    assembly.findings += _cross_checks(draft, to_run=to_run)
    found = _read_inputs(draft, to_run=to_run)
    assembly.findings += found if to_run else [_as_note(finding) for finding in found]
    return draft


def _read_inputs(draft: GenerationDraft, *, to_run: bool) -> list[Finding]:
    """Read the prompts and the names of the images, as many of each as there are videos."""
    if draft.model is None:
        return []
    document = draft.document
    findings: list[Finding] = []
    if draft.model.prompt is not None:
        draft.prompts, findings = read_prompts(draft.model.prompt, document)
    elif to_run:
        mend = 'Add --prompt "…"'
        findings.append(
            Finding("error", "no-prompt", "there is no prompt", document.path, path="prompt", suggestion=mend)
        )
    draft.images, inputs, wrong = read_images(document, len(draft.prompts))
    if len(draft.prompts) == 1:
        draft.prompts *= inputs
    return findings + wrong


def _with_pipeline_keys(document: Document, parts: Iterable[Part], assembly: Assembly) -> Document:
    """Put the pipeline's keys of the top level beside those of pipeline_config, if the pipeline declares
    them.
    """
    part = next((part for part in parts if part.role == "pipeline"), None)
    if part is None:
        return document
    settings = document.data.get("pipeline_config")
    if settings is None and "pipeline_config" not in document.data:
        document = document.replaced(_PIPELINE, {}, document.origin(()))
    elif not isinstance(settings, Mapping):
        return document
    try:
        cls = config_class(part, assembly.manager)
    except RegistryError:
        return document  # said when the section is checked
    for key in PIPELINE_KEYS:
        path = (*_PIPELINE, key)
        if key in document.data and cls is not None and key in cls.model_fields and not document.has(path):
            value = document.data[key]
            if value is not None:
                document = document.replaced(path, value, document.origin((key,)))
    return document


def _with_dtype(components: Mapping[str, ComponentConfig], dtype: str | None) -> dict[str, ComponentConfig]:
    """Give components with weights the file's dtype where their section says none."""
    return {
        name: replace(component, dtype=component.dtype or dtype)
        if component.role in WITH_WEIGHTS
        else component
        for name, component in components.items()
    }


def _cross_checks(draft: GenerationDraft, *, to_run: bool) -> list[Finding]:
    level: Level = "error" if to_run else "note"
    document = draft.document
    load, boundary = document.data.get("load"), document.data.get("boundary_ratio")
    second = document.data.get("low_noise_predictor")
    findings = list(cross.check_folders(draft.components.values(), document, level))
    findings += cross.check_weights(
        draft.components, document, load=load, level=level, loaded=("predictor", "low_noise_predictor")
    )
    findings += cross.check_channels(draft.components, document)
    findings += cross.check_video_size(draft.components, document)
    findings += cross.check_sampler(draft.components, document)
    tokens = draft.model.tokenizer.model_max_length if draft.model else None
    place = ("tokenizer", "model_max_length")
    findings += cross.check_text(draft.components, document, tokens, document, place)
    findings += cross.check_path(document, ("tokenizer", "from_pretrained"), "folder", level)
    places: list[KeyPath] = [("load", 0), ("load", 1)] if isinstance(load, list) else [("load",)]
    for each in places:
        findings += cross.check_path(document, each, "folder or file", level)
    if draft.model is not None and "predictor" in draft.components:
        predictor = draft.components["predictor"]
        findings += check_given_frames(predictor, document, draft.model.task, level)
        findings += check_conditions_made(draft.components, document, level)
    if (boundary is None) != (second is None):
        given, wanted = "low_noise_predictor", "boundary_ratio"
        if second is None:
            given, wanted = wanted, given
        text = f'"{given}" is given without "{wanted}": two experts need both'
        origin = document.key_origin((given,))
        findings.append(Finding.at(origin, "error", "missing-key", text, path=(given,)))
    return findings


def _at_top_level(finding: Finding, document: Document) -> Finding:
    """Name a key that was lent to the pipeline as it is written, so that it is not complained about twice."""
    section, _, key = finding.path.partition(".")
    lent = section == _PIPELINE[0] and key in PIPELINE_KEYS and not document.has((*_PIPELINE, key))
    return replace(finding, path=key) if lent else finding


def _as_note(finding: Finding) -> Finding:
    return replace(finding, level="note")
