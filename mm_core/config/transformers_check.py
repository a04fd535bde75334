"""The check of a transformers model's file: the keys of every such model, the family's, and config.json of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, expanded, read_document
from mm_core.config.findings import ConfigError, Finding, Level, closest, show
from mm_core.config.latents import read_hf_config
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.parts import Part, config_class, find_callbacks, id_finding, resolve
from mm_core.config.resolved import plain
from mm_core.config.section import check_section
from mm_core.config.transformers_model import (
    DEFAULT_TASK,
    TransformersFamilyConfig,
    TransformersModelConfig,
)
from mm_registry.errors import RegistryError
from mm_registry.groups import ROLES
from mm_registry.spec import EntrySpec

_ID: KeyPath = ("model_id",)
_FOLDER: KeyPath = ("init_from_hf_path",)
_TASK: KeyPath = ("task_id",)
#: What the network is called in a job's components, in a model and in patterns of fsdp2.yaml.
NAME = "model"


@dataclass
class TransformersDraft:
    """A transformers model's section while it is being checked; what could not be made stays empty.

    Attributes:
        section: the keys of every such model.
        components: `model` and `task`.
        callbacks: the entries that `callbacks` names, in its order.
        parts: whose distributions' hooks take part; the caller activates them.
    """

    section: TransformersModelConfig | None = None
    components: dict[str, ComponentConfig] = field(default_factory=dict)
    callbacks: tuple[EntrySpec, ...] = ()
    parts: list[Part] = field(default_factory=list)


def check_transformers_model(
    document: Document,
    assembly: Assembly,
    level: Level = "note",
    *,
    load: str | None = None,
    weights: Level = "note",
) -> TransformersDraft:
    """Check a transformers model's file, or the section of a job file; findings go to `assembly`, whose selection has
    been made.

    Args:
        level: of a folder that does not exist, or has no config.json.
        load: `--load`, which may have the weights too.
        weights: level of a folder that has none.
    """
    draft = TransformersDraft()
    known = set(TransformersModelConfig.model_fields)
    label = document.path or "the model"
    part, findings = _find(document, assembly, label)
    assembly.findings += findings
    cls: type[BaseModel] | None = None
    if part is not None:
        part, findings = resolve(part, document, assembly.manager)
        assembly.findings += findings
    if part is not None:
        cls = _family(part, document, assembly)
    family = cls.model_fields if cls is not None else {}
    own = {key: value for key, value in document.data.items() if key in known or (cls and key not in family)}
    rest = {key: value for key, value in document.data.items() if key not in own}
    checked = check_section(TransformersModelConfig, document, label=label, data=own, also_known=family)
    assembly.findings += checked.findings
    draft.section = checked.section
    callbacks = assembly.resolve_all(find_callbacks(document), document)
    task = _task(document, assembly)
    draft.parts = [*([part] if part else []), *callbacks, *([task] if task else [])]
    draft.callbacks = tuple(one.spec for one in callbacks if one.spec is not None)
    inner: BaseModel | None = None
    if cls is not None and part is not None:
        found = check_section(cls, document, label=f"{label} ({part.id})", data=rest, also_known=known)
        assembly.findings += [*found.findings, *_against_folder(cls, document, part.id)]
        inner = found.section
    elif rest and part is not None and part.spec is not None:
        text = (
            f"{', '.join(map(show, rest))} of {part.id} cannot be checked: {part.spec.provider} has no config "
            "class for it"
        )
        assembly.findings.append(
            Finding.at(document.origin(_ID), "note", "unchecked-section", text, path=_ID)
        )
    assembly.findings += cross.check_path(document, _FOLDER, "folder", level)
    needed = draft.section is not None and draft.section.init == "pretrained" and load is None
    assembly.findings += _content(document, level, weights if needed else None)
    if part is not None and part.spec is not None and draft.section is not None and (inner or cls is None):
        draft.components[NAME] = _component(part, part.spec, draft.section, inner, rest)
    if task is not None and task.spec is not None:
        draft.components["task"] = ComponentConfig("task", task.id, task.spec, path=task.path)
    return draft


def _component(
    part: Part,
    spec: EntrySpec,
    section: TransformersModelConfig,
    family: BaseModel | None,
    rest: Mapping[str, Any],
) -> ComponentConfig:
    fields = plain(family) if family is not None else dict(rest)
    shared = {"init_from_hf_path": section.init_from_hf_path, "loss_cfg": plain(section.loss_cfg)}
    return ComponentConfig(
        "transformers_model",
        part.id,
        spec,
        family,
        {**fields, **shared},
        from_pretrained=section.init_from_hf_path,
        init=section.init,
    )


def _find(document: Document, assembly: Assembly, label: str) -> tuple[Part | None, list[Finding]]:
    """The part that `model_id` names; without one, what `architectures` or `model_type` of the folder's config.json
    does.
    """
    id = document.data.get("model_id")
    if id is not None:
        if not isinstance(id, str) or not id:
            return None, []  # the file's own class says what is expected
        return Part("model", "transformers_model", (), _ID, id), []
    folder = document.data.get("init_from_hf_path")
    file = (expanded(folder) if isinstance(folder, str) and folder else Path()) / "config.json"
    config = read_hf_config(file.parent) if isinstance(folder, str) and folder else {}
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    names = [name for name in (first, config.get("model_type")) if isinstance(name, str) and name]
    known = assembly.manager.ids(ROLES["transformers_model"].name)
    for name in names:
        if name in known:
            return Part("model", "transformers_model", (), _ID, name), []
    why = f", and {file} names none that is installed ({', '.join(names)})" if names else ""
    near = next((id for name in reversed(names) if (id := closest(name, known))), None)
    such = f', such as "{near}"' if near else ""
    text, mend = f'{label} needs "model_id"{why}', f'Add "model_id"{such}; `mm list` shows the ids'
    return None, [
        Finding.at(document.key_origin(()), "error", "missing-key", text, path=_ID, suggestion=mend)
    ]


def _content(document: Document, level: Level, weights: Level | None) -> Iterator[Finding]:
    """The folder must have a config.json and, unless `weights` is None, weights."""
    value = document.data.get("init_from_hf_path")
    if not isinstance(value, str) or not value:
        return
    folder, origin = expanded(value), document.origin(_FOLDER)
    try:
        if not folder.is_dir():
            return
        described, filled = (folder / "config.json").exists(), any(folder.glob("*.safetensors"))
    except OSError:  # said with the folder itself
        return
    if not described:
        text = f'init_from_hf_path is "{value}", which has no config.json to describe the network'
        yield Finding.at(origin, level, "missing-path", text, path=_FOLDER)
    elif weights is not None and not filled:
        text = f'init_from_hf_path is "{value}", which has a config.json and no weights (*.safetensors)'
        mend = 'Put the published folder there, give --load, or write "init": "random" to start from random weights'
        yield Finding.at(origin, weights, "no-weights", text, path=_FOLDER, suggestion=mend)


def _task(document: Document, assembly: Assembly) -> Part | None:
    id = document.data.get("task_id")
    if id is None:
        id = DEFAULT_TASK
    if not isinstance(id, str) or not id:
        return None  # the file's own class says what is expected
    return next(iter(assembly.resolve_all([Part("task", "task", _TASK, _TASK, id)], document)), None)


def _family(part: Part, document: Document, assembly: Assembly) -> type[BaseModel] | None:
    try:
        return config_class(part, assembly.manager)
    except RegistryError as error:
        assembly.findings.append(id_finding(error, document, _ID))
        return None


def _against_folder(cls: type[BaseModel], document: Document, id: str) -> Iterator[Finding]:
    """What the file repeats of the folder's config.json and says otherwise: the folder's is what is built."""
    folder = document.data.get("init_from_hf_path")
    if not issubclass(cls, TransformersFamilyConfig) or not isinstance(folder, str) or not folder:
        return
    file = expanded(folder) / "config.json"
    try:
        if not file.is_file():
            return
    except OSError:  # no name of a file at all, which the check of the folder says
        return
    try:
        theirs = read_document(file)
    except ConfigError as error:
        yield from error.findings
        return
    actual = theirs.data.get("model_type")
    if cls.hf_model_type and isinstance(actual, str) and actual != cls.hf_model_type:
        text = f'"model_id" is {show(id)}, but {file} is of a model of type {show(actual)}'
        mend = f'Name a folder of a {cls.hf_model_type} in "init_from_hf_path", or another "model_id"'
        yield Finding.at(document.origin(_ID), "error", "conflict", text, path=_ID, suggestion=mend)
        return
    for path, key in cls.hf_config_keys.items():
        if not document.has(path) or not theirs.has(key):
            continue
        written, real = document.value(path), theirs.value(key)
        if _numbers(written, real) and written != real:
            same = _named_alike(theirs.value(key[:-1]), written)
            text = f"{dotted(path)} is {show(written)}, but {file} has {dotted(key)} {show(real)}, which is what is built"
            mend = f"Write {show(real)}" + (f" ({show(written)} is its {same})" if same else "")
            yield Finding.at(document.origin(path), "warning", "differs", text, path=path, suggestion=mend)


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _named_alike(section: Any, value: Any) -> str:
    """The key of config.json that has a number which was written for another one, if just one has."""
    if not isinstance(section, Mapping):
        return ""
    found = [key for key, theirs in section.items() if _numbers(theirs) and theirs == value]
    return found[0] if len(found) == 1 else ""
