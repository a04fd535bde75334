"""Paths that a configuration names must exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, closest_path, expanded, link_note
from mm_core.config.findings import Finding, Level, clip
from mm_core.config.origin import KeyPath, dotted

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need


def missing_path(document: Document, path: KeyPath, value: str, what: str, level: Level = "error") -> Finding:
    """Return the finding for a path in a file that names nothing."""
    place = expanded(value)
    text, mend = f'{dotted(path)} is "{value}": ', ""
    if what == "folder" and place.is_file():
        text += "this is a file, not a folder"
        mend = f"Name the folder, {place.parent}" if place.parent.name else ""
    elif what == "file" and place.is_dir():
        text += "this is a folder, not a file"
    elif place.exists() and what in ("file", "folder"):
        text += f"this is no {what}"
    else:
        text += f"there is no such {what}"
        if not place.is_absolute():
            text += " (seen from the working directory)"
        mend = closest_path(value)
    return Finding.at(document.origin(path), level, "missing-path", text, path=path, suggestion=mend)


def check_path(document: Document, path: KeyPath, what: str, level: Level = "error") -> Iterator[Finding]:
    """What stands at `path` must name a file or folder (`what`) that exists; nothing if it is no text.

    It looks at the file rather than at checked sections, so that a mistake elsewhere hides no missing path.
    """
    value = document.value(path) if document.has(path) else None
    if not isinstance(value, str) or not value:
        return
    place = expanded(value)
    try:
        exists = {"file": place.is_file, "folder": place.is_dir}.get(what, place.exists)()
    except OSError as error:
        text = f'{dotted(path)} is "{clip(value)}", which cannot be looked at: {error.strerror}'
        yield Finding.at(document.origin(path), level, "missing-path", text, path=path)
        return
    if not exists:
        yield missing_path(document, path, value, what, level)
    elif (link := link_note(value, document.origin(path), path)) is not None:
        yield link


def check_folders(
    components: Iterable[ComponentConfig], document: Document, level: Level = "error"
) -> Iterator[Finding]:
    """Every `from_pretrained` of a component must be a folder."""
    for component in components:
        if component.from_pretrained is not None:
            yield from check_path(document, (*component.path, "from_pretrained"), "folder", level)


def check_load(flags: TrainFlags) -> Iterator[Finding]:
    """`--load` must exist."""
    if flags.load is None:
        return
    place, shown = expanded(flags.load), clip(flags.load)
    try:
        exists, is_file = place.exists(), place.is_file()
    except OSError as error:
        yield flags.finding("load", "missing-path", f'"{shown}" cannot be looked at: {error.strerror}')
        return
    if is_file:
        yield flags.finding("load", "missing-path", f'"{shown}" is a file, not a folder')
    elif not exists:
        text = f'"{shown}": there is no such folder'
        yield flags.finding("load", "missing-path", text, closest_path(flags.load))
