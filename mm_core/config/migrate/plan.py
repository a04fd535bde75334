"""The values of the new job file, where each came from, and what changes on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from mm_core.config.document import Document
from mm_core.config.findings import show
from mm_core.config.migrate.flag_words import ForeignFlag
from mm_core.config.migrate.sources import ForeignJob
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.overrides import FLAG_OF, SECTIONS
from mm_core.config.paths import PATH_KEYS
from mm_core.config.secrets import HIDDEN, hide, is_secret

#: Keys whose value may be several paths, with commas between them.
_SEVERAL = frozenset({"dataset", "val_dataset"})

ChangeKind: TypeAlias = Literal["legacy", "path", "secret", "section", "overruled", "added", "dropped"]


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was.

    Attributes:
        kind: `legacy`: a key has its new spelling; `path`: a relative path is meant from elsewhere; `secret`: left out;
            `section`: a flag's file became a section; `overruled`: another flag counts; `added`: from the launcher;
            `dropped`: it has no place in a job file.
        place: where it was; None if it was nowhere.
        old: what was there, without secrets; "" for nothing.
        path: where it is now; () for nowhere.
        new: what is there, without secrets; the writer fills it in from the file where it is "".
    """

    kind: ChangeKind
    place: Origin | None
    old: str
    path: KeyPath = ()
    new: str = ""


