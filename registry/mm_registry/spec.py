"""What discovery finds: an entry with its provenance, a diagnostic, the report of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

RUNTIME = "runtime"  # stands for the distribution of what a program registers itself


class Status(StrEnum):
    """Whether an entry can be used. All but a failed import are decided from metadata, without importing
    anything.
    """

    AVAILABLE = "available"
    BLOCKED = "blocked"  # the selection leaves its distribution out
    AMBIGUOUS = "ambiguous"  # another distribution claims the same id
    INCOMPATIBLE = "incompatible"  # made for another version of the plugin API
    MISSING_EXTRA = "missing_extra"  # the entry asks for an extra that is not installed
    BROKEN = "broken"  # malformed declaration, or its import failed


@dataclass(frozen=True, slots=True)
class EntrySpec:
    """One claim of a distribution to an id.

    Attributes:
        id: `"wandit"`; for companions of a component `"predictor/wandit"`.
        group: `"mm_core.predictor_models"`.
        target: `"package.module:object"`, or `"package.module"`.
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


@dataclass(frozen=True, slots=True)
class Diagnostic:
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


@dataclass(frozen=True, slots=True)
class DiscoveryReport:
    """What is installed. Both tuples are sorted by content: the order of `sys.path` does not show."""

    entries: tuple[EntrySpec, ...]
    diagnostics: tuple[Diagnostic, ...]


def canonical_name(distribution: str) -> str:
    """The name by which distributions are compared (PEP 503): `"MMZoo_Core"` and `"mmzoo-core"` are one."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()
