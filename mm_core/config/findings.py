"""What a check found, and the one error that carries all of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.secrets import hide, without_secrets
from mm_registry import suggestions
from mm_registry.errors import UserError
from mm_registry.words import visible

Level = Literal["error", "warning", "note"]
#: Code of what is right in a file and what this version cannot do yet.
NOT_AVAILABLE = "not-available"
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check has to say about one place.

    Attributes:
        level: `error` stops the job; `warning` (a legacy spelling) and `note` (a key without effect here)
            do not.
        code: a stable word for machines, such as `unknown-key`.
        message: what is wrong, with the value, and why. A sentence without a full stop.
        file: the file as the user named it; None for flags and for what was not written anywhere.
        line, column: from 1; None if `file` is None or the whole file is meant.
        path: dotted path inside the file, or the flag.
        suggestion: how to mend it; empty if there is nothing to add.
    """

    level: Level
    code: str
    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str = ""
    suggestion: str = ""

    @classmethod
    def at(
        cls,
        origin: Origin,
        level: Level,
        code: str,
        message: str,
        *,
        path: KeyPath | str = (),
        suggestion: str = "",
    ) -> Finding:
        """Make a finding about the place that `origin` names."""
        text = path if isinstance(path, str) else dotted(path)
        if origin.kind == "file":
            return cls(level, code, message, origin.file, origin.line, origin.column, text, suggestion)
        if origin.kind == "flag":
            return cls(level, code, message, path=origin.detail or text, suggestion=suggestion)
        if origin.kind == "hook":
            message = f"{message} (written by the {origin})"
        return cls(level, code, message, path=text, suggestion=suggestion)

    @property
    def where(self) -> str:
        """`model.json:12:9`, or the path when it is in no file."""
        parts = [str(part) for part in (self.file, self.line, self.column) if part is not None]
        return ":".join(parts) if parts else self.path

    def to_dict(self) -> dict[str, Any]:
        """Return the eight fields, JSON-able."""
        fields = asdict(self)
        return {**fields, "message": hide(self.message), "suggestion": hide(self.suggestion)}

    @property
    def text(self) -> str:
        """What is wrong and how to mend it."""
        return f"{self.message}. {self.suggestion}" if self.suggestion else self.message

    def __str__(self) -> str:
        where = f"{self.where} " if self.where else ""
        return _line(f"{where}{self.level}: {self.text}")


class ConfigError(UserError):
    """The configuration cannot be used. `findings` holds everything found, notes and warnings too."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = sort_findings(findings)
        errors = [finding for finding in self.findings if finding.level == "error"]
        lines = [_line(f"{error.where}: {error.text}" if error.where else error.text) for error in errors]
        if len(errors) > 1:
            lines.insert(0, f"{len(errors)} errors in the configuration:")
        super().__init__("\n".join(lines))


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def unavailable_is_error(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings of a job: what this version cannot do is an error there, whereas a file that asks for it
    is right by itself. So nothing runs as something else than it says.
    """
    return [
        replace(finding, level="error") if finding.code == NOT_AVAILABLE else finding for finding in findings
    ]


def sort_findings(findings: Iterable[Finding], order: Sequence[str | None] = ()) -> tuple[Finding, ...]:
    """Return the findings once each, by file (those of `order` first, then as they appear), then by place."""
    unique = list(dict.fromkeys(findings))
    files = list(dict.fromkeys([*order, *(finding.file for finding in unique)]))
    return tuple(sorted(unique, key=lambda f: (files.index(f.file), f.line or 0, f.column or 0)))


def _line(text: str) -> str:
    """Return a text as one line that a terminal can be given: a key or a value in it may hold line feeds and
    escape codes.
    """
    return hide(visible(text).replace("\n", "\\n"))


def show(value: Any, path: Iterable[str | int] = ()) -> str:
    """Return a value as it would stand in JSON, shortened; `***` for secrets in it, and for all of it if `path`,
    where it stands, is secret.
    """
    value = without_secrets(value, path)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return clip(text)


def clip(text: str) -> str:
    """Return a text short enough for a message."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def closest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that `name` is most likely a misspelling of, or None."""
    near = suggestions.closest(name, options, 1)
    return near[0] if near else None


def misspelt(name: str, keys: Iterable[object]) -> str | None:
    """Return which of the keys that are written is `name` with a slip of the pen, or None. It takes more likeness than
    a suggestion does: `model_type` is no misspelt `model_id`.
    """
    import difflib

    near = closest(name, [key for key in keys if isinstance(key, str) and key != name])
    if near is None or difflib.SequenceMatcher(None, near.casefold(), name.casefold()).ratio() < 0.85:
        return None
    return near


def did_you_mean(name: str, options: Sequence[str], *, what: str = "key") -> str:
    """Return `Did you mean "x"?`, or the known options when none is near."""
    near = closest(name, options)
    if near is not None:
        return f'Did you mean "{near}"?'
    if not options:
        return ""
    known = sorted(set(options))
    shown = ", ".join(known[:12])
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"Known {what}s: {shown}{more}"
