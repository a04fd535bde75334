"""The check of a transformers model's file: the keys of every such model, the family's, and config.json of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from mm_core.config import cross_checks as cross
from mm_core.config.assemble import Assembly
from mm_core.config.document import Document, expanded, read_document
from mm_core.config.findings import NOT_AVAILABLE, ConfigError, Finding, Level, show
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.parts import Part, config_class, find_callbacks, id_finding, resolve
from mm_core.config.resolved import plain
from mm_core.config.section import check_section, not_available
from mm_core.config.transformers_model import TransformersFamilyConfig, TransformersModelConfig
from mm_registry.errors import RegistryError

_ID: KeyPath = ("model_id",)
_FOLDER: KeyPath = ("init_from_hf_path",)


def check_transformers_model(
    document: Document, assembly: Assembly, level: Level = "note"
) -> dict[str, Any] | None:
    """Check a transformers model's file, or the section of a job file; findings go to `assembly`, whose selection has
    been made.

    Args:
        level: of a folder that does not exist.

    Returns:
        Every value, defaults included; None if there is an error in the section.
    """
    known = set(TransformersModelConfig.model_fields)
    label = document.path or "the model"
    id = document.data.get("model_id")
    part = Part("model", "transformers_model", (), _ID, id) if isinstance(id, str) and id else None
    cls: type[BaseModel] | None = None
    if part is not None:
        resolved, findings = resolve(part, document, assembly.manager)
        assembly.findings += [finding for finding in findings if finding.code != NOT_AVAILABLE]
        if resolved is not None:
            what, why = (
                f'"model_id" is {show(id)}',
                "transformers models are checked, but cannot be trained yet",
            )
            mend = "Diffusion models can: see examples/"
            assembly.findings.append(not_available(document, _ID, what, why, mend))
            cls = _family(resolved, document, assembly)
            part = resolved
    family = cls.model_fields if cls is not None else {}
    own = {key: value for key, value in document.data.items() if key in known or (cls and key not in family)}
    rest = {key: value for key, value in document.data.items() if key not in own}
    checked = check_section(TransformersModelConfig, document, label=label, data=own, also_known=family)
    assembly.findings += checked.findings
    values = {} if checked.section is None else plain(checked.section)
    callbacks = assembly.resolve_all(find_callbacks(document), document)
    assembly.activate([*([part] if part and part.spec else []), *callbacks], document)
    if cls is not None:
        inner = check_section(cls, document, label=f"{label} ({id})", data=rest, also_known=known)
        assembly.findings += [*inner.findings, *_against_folder(cls, document)]
        values = {} if inner.section is None or not values else {**values, **plain(inner.section)}
    elif rest and part is not None and part.spec is not None:
        text = f"{', '.join(map(show, rest))} of {id} cannot be checked: {part.spec.provider} has no config class for it"
        assembly.findings.append(
            Finding.at(document.origin(_ID), "note", "unchecked-section", text, path=_ID)
        )
    assembly.findings += cross.check_path(document, _FOLDER, "folder", level)
    return values or None


def _family(part: Part, document: Document, assembly: Assembly) -> type[BaseModel] | None:
    try:
        return config_class(part, assembly.manager)
    except RegistryError as error:
        assembly.findings.append(id_finding(error, document, _ID))
        return None


def _against_folder(cls: type[BaseModel], document: Document) -> Iterator[Finding]:
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
        text = f'"model_id" is {show(document.data["model_id"])}, but {file} is of a model of type {show(actual)}'
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
