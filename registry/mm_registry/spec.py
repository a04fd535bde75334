"""What discovery finds: an entry with its provenance, a diagnostic, the report of both."""

from __future__ import annotations

import functools
import re
from enum import StrEnum
from typing import Any, NamedTuple

RUNTIME = "runtime"  # stands for the distribution of what a program registers itself


class Status(StrEnum):
    """Whether an entry can be used. All but a failed import are decided from metadata, without importing
    anything.
    """

    AVAILABLE = "available"
    BLOCKED = "blocked"  # a selection file, or the job, disables its distribution
    NOT_ALLOWLISTED = "not_allowlisted"  # MM_PLUGINS, or an allow list, leaves its distribution out
    INCOMPATIBLE = "incompatible"  # made for another version of the plugin API
    MISSING_EXTRA = "missing_extra"  # the entry asks for an extra that is not installed
    AMBIGUOUS = "ambiguous"  # another distribution claims the same id
    SHADOWED = "shadowed"  # lost its id to a `prefer`, to what the program registered, or to a real id
    BROKEN = "broken"  # malformed declaration, or its import failed


#: The distribution does not take part at all: its claims contest nothing.
EXCLUDED = frozenset({Status.BLOCKED, Status.NOT_ALLOWLISTED})


class EntrySpec(NamedTuple):
    """One claim of a distribution to an id.

    Attributes:
        id: `"wandit"`; for companions of a component `"predictor/wandit"`.
        group: `"mm_core.predictor_models"`.
        target: `"package.module:object"`, or `"package.module"`; for groups without import targets the
            value: the new id of an alias, the last version of a farewell, the distribution of a provider.
        distribution: name as in its metadata; `"runtime"` if registered by the running program.
        version: of the distribution; empty for `"runtime"`.
        path: folder that holds the code: the source tree of an editable install, else the folder of the
            metadata.
        editable: whether it is an editable install.
        origin: how it came here: `"editable /src/plugin"`, `"local /src/plugin"`, `"wheel"`, `"wheel
            /tmp/x.whl"`, `"git+https://…@commit"`, `"source /src/plugin"` (an egg-info beside its code, not
            installed), `"runtime"`.
        extras: extras of the distribution that the entry needs.
        required_api: ranges that it declares, `("mmzoo-core>=0.1,<0.2",)`.
        status: see `Status`.
        detail: why, and how to mend it, when the status is not `available`.
    """

    id: str
    group: str
    target: str
    distribution: str
    version: str
    path: str
    editable: bool = False
    origin: str = ""
    extras: tuple[str, ...] = ()
    required_api: tuple[str, ...] = ()
    status: Status = Status.AVAILABLE
    detail: str = ""

    @property
    def qualified_id(self) -> str:
        """The id that no collision can touch: `"mmzoo-plugin-wan22/wandit"`."""
        return f"{self.distribution}/{self.id}"

    @property
    def provider(self) -> str:
        """The distribution and its version, for messages."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the claim: group, id, canonical name of the distribution."""
        return (self.group, self.id, canonical_name(self.distribution))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, JSON-able, the id and where it comes from first."""
        return {
            "id": self.id,
            "group": self.group,
            "distribution": self.distribution,
            "version": self.version,
            "origin": self.origin,
            "status": str(self.status),
            "target": self.target,
            "path": self.path,
            "detail": self.detail,
            "editable": self.editable,
            "extras": list(self.extras),
            "required_api": list(self.required_api),
        }


class Diagnostic(NamedTuple):
    """Something odd about an installed distribution; it never stops the others.

    Attributes:
        level: `"error"` (something of it cannot be used), `"warning"` or `"note"`.
        code: stable short name, `"unreadable-metadata"`.
        message: one sentence.
        distribution: its name, or the name of its metadata folder when the metadata cannot be read.
        path: where.
    """

    level: str
    code: str
    message: str
    distribution: str = ""
    path: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


class DiscoveryReport(NamedTuple):
    """What is installed. Both tuples are sorted by content: the order of `sys.path` does not show."""

    entries: tuple[EntrySpec, ...]
    diagnostics: tuple[Diagnostic, ...]


@functools.lru_cache(maxsize=8192)
def canonical_name(distribution: str) -> str:
    """The name by which distributions are compared (PEP 503): `"MMZoo_Core"` and `"mmzoo-core"` are one."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()