@dataclass
class Plan:
    """The new file's content.

    Attributes:
        values: `plugins`, `gpt_args`, `model`, `data`, `tools`, `fsdp2`, as far as there is one.
        origins: path in the new file -> where its value was written.
        remarks: path -> what to say of it besides.
        secrets: path -> where a secret stood that is left out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    remarks: dict[KeyPath, str] = field(default_factory=dict)
    secrets: dict[KeyPath, Origin] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def moved(self) -> int:
        """Return how many values are as they were."""
        return len(self.leaves - {change.path for change in self.changes})

    @property
    def leaves(self) -> set[KeyPath]:
        """The paths of all values that are no objects, nor lists of objects."""
        return set(self._leaves(self.values, ()))

    def _leaves(self, node: Any, path: KeyPath) -> list[KeyPath]:
        if isinstance(node, Mapping) and (node or not path):
            return [leaf for key, value in node.items() for leaf in self._leaves(value, (*path, key))]
        if isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
            return [leaf for index, item in enumerate(node) for leaf in self._leaves(item, (*path, index))]
        return [path]

    def rename(self, path: KeyPath, new: str) -> None:
        """Give the key at `path` its new spelling, in its old place."""
        node: Any = self.values
        for part in path[:-1]:
            node = node[part]
        old = path[-1]
        if not isinstance(node, dict) or old not in node or new in node:
            return  # both spellings are given: the check says so
        items = [(new if key == old else key, value) for key, value in node.items()]
        node.clear()
        node.update(items)
        renamed: KeyPath = (*path[:-1], new)
        self.origins = {_renamed(place, path, renamed): origin for place, origin in self.origins.items()}
        self.remarks = {_renamed(place, path, renamed): text for place, text in self.remarks.items()}
        self.secrets = {_renamed(place, path, renamed): origin for place, origin in self.secrets.items()}
        self.remarks[renamed] = "; ".join(filter(None, [self.remarks.get(renamed), f"was {old}"]))
        shown = f"{old}: {_shown(node[new], new)}"
        self.changes.append(Change("legacy", self.origins.get(renamed), shown, renamed))


def _renamed(place: KeyPath, old: KeyPath, new: KeyPath) -> KeyPath:
    return (*new, *place[len(old) :]) if place[: len(old)] == old else place


def make_plan(job: ForeignJob, folder: str) -> Plan:
    """Put a foreign job together as the content of a job file in `folder` (from the working directory)."""
    return _Planner(job, folder).plan()


class _Planner:
    def __init__(self, job: ForeignJob, folder: str) -> None:
        self.job = job
        self.result = Plan()
        self.folder = folder or "."

    def plan(self) -> Plan:
        job, plan = self.job, self.result
        if job.plugins is not None:
            plan.values["plugins"] = job.plugins
        flags: dict[str, Any] = {}
        for flag in job.flags.values():
            self._flag(flags, flag)
        self._ranks(flags)
        if flags:
            plan.values["gpt_args"] = flags
        for flag in job.overruled:
            plan.changes.append(Change("overruled", flag.origin, flag.shown))
        for section in SECTIONS:
            document = job.sections.get(section)
            if document is not None:
                self._section(section, document)
        for name, origin in job.holders:
            plan.changes.append(Change("dropped", origin, f"{name}: its value stands where it was used"))
        return plan

    # -- flags
    # ------------------------------------------------------------------------------------------------------

    def _flag(self, flags: dict[str, Any], flag: ForeignFlag) -> None:
        plan, place = self.result, ("gpt_args", flag.name)
        plan.origins[place] = flag.origin
        if is_secret(flag.name):
            self._secret(place, flag.origin, f"{flag.spelling} {HIDDEN}")
            return
        if flag.value_line is not None:
            plan.remarks[place] = f"value from line {flag.value_line}"
        value = flag.value
        if flag.name in PATH_KEYS and isinstance(value, str):
            value = self._moved_path(place, value, flag.origin, flag.shown)
        flags[flag.name] = value

    def _ranks(self, flags: dict[str, Any]) -> None:
        """A job of one machine needs no launcher: `mm train` starts its ranks."""
        launcher = self.job.launcher
        if (
            launcher is None
            or launcher.ranks is None
            or not launcher.single_node
            or "nproc_per_node" in flags
        ):
            return
        place: KeyPath = ("gpt_args", "nproc_per_node")
        flags["nproc_per_node"] = launcher.ranks
        origin = Origin("file", self.job.script, launcher.line)
        self.result.origins[place] = origin
        self.result.remarks[place] = "the launcher's argument: `mm train` starts the ranks itself"
        self.result.changes.append(Change("added", origin, f"{launcher.program} … {launcher.ranks}", place))

    # -- sections
    # ------------------------------------------------------------------------------------------------------

    def _section(self, section: str, document: Document) -> None:
        job, plan = self.job, self.result
        named = job.files.get(section)
        if named is not None:
            origin, old = (
                (Origin("file", named), "") if isinstance(named, str) else (named.origin, named.shown)
            )
            plan.remarks[(section,)] = document.path
            if isinstance(named, ForeignFlag):
                plan.changes.append(Change("section", origin, old or FLAG_OF[section], (section,)))
        plan.values[section] = self._node(document.data, (section,), document)

    def _node(self, node: Any, path: KeyPath, document: Document) -> Any:
        origin = document.key_origin(path[1:]) if isinstance(path[-1], str) else document.origin(path[1:])
        self.result.origins[path] = origin
        if isinstance(node, Mapping):
            result = {}
            for key, value in node.items():
                place = (*path, key)
                if is_secret(key) and value not in (None, "", True, False):
                    self._secret(place, document.key_origin(place[1:]), f"{key}: {HIDDEN}")
                else:
                    result[key] = self._node(value, place, document)
            return result
        if isinstance(node, list):
            return [self._node(item, (*path, index), document) for index, item in enumerate(node)]
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        if isinstance(node, str) and key in PATH_KEYS:
            return self._moved_path(path, node, origin, f"{key}: {hide(node)}")
        if isinstance(node, str) and hide(node) != node:
            self._secret(path, origin, f"{key}: {hide(node)}")
            return hide(node)
        return node

    def _secret(self, path: KeyPath, origin: Origin, shown: str) -> None:
        self.result.secrets[path] = origin
        self.result.changes.append(Change("secret", origin, shown))

    # -- paths
    # ------------------------------------------------------------------------------------------------------

    def _moved_path(self, place: KeyPath, value: str, origin: Origin, shown: str) -> str:
        """Return a path as it is meant from the new file's folder."""
        if hide(value) != value:
            self._secret(place, origin, shown)
            return hide(value)
        if place[-1] in _SEVERAL and "," in value:
            new = ",".join(self._relative(part.strip(), origin) for part in value.split(","))
        else:
            new = self._relative(value, origin)
        if new != value:
            before = self.result.remarks.get(place, "")
            self.result.remarks[place] = "; ".join(filter(None, [before, f"was {value}"]))
            self.result.changes.append(Change("path", origin, shown, place))
        return new

    def _relative(self, value: str, origin: Origin) -> str:
        if not value or value.startswith("~") or "://" in value or os.path.isabs(value):
            return value
        seen = self.job.seen(value, origin)
        if os.path.realpath(self.folder) == os.path.realpath(".") and seen == value:
            return value
        # From the real folders: a symbolic link on the way to the new file would lead elsewhere.
        new = os.path.relpath(os.path.realpath("."), os.path.realpath(self.folder))
        moved = os.path.normpath(os.path.join(new, seen))
        return moved + "/" if value.endswith("/") and moved != "/" else moved


def _shown(value: Any, key: str) -> str:
    return HIDDEN if is_secret(key) else hide(show(value))
