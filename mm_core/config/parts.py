"""Components of a job while it is read: found in the files, resolved by metadata, checked, patched by
hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from mm_core.config.component import WITH_WEIGHTS, ComponentConfig, IdKeys, WeightKeys
from mm_core.config.document import Document
from mm_core.config.findings import Finding, has_errors, misspelt, show
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.section import SectionModel, check_section, not_available
from mm_registry.errors import RegistryError, UnknownIdError
from mm_registry.groups import ROLES
from mm_registry.manager import PluginManager
from mm_registry.spec import EntrySpec

#: Sections inside a component's section that name a component themselves: role -> (key, role, key of the id).
NESTED = {"ae": (("i2v_processor", "i2v_processor", "processor_id"),)}


@dataclass(frozen=True)
class Part:
    """A section of a document that names a component.

    Attributes:
        name: key in `job.components`, such as `text_encoder.0`.
        role: of the component.
        path: of its section.
        id_path: of the value that is its id.
        id: that value.
        spec: the entry that it means, once resolved. Of a component that is announced by its config class only, the
            entry of that class.
    """

    name: str
    role: str
    path: KeyPath
    id_path: KeyPath
    id: str
    spec: EntrySpec | None = None

    @property
    def label(self) -> str:
        return f"{dotted(self.path) or self.role} ({self.id})"


def find_part(
    document: Document, name: str, role: str, path: KeyPath, id_key: str = "model_id"
) -> tuple[Part | None, list[Finding]]:
    """Return the part at `path`, or what is wrong with its id. An absent section is no part and no
    finding.
    """
    if not document.has(path):
        return None, []
    section = document.value(path)
    if not isinstance(section, Mapping):
        return None, []  # the file's own class says what is expected there
    id_path = (*path, id_key)
    value = section.get(id_key)
    if value is None and id_key not in section:
        slip = misspelt(id_key, section)
        if slip is not None:
            text, mend = f'unknown key "{slip}" in {dotted(path)}', f'Did you mean "{id_key}"?'
            written = (*path, slip)
            origin = document.key_origin(written)
            return None, [Finding.at(origin, "error", "unknown-key", text, path=written, suggestion=mend)]
        message = f'{dotted(path)} needs "{id_key}"'
        origin = document.key_origin(path)
        mend = f'Add "{id_key}"; `mm list` shows the ids'
        return None, [Finding.at(origin, "error", "missing-key", message, path=id_path, suggestion=mend)]
    if not isinstance(value, str) or not value:
        text = f'"{id_key}" is {show(value)}, expected an id in quotes'
        mend = "`mm list` shows the ids"
        origin = document.origin(id_path)
        return None, [Finding.at(origin, "error", "wrong-type", text, path=id_path, suggestion=mend)]
    return Part(name, role, path, id_path, value), []


def find_parts(document: Document, sections: Sequence[tuple[str, str]]) -> tuple[list[Part], list[Finding]]:
    """Return the parts of several sections (key, role); a list of sections gives one for each item, `key.0`, …
    A section inside one of them that names a component gives one too: `ae.i2v_processor`.
    """
    parts: list[Part] = []
    findings: list[Finding] = []
    for key, role in sections:
        value = document.data.get(key)
        places: list[tuple[str, KeyPath]] = [(key, (key,))]
        if isinstance(value, list):
            places = [(f"{key}.{index}", (key, index)) for index in range(len(value))]
        for name, path in places:
            part, found = find_part(document, name, role, path)
            findings += found
            if part is not None:
                parts.append(part)
            for inner, inner_role, id_key in NESTED.get(role, ()):
                where = (*path, inner)
                if not document.has(where) or document.value(where) is None:
                    continue
                nested, found = find_part(document, f"{name}.{inner}", inner_role, where, id_key)
                findings += found
                if nested is not None:
                    parts.append(nested)
    return parts, findings


def find_callbacks(document: Document) -> list[Part]:
    """Return a part for each id under `callbacks`; what is no id is for the file's own class to say."""
    ids = document.data.get("callbacks")
    parts = []
    for index, value in enumerate(ids if isinstance(ids, list) else []):
        if isinstance(value, str) and value:
            path: KeyPath = ("callbacks", index)
            parts.append(Part(f"callbacks.{index}", "callback", path, path, value))
    return parts


def find_template(dataset: Part, document: Document, manager: PluginManager) -> Part | None:
    """Return the part of the chat template that a dataset's section names, if the class of that section says under which
    key (`chat_template_key`); what is no id is for the class to say.
    """
    try:
        key: KeyPath | None = getattr(config_class(dataset, manager), "chat_template_key", None)
    except RegistryError:
        return None  # said with the dataset itself
    path = (*dataset.path, *(key or ()))
    value = document.value(path) if key and document.has(path) else None
    if not isinstance(value, str) or not value:
        return None
    return Part("chat_template", "chat_template", path, path, value)


