"""Where each value of a job comes from, and what hooks made of it: what `mm explain` shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from mm_core.config import generation_job as generation
from mm_core.config import job as training
from mm_core.config.assemble import Assembly
from mm_core.config.document import Document, read_document
from mm_core.config.file_check import check_file
from mm_core.config.findings import (
    ConfigError,
    Finding,
    clip,
    has_errors,
    sort_findings,
)
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.flag_table import AcceptedFlags, RefusedFlags
from mm_core.config.flags import TrainFlags
from mm_core.config.job_file import from_document
from mm_core.config.kinds import CLASSES, JOB_KINDS, Kind, detect_kind, without_schema
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.overrides import FLAG_OF
from mm_core.config.overwrite import Overwrite
from mm_core.config.resolved import LegacyPaths, leaves, legacy_paths, written_at
from mm_registry import PluginManager, default_manager
from mm_registry.suggestions import closest

_NAMES = {"model": Kind.MODEL, "data": Kind.DATA, "tools": Kind.TOOLS, "fsdp2": Kind.FSDP2}
_FLAG_OF = {kind: FLAG_OF[name] for name, kind in _NAMES.items()}
_IDLE_FLAGS = {*AcceptedFlags.model_fields, *RefusedFlags.model_fields}


@dataclass(frozen=True)
class Explained:
    """One value of a job.

    Attributes:
        field: dotted path with the file's name in front: `model.predictor.num_layers`, `flags.lr`. A list of
            plain values is one field.
        value: in effect, JSON-able.
        origin: where it was written.
        overwrites: what hooks wrote at this place, in their order.
    """

    field: str
    value: Any
    origin: Origin
    overwrites: tuple[Overwrite, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able; `origin` has the fields of `Origin` and `text`, as people read it."""
        return {
            "field": self.field,
            "value": self.value,
            "origin": {**asdict(self.origin), "text": str(self.origin)},
            "overwrites": [overwrite.to_dict() for overwrite in self.overwrites],
        }


def explain_flags(flags: TrainFlags, *, manager: PluginManager | None = None) -> tuple[Explained, ...]:
    """Explain a training job, flags included. As for `mm check`, the job need not be complete: files that no
    flag names are left out.

    Raises:
        ConfigError: with all findings, if there is an error among them.
    """
    return tuple(_training(flags, manager or default_manager(), with_flags=True))


def explain_files(paths: Sequence[str], *, manager: PluginManager | None = None) -> tuple[Explained, ...]:
    """Explain files by themselves: those of one training job, at most one of each kind, or one inference file, or one
    job file, with its flags.

    Raises:
        ConfigError: with all findings, if there is an error among them.
    """
    manager = manager or default_manager()
    kinds: dict[Kind, str] = {}
    for path in paths:
        document = without_schema(read_document(path))
        kind = detect_kind(document)
        if kind is None:
            raise ConfigError(check_file(path, manager=manager))
        if kind is Kind.TRANSFORMERS:
            kind = Kind.MODEL  # a job has one of the two
        alone = {Kind.INFERENCE, *JOB_KINDS} & {kind, *kinds}
        other = kinds.get(kind) or (next(iter(kinds.values()), None) if alone else None)
        if other is not None:
            text = f"it cannot be explained together with {other}"
            mend = "Name files of one training job, one of each kind, or one job file, or one inference file"
            raise ConfigError([Finding("error", "too-many-files", text, path, suggestion=mend)])
        kinds[kind] = path
        if kind in JOB_KINDS and len(paths) == 1:
            return tuple(_job_file(document, manager))
    if Kind.INFERENCE in kinds:
        return tuple(_generation(kinds[Kind.INFERENCE], manager))
    flags = TrainFlags.model_validate({_FLAG_OF[kind]: path for kind, path in kinds.items()})
    return tuple(_training(flags, manager, with_flags=False))


def matching(field: str, explained: Iterable[Explained]) -> tuple[Explained, ...]:
    """Return what `field` names: paths that end with it, else all inside the section that it names.

    Raises:
        ConfigError: nothing does; the closest paths are told.
    """
    explained = tuple(explained)
    wanted = _words(field)
    size = len(wanted)
    named = {item.field: _words(item.field) for item in explained}
    found = [item for item in explained if wanted and named[item.field][-size:] == wanted]
    if not found and wanted:
        found = [
            item
            for item in explained
            if any(named[item.field][at : at + size] == wanted for at in range(len(named[item.field])))
        ]
    if found:
        return tuple(found)
    spellings: dict[str, str] = {}
    for path, words in named.items():
        for start in range(len(words)):
            spellings.setdefault(".".join(words[start:]), path)
    near = dict.fromkeys(spellings[name] for name in closest(".".join(wanted), spellings))
    mend = f"Did you mean {', or '.join(near)}?" if near else "`mm explain` without FIELD lists all"
    text = f'there is no field "{clip(field)}" in this job'
    raise ConfigError([Finding("error", "unknown-field", text, path="mm explain", suggestion=mend)])


