"""Hooks overwrite sections: a hook fills or derives, it does not silently change what the user wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mm_core.config.document import Document
from mm_core.config.findings import Finding, show
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.parts import Part
from mm_core.config.secrets import without_secrets
from mm_registry.hooks import ProvidedPatch


@dataclass(frozen=True, slots=True)
class Overwrite:
    """One value that a hook wrote. `old` is None where nothing stood (`had_value` tells)."""

    path: str
    old: Any
    new: Any
    by: str
    reason: str
    had_value: bool

    def to_dict(self) -> dict[str, Any]:
        where = self.path.split(".")
        values = {"old": without_secrets(self.old, where), "new": without_secrets(self.new, where)}
        return {**asdict(self), **values}

    def __str__(self) -> str:
        where = self.path.split(".")
        old = show(self.old, where) if self.had_value else "(not set)"
        return f"{self.path}: {old} → {show(self.new, where)}, by {self.by}: {self.reason}"


@dataclass(frozen=True)
class _Change:
    path: KeyPath
    value: Any
    by: str
    patch: ProvidedPatch


def apply_patches(
    document: Document, part: Part, patches: Iterable[ProvidedPatch]
) -> tuple[Document, list[Overwrite], list[Finding]]:
    """Apply the patches of all hooks to one section.

    Two hooks that want different values for one path, and a hook against a value that the user wrote, are
    errors, unless one patch is `required`: then it holds, and a note tells. Equal values are no conflict.
    No hook may change the component itself.
    """
    findings: list[Finding] = []
    accepted: dict[KeyPath, _Change] = {}
    for provided in patches:
        by = f"{provided.distribution} {provided.version}".rstrip()
        for text, value in provided.patch.changes.items():
            change = _Change((*part.path, *_keys(text)), value, by, provided)
            if change.path == part.id_path:
                findings.append(_error(document, change, "a hook may not choose another component"))
                continue
            rival = next((other for other in accepted.values() if _overlap(other.path, change.path)), None)
            if rival is None:
                accepted[change.path] = change
            elif rival.path != change.path or rival.value != change.value:
                if provided.patch.required == rival.patch.patch.required:
                    what = (
                        f"two hooks want different values: {show(rival.value, change.path)} ({rival.by}) and "
                        f"{show(value, change.path)} ({by})"
                    )
                    findings.append(_error(document, change, what))
                elif provided.patch.required:
                    del accepted[rival.path]
                    accepted[change.path] = change
    trace: list[Overwrite] = []
    for change in accepted.values():
        document, done, found = _apply(document, change)
        trace += done
        findings += found
    return document, trace, findings


def _apply(document: Document, change: _Change) -> tuple[Document, list[Overwrite], list[Finding]]:
    written = document.has(change.path)
    old = document.value(change.path) if written else None
    if written and type(old) is type(change.value) and old == change.value:
        return document, [], []
    reason = change.patch.patch.reason
    was, wanted = show(old, change.path), show(change.value, change.path)
    findings: list[Finding] = []
    blocked = _blocking_scalar(document, change.path)
    if blocked is not None:
        return (
            document,
            [],
            [_error(document, change, f"{dotted(blocked)} is no object, so nothing can be set in it")],
        )
    if written:
        text = f"{was} is written here, but {change.by} wants {wanted}: {reason}"
        if not change.patch.patch.required:
            mend = f"Write {wanted}, or take the key out"
            return document, [], [_error(document, change, text, mend)]
        text = f"{was} is replaced by {wanted}, as {change.by} requires: {reason}"
        findings.append(
            Finding.at(document.origin(change.path), "note", "overwritten", text, path=change.path)
        )
    patched = document.replaced(change.path, change.value, Origin("hook", detail=change.by))
    done = Overwrite(dotted(change.path), old, change.value, change.by, reason, written)
    return patched, [done], findings


def _keys(text: str) -> list[str | int]:
    return [int(part) if part.isascii() and part.isdigit() else part for part in text.split(".")]


def _overlap(a: KeyPath, b: KeyPath) -> bool:
    length = min(len(a), len(b))
    return a[:length] == b[:length]


def _blocking_scalar(document: Document, path: KeyPath) -> KeyPath | None:
    for length in range(1, len(path)):
        if not document.has(path[:length]):
            return None
        value = document.value(path[:length])
        listed = (
            isinstance(value, list) and isinstance(path[length], int) and path[length] in range(len(value))
        )
        if not isinstance(value, Mapping) and not listed:
            return path[:length]
    return None


def _error(document: Document, change: _Change, message: str, suggestion: str = "") -> Finding:
    origin = document.origin(change.path)
    return Finding.at(origin, "error", "hook-conflict", message, path=change.path, suggestion=suggestion)