def resolve(part: Part, document: Document, manager: PluginManager) -> tuple[Part | None, list[Finding]]:
    """Find the entry that a part's id means, by metadata alone; an old id is a warning, and so is one that only a
    config class is registered for: its section can be checked, and nothing can be built.
    """
    group = ROLES[part.role].name
    try:
        resolved = replace(part, spec=manager.resolve(group, part.id))
        new = manager.alias(group, part.id)
    except RegistryError as error:
        spec = announced(part.role, part.id, manager) if isinstance(error, UnknownIdError) else None
        if spec is None:
            return None, [id_finding(error, document, part.id_path)]
        what = f'"{part.id_path[-1]}" is {show(part.id)}'
        why = f"{spec.provider} checks the keys of this {ROLES[part.role].noun}, and cannot build it yet"
        return replace(part, spec=spec), [not_available(document, part.id_path, what, why)]
    if new is None:
        return resolved, []
    text = f"{show(part.id)} is an old id of {show(new)}"
    mend = f"Write {show(new)} instead"
    origin = document.origin(part.id_path)
    return resolved, [Finding.at(origin, "warning", "old-id", text, path=part.id_path, suggestion=mend)]


def announced(role: str, id: str, manager: PluginManager) -> EntrySpec | None:
    """Return the entry of a config class as that of the component which it describes, or None. To be asked for an id
    that no distribution offers: its section can be checked then, but nothing can be built from it.
    """
    try:
        spec = manager.find("mm_core.configs", f"{role}/{id}")
    except RegistryError:
        return None
    return None if spec is None else spec._replace(id=id, group=ROLES[role].name)


def id_finding(error: RegistryError, document: Document, path: KeyPath) -> Finding:
    """Return a registry's error as a finding at the id."""
    unknown = isinstance(error, UnknownIdError)
    code = "unknown-id" if unknown else "unusable-id"
    message, hint = (error.problem, error.hint) if isinstance(error, UnknownIdError) else (str(error), "")
    hint = hint.replace("did you mean", "Did you mean", 1)  # it begins a sentence here
    return Finding.at(document.origin(path), "error", code, message, path=path, suggestion=hint)


def config_class(part: Part, manager: PluginManager) -> type[BaseModel] | None:
    """Return the config class that the part's distribution registers for it, or None.

    Raises:
        RegistryError: it is registered and cannot be used.
    """
    assert part.spec is not None
    spec = manager.find("mm_core.configs", f"{part.role}/{part.spec.id}", part.spec.distribution)
    if spec is None:
        return None
    cls = manager.load(spec)
    if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
        raise RegistryError(f"the config class {spec.target} of {spec.provider} is no pydantic model")
    return cls


def check_part(
    part: Part, document: Document, manager: PluginManager
) -> tuple[ComponentConfig | None, list[Finding]]:
    """Check a part's section: the core's keys by its own class, the rest by the component's."""
    assert part.spec is not None
    section: Mapping[str, Any] = document.value(part.path)
    keys: type[SectionModel] = WeightKeys if part.role in WITH_WEIGHTS else IdKeys
    id_key = str(part.id_path[-1])
    # `model_id` is a key of ours only where it is the one that chooses.
    core_keys = set(keys.model_fields) - {"model_id"} | {id_key}
    own = {key: value for key, value in section.items() if key in core_keys}
    rest = {key: value for key, value in section.items() if key not in own}
    own["model_id"] = own.pop(id_key, part.id)
    core = check_section(keys, document, part.path, label=part.label, data=own)
    findings = list(core.findings)
    try:
        cls = config_class(part, manager)
    except RegistryError as error:
        return None, [*findings, id_finding(error, document, part.id_path)]
    config: BaseModel | None = None
    fields: dict[str, Any] = dict(rest)
    if cls is not None:
        checked = check_section(
            cls, document, part.path, label=part.label, data=rest, also_known=(id_key, *keys.model_fields)
        )
        findings += checked.findings
        config = checked.section
        if config is None:
            return None, findings
        fields = effective_fields(config)
        fields.pop(id_key, None)
    else:
        from mm_core.config.signature_check import check_signature  # few need it, and `ast` with it

        pretrained = own.get("from_pretrained") is not None and own.get("init") != "random"
        found = list(
            check_signature(
                part, document, rest, manager, pretrained=pretrained, also_known=(id_key, *keys.model_fields)
            )
        )
        findings += found
        if has_errors(found):
            return None, findings
    if core.section is None:
        return None, findings
    weights = core.section if isinstance(core.section, WeightKeys) else None
    return ComponentConfig(
        part.role,
        part.id,
        part.spec,
        config,
        fields,
        dtype=weights.dtype if weights else None,
        from_pretrained=weights.from_pretrained if weights else None,
        init=weights.init if weights else "pretrained",
        path=part.path,
    ), findings


def effective_fields(config: BaseModel) -> dict[str, Any]:
    """Return what a constructor gets from a validated section."""
    return config.effective() if isinstance(config, SectionModel) else config.model_dump()