def _words(path: str) -> list[str]:
    """`text_encoder[0].dtype`, or with `.0`, is text_encoder, 0, dtype."""
    return [word for word in re.split(r"[.\[\]]", path) if word]


# A job from the same draft as `mm check` makes: what that accepts can be explained.


def _job_file(document: Document, manager: PluginManager) -> Iterator[Explained]:
    flags, findings = read_command_line((), from_document(document))
    if has_errors(findings):
        raise ConfigError(check_file(document.path, manager=manager))
    return _training(flags, manager, with_flags=True)


def _training(flags: TrainFlags, manager: PluginManager, *, with_flags: bool) -> Iterator[Explained]:
    assembly = Assembly(manager)
    draft = assembly.attempt(lambda: training.draft_training_job(flags, assembly, to_run=False))
    if draft is None or _in_the_way(assembly.findings):
        raise ConfigError(sort_findings(assembly.findings, training.file_order(flags)))
    job = training.TrainingJob(
        cast(Any, draft.model), cast(Any, draft.data), cast(Any, draft.tools), cast(Any, draft.fsdp2),
        draft.flags, draft.components, draft.callbacks, (), (), assembly.hooks, tuple(assembly.overwrites),
        draft.documents,
    )  # fmt: skip
    resolved = job.resolved()
    for name, kind in _NAMES.items():
        # Without a file there are defaults, which belong to a job but not to the files of `explain_files`.
        if resolved["values"][name] is None or (flags.source(name) is None and not with_flags):
            continue
        own = [c for c in job.components.values() if (c.role == "dataset") == (name == "data")]
        overwrites = [o for o in job.overwrites if _words(o.path)[0] in resolved["values"][name]]
        document = job.documents[name]
        top = type(job.model) if name == "model" else CLASSES[kind]
        legacy = legacy_paths(top, own, document)
        yield from _explain(name, resolved["values"][name], document, overwrites, legacy)
    if with_flags:
        for flag, value in {**resolved["values"]["flags"], **resolved["launch"]}.items():
            if flag in _IDLE_FLAGS and flag not in job.flags.model_fields_set:
                continue  # it does nothing, and nobody wrote it
            yield Explained(f"flags.{flag}", value, job.flags.origin(flag))


def _in_the_way(findings: Iterable[Finding]) -> bool:
    """Whether values cannot be explained; a path that is not there is a value all the same."""
    return has_errors(finding for finding in findings if finding.code != "missing-path")


def _generation(path: str, manager: PluginManager) -> Iterator[Explained]:
    assembly = Assembly(manager)
    document = without_schema(read_document(path))
    draft = assembly.attempt(lambda: generation.draft_generation_job(document, assembly, to_run=False))
    if draft is None or draft.model is None or _in_the_way(assembly.findings):
        raise ConfigError(sort_findings(assembly.findings))
    job = generation.GenerationJob(
        draft.model, draft.components, draft.prompts, draft.images, draft.model.tokenizer, draft.model.load, (), (),
        assembly.hooks, tuple(assembly.overwrites), draft.document,
    )  # fmt: skip
    legacy = legacy_paths(CLASSES[Kind.INFERENCE], job.components.values(), job.document)
    yield from _explain("model", job.resolved()["values"], job.document, job.overwrites, legacy)


def _explain(
    name: str, values: Any, document: Document, overwrites: Sequence[Overwrite], legacy: LegacyPaths
) -> Iterator[Explained]:
    for path, value in _fields(values):
        if path in legacy.values():
            continue  # its value is told at the newer spelling
        origin = written_at(path, document, legacy)
        made = tuple(overwrite for overwrite in overwrites if _concerns(_words(overwrite.path), path))
        yield Explained(dotted((name, *path)), value, origin, made)


def _fields(values: Any) -> Iterator[tuple[KeyPath, Any]]:
    """Leaves, with a list of plain values as one."""
    whole: set[KeyPath] = set()
    for path, value in leaves(values):
        length = next((i for i in range(len(path)) if isinstance(path[i], int)), None)
        if length is None:
            yield path, value
            continue
        node = values
        for part in path[:length]:
            node = node[part]
        if any(isinstance(item, Mapping | list) for item in node):
            yield path, value
        elif path[:length] not in whole:
            whole.add(path[:length])
            yield path[:length], node


def _concerns(changed: Sequence[str], path: KeyPath) -> bool:
    """Whether a change at one place is one of another: it is around it or inside it."""
    own = [str(part) for part in path]
    length = min(len(changed), len(own))
    return list(changed[:length]) == own[:length]
