"""`plugins` of a model or inference file: whose hooks take part, and the job's own selection."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from mm_core.config.document import Document
from mm_core.config.findings import Finding, has_errors
from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel, check_section
from mm_registry.errors import SelectionError
from mm_registry.selection import KEYS, SelectionLayer
from mm_registry.spec import canonical_name

_PATH: KeyPath = ("plugins",)
Name = Annotated[str, Field(min_length=1)]


class PluginsConfig(SectionModel):
    """The object form of `plugins`; the list form is its `use` alone."""

    use: Annotated[
        list[Name],
        Field(description="Distributions whose hooks take part though no component of theirs is used."),
    ] = Field(default_factory=list)
    allow: Annotated[
        list[Name] | None, Field(description="Distributions that may take part; without it, all may.")
    ] = None
    disable: Annotated[list[Name], Field(description="Distributions that take no part in this job.")] = Field(
        default_factory=list
    )
    enable: Annotated[
        list[Name], Field(description="Distributions that take part though a selection file disables them.")
    ] = Field(default_factory=list)
    prefer: Annotated[
        dict[str, Name],
        Field(description="For an id that several distributions offer (`predictor/wandit`): whose is meant."),
    ] = Field(default_factory=dict)


def named_plugins(document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Yield (where it stands, name) of each distribution whose hooks the file asks for."""
    value: Any = document.data.get("plugins")
    path: KeyPath = _PATH
    if isinstance(value, Mapping):
        value, path = value.get("use"), ("plugins", "use")
    for index, name in enumerate(value if isinstance(value, list) else []):
        if isinstance(name, str) and name:
            yield (*path, index), name


def job_selection(document: Document) -> tuple[SelectionLayer | None, list[Finding]]:
    """Return what a file says about which distributions take part, if anything; and what is wrong with that,
    as far as the file's own class does not say so.
    """
    table = document.data.get("plugins")
    if not isinstance(table, Mapping):
        return None, []
    if has_errors(check_section(PluginsConfig, document, _PATH).findings):
        return None, []
    said = {key: table[key] for key in KEYS if table.get(key) is not None}
    if not said:
        return None, []
    try:
        return SelectionLayer.from_table(document.path or "the job", said, _lines(document, said)), []
    except SelectionError as error:
        path: KeyPath = (*_PATH, *error.key)
        path = path if document.has(path) else path[:2]
        return None, [selection_finding(document, "error", "bad-selection", error.problem, path)]


def selection_finding(document: Document, level: Any, code: str, message: str, path: KeyPath) -> Finding:
    """Make a finding about a key or a name under `plugins`."""
    return Finding.at(document.origin(path), level, code, message, path=path)


def path_of(document: Document, key: str, name: str) -> KeyPath:
    """Return where a distribution is listed under `key`, or an id under `prefer`."""
    values = document.data["plugins"][key]
    if isinstance(values, Mapping):
        return ("plugins", key, name)
    index = next(index for index, value in enumerate(values) if canonical_name(value) == name)
    return ("plugins", key, index)


def _lines(document: Document, said: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    lines: dict[tuple[str, ...], int] = {}

    def note(key: tuple[str, ...], line: int | None) -> None:
        if line is not None:
            lines.setdefault(key, line)

    for key, values in said.items():
        note((key,), document.key_origin((*_PATH, key)).line)
        if isinstance(values, Mapping):
            for name in values:
                note((key, name), document.key_origin((*_PATH, key, name)).line)
        else:
            for index, name in enumerate(values):
                note((key, canonical_name(name)), document.origin((*_PATH, key, index)).line)
    return lines
