"""Which distributions may take part, decided by name before anything is imported.

`MM_PLUGINS` is the allowlist: a comma-separated list of distributions. Unset, every installed one takes part;
set but empty, only the core does. MM Zoo's own two distributions are always in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm_registry.spec import RUNTIME, canonical_name

VARIABLE = "MM_PLUGINS"
CORE_DISTRIBUTIONS = frozenset({"mmzoo-core", "mmzoo-registry"})


@dataclass(frozen=True, slots=True)
class Selection:
    """The distributions that take part; `allowed` is None when all do. `written` is the setting as the user
    wrote it.
    """

    allowed: frozenset[str] | None = None
    written: str = ""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Selection:
        text = environ.get(VARIABLE)
        if text is None:
            return cls()
        names = (canonical_name(name) for name in text.split(","))
        return cls(frozenset(name for name in names if name), text.strip())

    def blocks(self, distribution: str) -> str | None:
        """Return why the distribution may not take part, and what would let it; None if it may."""
        name = canonical_name(distribution)
        if self.allowed is None or name in self.allowed or name in CORE_DISTRIBUTIONS or name == RUNTIME:
            return None
        wanted = f"{self.written},{name}" if self.allowed else name
        return f"{VARIABLE}={self.written!r} does not list {name}; set {VARIABLE}={wanted!r}, or unset it"
