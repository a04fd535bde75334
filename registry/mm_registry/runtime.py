"""What the running program registers itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from mm_registry.errors import RegistryError
from mm_registry.spec import RUNTIME, EntrySpec

Registered = Mapping[
    tuple[str, str], tuple[EntrySpec, object, bool]
]  # (group, id) -> spec, object, replaces others


class RuntimeEntries:
    """Entries of a distribution named "runtime".

    Attributes:
        entries: (group, id) -> the entry, the object, whether it stands in for all other claims.
        frozen: whether nothing may change any more, in all groups.
        frozen_groups: the groups in which nothing may change any more.
        changes: how often the entries changed.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], tuple[EntrySpec, object, bool]] = {}
        self.frozen = False
        self.frozen_groups: frozenset[str] = frozenset()
        self.changes = 0
        self._lock = threading.Lock()

    def add(self, group: str, id: str, obj: object, *, replace: bool) -> EntrySpec:
        """Add an entry; the caller has checked group and id.

        Raises:
            RegistryError: another object is registered under this id, or the group is frozen.
        """
        target = f"{getattr(obj, '__module__', '?')}:{getattr(obj, '__qualname__', type(obj).__qualname__)}"
        with self._lock:
            present = self.entries.get((group, id))
            if present is not None and present[1] is obj and present[2] == replace:
                return present[0]
            self._refuse_frozen(group, f"{id!r} cannot be registered")
            if present is not None and present[1] is not obj and not replace:
                raise RegistryError(
                    f"{id!r} in {group} is registered already, as {present[0].target}; "
                    f"pass replace=True to replace it by {target}"
                )
            spec = EntrySpec(id, group, target, RUNTIME, "", "", origin=RUNTIME)
            self.entries[group, id] = (spec, obj, replace)
            self.changes += 1
            return spec

    def of(self, group: str) -> dict[tuple[str, str], tuple[EntrySpec, object, bool]]:
        """Return the entries of one group."""
        return {key: value for key, value in self.entries.items() if key[0] == group}

    def restore(self, group: str, entries: Registered) -> None:
        """Set the entries of one group.

        Raises:
            RegistryError: that changes something, and the group is frozen.
        """
        with self._lock:
            if _identity(self.of(group)) != _identity(entries):
                self._refuse_frozen(group, "what was registered cannot be undone")
                others = {key: value for key, value in self.entries.items() if key[0] != group}
                self.entries = {**others, **entries}
                self.changes += 1

    def object(self, spec: EntrySpec) -> object:
        """Return the object that an entry stands for.

        Raises:
            RegistryError: it is not registered any more.
        """
        registered = self.entries.get((spec.group, spec.id))
        if registered is None:
            raise RegistryError(f"{spec.id!r} in {spec.group} was registered by the program and is no longer")
        return registered[1]

    def replaces(self, group: str, id: str) -> bool:
        """Whether an entry stands in for all other claims."""
        registered = self.entries.get((group, id))
        return registered is not None and registered[2]

    def _refuse_frozen(self, group: str, what: str) -> None:
        if self.frozen or group in self.frozen_groups:
            raise RegistryError(
                f"{what}: the registry {group} is frozen, because a job runs on what it offered at its start; "
                "register before that"
            )


def _identity(entries: Registered) -> dict[tuple[str, str], tuple[int, bool]]:
    """By identity: what is registered may not be comparable."""
    return {key: (id(obj), replace) for key, (_, obj, replace) in entries.items()}
