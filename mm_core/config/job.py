"""A training job: from flags and files to checked components (read, resolve, check, overwrite, check
again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly, used_plugins
from mm_core.config.component import WITHOUT_SECTION, ComponentConfig
from mm_core.config.data import DataConfig
from mm_core.config.document import Document, link_notes
from mm_core.config.filled import with_precision, with_recomputation
from mm_core.config.findings import (
    ConfigError,
    Finding,
    has_errors,
    sort_findings,
    unavailable_is_error,
)
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.flag_table import LaunchFlags
from mm_core.config.flags import TrainFlags, flag_name, required_flags, world_size
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.job_file import read_section
from mm_core.config.kinds import Kind, detect_kind
from mm_core.config.lora import LoraConfig, weights_given, with_lora
from mm_core.config.loss_flags import with_loss_flags
from mm_core.config.machine import check_surroundings
from mm_core.config.model import COMPONENT_SECTIONS, ModelConfig
from mm_core.config.origin import KeyPath
from mm_core.config.overrides import FLAG_OF, SECTIONS
from mm_core.config.parallel import EXPERTS_KEY, ParallelSizes, with_expert_flag
from mm_core.config.parts import Part, find_callbacks, find_part, find_parts
from mm_core.config.resolved import component_values, legacy_paths, origins_of, place, plain
from mm_core.config.sample_videos import check_sample_flags, read_samples
from mm_core.config.second_expert import (
    SECOND,
    check_both_experts,
    check_idle,
    with_second_expert,
    without_repeated,
)
from mm_core.config.section import check_section
from mm_core.config.tools import ToolsConfig
from mm_core.config.transformers_model import TransformersModelConfig
from mm_registry import PluginManager, default_manager

if TYPE_CHECKING:
    from mm_core.config.generation_job import GenerationJob
    from mm_core.config.overwrite import Overwrite
    from mm_registry.hooks import ActiveHooks
    from mm_registry.spec import EntrySpec

M = TypeVar("M", bound=BaseModel)
_EMPTY = Document.from_data({})


@dataclass(frozen=True)
class TrainingJob:
    """A training job without an error.

    Attributes:
        model, data, tools, fsdp2: the files, validated; sections as hooks left them.
        flags: with the default global batch filled in.
        components: `diffusion`, `predictor`, `ae`, `text_encoder` (or `text_encoder.0`, …), or `model` of the
            transformers library; `dataset`, `task`.
        callbacks: the entries that `callbacks` of the model file names, in its order.
        findings: notes and warnings.
        plugins: (distribution, version) of everything in use.
        hooks: activated hooks of those.
        overwrites: what hooks changed.
        documents: the files as read and patched: `model`, `data`, `tools`, `fsdp2`.
        samples: the inference file of the videos that are made while it trains.
    """

    model: ModelConfig | TransformersModelConfig
    data: DataConfig
    tools: ToolsConfig
    fsdp2: Fsdp2Config
    flags: TrainFlags
    components: Mapping[str, ComponentConfig]
    callbacks: tuple[EntrySpec, ...]
    findings: tuple[Finding, ...]
    plugins: tuple[tuple[str, str], ...]
    hooks: ActiveHooks
    overwrites: tuple[Overwrite, ...]
    documents: Mapping[str, Document] = field(repr=False)
    samples: GenerationJob | None = field(default=None, repr=False)

    @property
    def parallel(self) -> ParallelSizes:
        """How many ranks share one model."""
        return parallel_sizes(self.flags, self.fsdp2, self.documents.get("model"))

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that are trained; None: the weights themselves are."""
        return next((c.lora for c in self.components.values() if c.lora is not None), None)

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration, JSON-able.

        `values` has every value, defaults included, and is the same on every rank; `origins` says for each
        leaf where it was written; `overwrites`, `plugins`, `findings` and `launch` (flags that differ
        between machines) complete it.
        """
        model, data = plain(self.model), plain(self.data)
        for component in self.components.values():
            if component.role == "dataset":
                place(data, component.path, component_values(component, "dataset_type"))
            elif component.role == "transformers_model":
                model |= plain(component.fields)
            elif component.role not in WITHOUT_SECTION:
                place(model, component.path, component_values(component))
        flags = plain(self.flags)
        launch = {name: flags.pop(name) for name in LaunchFlags.model_fields}
        files = {"model": model, "data": data, "tools": plain(self.tools), "fsdp2": plain(self.fsdp2)}
        origins = {f"flags.{name}": str(self.flags.origin(name)) for name in TrainFlags.model_fields}
        tops: dict[str, BaseModel | None] = {
            "model": self.model, "data": self.data, "tools": self.tools, "fsdp2": self.fsdp2,
        }  # fmt: skip
        for name, values in files.items():
            document, top = self.documents.get(name, _EMPTY), tops[name]
            own = [c for c in self.components.values() if (c.role == "dataset") == (name == "data")]
            legacy = legacy_paths(type(top), own, document) if top is not None else {}
            origins |= origins_of(name, values, document, legacy)
        return {
            "values": {**files, "flags": flags},
            "launch": launch,
            "origins": origins,
            "overwrites": [overwrite.to_dict() for overwrite in self.overwrites],
            "plugins": [{"distribution": name, "version": version} for name, version in self.plugins],
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass
class TrainingDraft:
    """A job while it is being checked; what could not be made stays None."""

    flags: TrainFlags
    documents: dict[str, Document]
    model: ModelConfig | TransformersModelConfig | None = None
    data: DataConfig | None = None
    tools: ToolsConfig | None = None
    fsdp2: Fsdp2Config | None = None
    components: dict[str, ComponentConfig] = field(default_factory=dict)
    callbacks: tuple[EntrySpec, ...] = ()
    samples: GenerationJob | None = None


def load_training_job(flags: TrainFlags, *, manager: PluginManager | None = None) -> TrainingJob:
    """Read, resolve, check and merge a job. Imports no torch.

    Raises:
        ConfigError: with everything that is wrong with flags and files.
    """
    assembly = Assembly(manager or default_manager())
    draft = draft_training_job(flags, assembly, to_run=True)
    findings = sort_findings(unavailable_is_error(assembly.findings), file_order(flags))
    if has_errors(findings):
        raise ConfigError(findings)
    assert draft.model is not None
    assert draft.data is not None
    assert draft.tools is not None
    assert draft.fsdp2 is not None
    return TrainingJob(
        draft.model,
        draft.data,
        draft.tools,
        draft.fsdp2,
        draft.flags,
        draft.components,
        draft.callbacks,
        findings,
        used_plugins(draft.components.values(), assembly.hooks, draft.callbacks),
        assembly.hooks,
        tuple(assembly.overwrites),
        draft.documents,
        draft.samples,
    )


def check_training_job(flags: TrainFlags, *, manager: PluginManager | None = None) -> tuple[Finding, ...]:
    """Return the findings of a job, which need not be complete: files that no flag names are not asked
    for.
    """
    assembly = Assembly(manager or default_manager(), [*link_notes(*file_order(flags))])
    assembly.attempt(lambda: draft_training_job(flags, assembly, to_run=False))
    return sort_findings(unavailable_is_error(assembly.findings), file_order(flags))


def check_command_line(argv: Sequence[str], *, manager: PluginManager | None = None) -> tuple[Finding, ...]:
    """Return the findings of the job that a command line of `mm train` says. A wrong flag hides nothing of its files."""
    flags, findings = read_command_line(argv)
    found = check_training_job(flags, manager=manager)
    return sort_findings([*findings, *found], file_order(flags)) if has_errors(findings) else found


def parallel_sizes(flags: TrainFlags, fsdp2: Fsdp2Config | None, model: Document | None) -> ParallelSizes:
    """Return how many ranks share one model, as the flags and the files of a checked job say."""
    path: KeyPath = ("predictor", "pipeline_num_layers")
    layers = model.value(path) if model is not None and model.has(path) else None
    return ParallelSizes.of(flags, fsdp2, layers)


def file_order(flags: TrainFlags) -> tuple[str | None, ...]:
    """Return the order in which findings are told: flags, then the files."""
    return (None, flags.job_file, *(flags.source(name) for name in SECTIONS))


def draft_training_job(flags: TrainFlags, assembly: Assembly, *, to_run: bool) -> TrainingDraft:
    """Read, resolve, check and merge as far as the files allow; findings go to `assembly`.

    Args:
        to_run: whether what a run needs, and a check does not, is asked for.
    """
    assembly.findings += [*flags.findings, *check_surroundings(flags, to_run=to_run)]
    ranks = world_size(flags)
    sizes = ParallelSizes.of(flags)
    # What the ranks cannot be dealt to is said by `check_ranks`, which needs no global batch then.
    data_parallel = ranks // sizes.together if ranks % sizes.together == 0 else 1
    draft = TrainingDraft(flags.with_global_batch(data_parallel), {})
    if to_run:
        assembly.findings += required_flags(flags)
    # Every file is read before anything is checked: a syntax error in one must not hide those of the others.
    model = _read(draft, assembly, "model", Kind.MODEL, required=to_run)
    data = _read(draft, assembly, "data", Kind.DATA, required=to_run)
    tools = _read(draft, assembly, "tools", Kind.TOOLS)
    fsdp2 = _read(draft, assembly, "fsdp2", Kind.FSDP2)
    written = fsdp2
    if fsdp2 is not None:
        fsdp2, found = with_expert_flag(fsdp2, flags)
        draft.documents["fsdp2"] = fsdp2
        assembly.findings += found
    assembly.select(model)
    networks: list[Part] = []
    if model is not None:
        language = detect_kind(model) is Kind.TRANSFORMERS
        draft.documents["model"], found = with_loss_flags(model, draft.flags, language=language)
        model = draft.documents["model"]
        assembly.findings += found
    if model is not None and detect_kind(model) is Kind.TRANSFORMERS:
        from mm_core.config.transformers_check import check_transformers_model  # few jobs are of this kind

        found_model = check_transformers_model(
            model, assembly, "error", load=weights_given(flags), weights="error" if to_run else "note"
        )
        draft.model, draft.components = found_model.section, found_model.components
        draft.callbacks, networks = found_model.callbacks, found_model.parts
        model = None  # the rest is about the parts of a diffusion model
    written_model = model
    if model is not None:
        model, _ = with_second_expert(model)
    parts, data_parts = _find(assembly, model, data)
    parts = assembly.resolve_all(parts, model) if model else []
    data_parts = assembly.resolve_all(data_parts, data) if data else []
    callbacks = assembly.resolve_all(find_callbacks(model), model) if model else []
    if model is not None:
        draft.callbacks = tuple(part.spec for part in callbacks if part.spec is not None)
        draft.model = _check(assembly, ModelConfig, written_model, draft, "model")
    draft.data = _check(assembly, DataConfig, data, draft, "data")
    draft.tools = _check(assembly, ToolsConfig, tools, draft, "tools")
    draft.fsdp2 = _check(assembly, Fsdp2Config, fsdp2, draft, "fsdp2")
    if draft.fsdp2 is not None and fsdp2 is not written:
        size = draft.fsdp2.expert_parallel_size
        draft.fsdp2 = draft.fsdp2.filled({EXPERTS_KEY: size}, flags.spelling("expert_model_parallel_size"))
    assembly.activate([*networks, *parts, *data_parts, *callbacks], draft.documents.get("model") or _EMPTY)
    if model is not None:
        model, components = assembly.build([part for part in parts if part.role != "task"], model)
        assembly.findings = without_repeated(assembly.findings, written_model)
        draft.documents["model"], draft.components = model, components
        if isinstance(draft.model, ModelConfig):
            draft.model = draft.model.model_copy(
                update={
                    name: model.data[name] for name in (*COMPONENT_SECTIONS, SECOND) if name in model.data
                }
            )
    if data is not None:
        data, components = assembly.build(data_parts, data)
        draft.documents["data"] = data
        draft.components |= components
        if draft.data is not None:
            draft.data = draft.data.model_copy(update={"dataset_param": data.data["dataset_param"]})
    for part in parts:
        if part.role == "task" and part.spec is not None:
            draft.components["task"] = ComponentConfig("task", part.id, part.spec, path=part.path)
    assembly.findings += [*_cross_checks(draft, ranks, to_run=to_run), *check_sample_flags(draft.flags)]
    if flags.sample_config is not None and draft.components:
        draft.samples, found = read_samples(draft.flags, draft.components, assembly.manager)
        assembly.findings += found
    draft.components = {n: c for n, c in draft.components.items() if not cross.is_loaded(n, draft.model)}
    return draft


def _read(
    draft: TrainingDraft, assembly: Assembly, name: str, kind: Kind, *, required: bool = False
) -> Document | None:
    read = assembly.attempt(lambda: read_section(draft.flags, name, kind))
    if read is None:
        return None
    document, findings = read
    assembly.findings += findings
    if document is not None:
        draft.documents[name] = document
        return document
    if required:
        flag = FLAG_OF[name]
        inside = f', or "{name}" to {draft.flags.job_file}' if draft.flags.job_file else ""
        text, mend = f"it is required: the {kind} of the job", f"Add {flag_name(flag)} FILE{inside}"
        assembly.findings.append(draft.flags.finding(flag, "missing-flag", text, mend))
    draft.documents[name] = _EMPTY
    return None if name in ("model", "data") else _EMPTY


def _check(
    assembly: Assembly, cls: type[M], document: Document | None, draft: TrainingDraft, name: str
) -> M | None:
    if document is None:
        return None
    label = name if name in draft.flags.sections else document.path or name
    checked = check_section(cls, document, label=label)
    assembly.findings += checked.findings
    return checked.section


def _find(assembly: Assembly, model: Document | None, data: Document | None) -> tuple[list[Part], list[Part]]:
    parts: list[Part] = []
    data_parts: list[Part] = []
    if model is not None:
        parts, findings = find_parts(model, with_second_expert(model)[1])
        assembly.findings += findings
        task = model.data.get("task_id", ModelConfig.model_fields["task_id"].default)
        if isinstance(task, str) and task:
            place_of_id: KeyPath = ("task_id",)
            parts.append(Part("task", "task", place_of_id, place_of_id, task))
    if data is not None:
        part, findings = find_part(data, "dataset", "dataset", ("dataset_param",), "dataset_type")
        assembly.findings += findings
        if part is not None:
            data_parts.append(part)
    return parts, data_parts


def _cross_checks(draft: TrainingDraft, ranks: int, *, to_run: bool) -> list[Finding]:
    flags, model, data = draft.flags, draft.documents.get("model"), draft.documents.get("data")
    findings = list(cross.check_load(flags))
    if model is not None:
        models = {
            name: c for name, c in draft.components.items() if c.role not in {"dataset", *WITHOUT_SECTION}
        }
        built = {name: c for name, c in models.items() if not cross.is_loaded(name, draft.model)}
        findings += cross.check_folders(built.values(), model)
        findings += cross.check_weights(
            built, model, load=weights_given(flags), level="error" if to_run else "note"
        )
        findings += cross.check_channels(models, model)
        findings += cross.check_conditions(models, model, data)
        findings += cross.check_layers(models, model, flags)
        findings += check_both_experts(models, model, flags)
        findings += cross.check_encode_ahead(model, flags)
        place = ("dataset_param", "tokenizer_config", "model_max_length")
        dataset = draft.components.get("dataset")
        if dataset is not None and data is not None:
            findings += cross.check_clip_size(models, dataset, data)
        tokens = dataset.fields.get("tokenizer_config", {}).get("model_max_length") if dataset else None
        findings += cross.check_text(models, model, tokens, data or _EMPTY, place)
        if isinstance(draft.model, ModelConfig) and data is not None:
            findings += cross.check_features(draft.model, model, data, draft.components)
    if data is not None:
        for key in ("data_path", "val_data_path"):
            findings += cross.check_path(data, ("dataset_param", "basic_parameters", key), "file")
        findings += cross.check_data_files(data)
        findings += cross.check_groups(draft.components.get("dataset"), data)
        findings += cross.check_sequence_length(draft.components.get("dataset"), data, flags)
        if not cross.is_loaded("text_encoder", draft.model):
            place = ("dataset_param", "tokenizer_config", "from_pretrained")
            findings += cross.check_path(data, place, "folder")
    findings += cross.check_validation(draft.components.get("dataset"), flags)
    if draft.fsdp2 is not None:
        findings += check_idle(draft.components, draft.fsdp2, draft.documents["fsdp2"])
        draft.fsdp2, found = with_precision(draft, draft.fsdp2)
        findings += found
        draft.fsdp2, found = with_recomputation(draft, draft.fsdp2)
        findings += found
        sharding = draft.documents.get("fsdp2")
        draft.components, found = with_lora(draft.components, flags, model, draft.fsdp2, sharding)
        findings += found
        # A check that does not say how many ranks there will be is not asked to divide by them.
        known = to_run or flags.nproc_per_node is not None or ranks > 1
        if draft.tools is not None and known:
            findings += cross.check_ranks(flags, draft.fsdp2, draft.documents["fsdp2"], draft.tools, ranks)
    return findings
