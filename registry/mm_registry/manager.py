"""The plugin manager: what is installed, which entry an id means, and its import."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mm_registry.errors import RegistryError
from mm_registry.groups import GROUPS
from mm_registry.loading import Imports
from mm_registry.runtime import Registered, RuntimeEntries
from mm_registry.selection import USUAL, Selection, SelectionLayer, layers_of
from mm_registry.spec import EXCLUDED, RUNTIME, Diagnostic, DiscoveryReport, EntrySpec, canonical_name
from mm_registry.suggestions import closest, unknown_id
from mm_registry.words import visible

if TYPE_CHECKING:
    from mm_registry.discovery import Installed, Record
    from mm_registry.explain import Explanation
    from mm_registry.hooks import ActiveHooks
    from mm_registry.resolution import Claims, Meaning

Place = str | os.PathLike[str] | None


class PluginManager:
    """Finds entries by metadata alone, decides between claims, imports targets once.

    Metadata and selection files are read at the first question and kept: a manager is a snapshot of the
    environment. Every method that asks something raises SelectionError if a selection file cannot be used.

    Args:
        path: where to look for distributions; None means `sys.path` at the first question. (Targets are
            always imported the usual way, through `sys.path`.)
        environ: where to read `MM_PLUGINS`; None means `os.environ` at the first question.
        environment_file: the environment's selection file; None means that none is read.
        project_folder: where to look for the project's selection file, upwards; None means nowhere.
    """

    def __init__(
        self,
        path: Sequence[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        environment_file: Place = USUAL,
        project_folder: Place = USUAL,
    ) -> None:
        self._path = path
        self._environ = environ
        self._places: tuple[Place, Place] = (environment_file, project_folder)
        self._lock = threading.RLock()
        self._installed: Installed | None = None
        self._found: tuple[EntrySpec, ...] = ()
        self._odd: tuple[Diagnostic, ...] = ()
        self._layers: tuple[SelectionLayer, ...] = ()
        self._job: SelectionLayer | None = None
        self._runtime = RuntimeEntries()
        self._claims_cache: tuple[int, Claims] | None = None
        self._imports = Imports()
        self.warned_of: set[tuple[str, str]] = set()  # (group, old id) of which a warning was logged

    # What there is

    def discover(self) -> DiscoveryReport:
        """Return every entry that is installed or registered, and what was odd. Imports no plugin."""
        claims = self._claims()
        entries = (spec for ids in claims.groups.values() for specs in ids.values() for spec in specs)
        shown = sorted((self._shown(claims, spec) for spec in entries), key=lambda spec: spec.key)
        return DiscoveryReport(tuple(shown), self._diagnostics())

    def specs(self, group: str) -> tuple[EntrySpec, ...]:
        """Return the entries of a group by id, then distribution; unusable ones too, `status` and `detail`
        saying why.
        """
        claims = self._claims()
        entries = (spec for specs in self._ids(group).values() for spec in specs)
        return tuple(sorted((self._shown(claims, spec) for spec in entries), key=lambda spec: spec.key))

    def ids(self, group: str) -> tuple[str, ...]:
        """Return the ids that are claimed in a group, sorted; old ids (aliases) are not among them."""
        return tuple(sorted(self._ids(group)))

    def version(self, distribution: str) -> str | None:
        """Return the version of an installed distribution, ours or not; None if it is not installed."""
        return self._read().version(distribution)

    def distributions(self) -> tuple[Record, ...]:
        """Return what the metadata of every distribution with entries of ours says, by name."""
        return tuple(sorted(self._read().records, key=lambda record: canonical_name(record.name)))

    def record(self, distribution: str) -> Record | None:
        """Return the same of one distribution; None if it is not installed or has no entry of ours."""
        return self._read().record(distribution)

    def plugin_set(self) -> dict[str, Any]:
        """Return, JSON-able, what decides the meaning of ids: `{"core": {distribution: version}, "claims":
        [[group, id, distribution, version, target], …]}` with the usable claims that did not lose their id.
        Folders do not count.
        """
        from mm_registry.explain import plugin_set

        return plugin_set(self._claims(), self.version)

    def fingerprint(self) -> str:
        """Return a hex digest of `plugin_set()`: equal where the same ids mean the same things."""
        import hashlib
        import json

        return hashlib.sha256(json.dumps(self.plugin_set(), sort_keys=True).encode()).hexdigest()

    # Which entry an id means

    def resolve(self, group: str, id: str, distribution: str | None = None) -> EntrySpec:
        """Return the entry that `id` (or `distribution/id`) means in a group; an old id means the entry of
        its new one. Imports nothing.

        Raises:
            UnknownIdError: nothing offers it.
            AmbiguousIdError: several distributions do, and neither the id nor a `prefer` names one.
            UnavailablePluginError: it is disabled or not allowed, made for another API version, or lacks an
                extra.
            BrokenPluginError: its declaration is malformed, or its import failed before.
        """
        from mm_registry.resolution import ambiguous, refuse_unusable

        meaning = self._meaning(group, id, distribution)
        if not meaning.claims:
            raise unknown_id(
                group,
                meaning.id,
                self._claims().groups,
                self.version,
                distribution=meaning.distribution,
                diagnostics=self._odd,
            )
        if meaning.spec is None:
            contenders = [spec for spec in meaning.claims if spec.status not in EXCLUDED]
            raise ambiguous(group, meaning.id, contenders)
        refuse_unusable(meaning.spec)
        self._imports.refuse_failed(meaning.spec)
        return meaning.spec

    def offers(self, group: str, id: str) -> bool:
        """Whether any distribution claims `id` (or `distribution/id`, or the old id), usable or not."""
        return bool(self._meaning(group, id).claims)

    def alias(self, group: str, id: str) -> str | None:
        """Return what to write instead if `id` is an old id; None if it is none."""
        meaning = self._meaning(group, id)
        if meaning.alias is None or meaning.spec is None or meaning.spec is meaning.alias:
            return None
        new = meaning.spec
        plain = self._meaning(group, new.id).spec
        if meaning.distribution is None and plain is not None and plain.key == new.key:
            return new.id
        return new.qualified_id

    def find(self, group: str, id: str, distribution: str | None = None) -> EntrySpec | None:
        """Return the optional companion of a component (its config class, sharding policy, weights adapter or
        example), or None.

        Args:
            group: `"mm_core.configs"`, …
            id: `role/id` of the component, without a distribution.
            distribution: the component's, whose own companion comes first. A distribution that offers the
                same component itself means its companion for that one, so it is not considered for another's.

        Raises:
            AmbiguousIdError, UnavailablePluginError, BrokenPluginError: as `resolve`; those of distributions
                that do not take part do not count.
        """
        self._ids(group)  # refuses a group that does not exist
        claims = self._claims()
        companions = claims.companions(group, id, distribution)
        if not companions:
            return None
        spec = claims.choose(group, id, companions)
        self._imports.refuse_failed(spec)
        return spec

    def explain(self, group: str, id: str) -> Explanation:
        """Return how `id` was decided: every claim with its verdict, the lines of selection that mattered, and
        the outcome in words. Imports nothing; an unknown id is an outcome, not an error.
        """
        from mm_registry.explain import explain

        return explain(self, self._claims(), self._meaning(group, id), group, id)

    # Which distributions take part

    @property
    def selection(self) -> Selection:
        """What `MM_PLUGINS`, the selection files and the job say together."""
        self._read()
        return Selection((*self._layers, self._job) if self._job is not None else self._layers)

    def select_for_job(self, layer: SelectionLayer | None) -> None:
        """Let a job's own selection take the place of the last one's; None takes that away. Claims are decided
        anew; objects that were imported stay.

        Raises:
            RegistryError: the manager is frozen, and this changes something.
        """
        with self._lock:
            if layer == self._job:
                return
            if self._runtime.frozen:
                raise RegistryError(
                    "a job's selection of plugins cannot be applied: the registries are frozen, because a job "
                    "runs on what they offered at its start; use a process of its own"
                )
            self._job = layer
            self._claims_cache = None

    def unmatched(self, layer: SelectionLayer) -> list[tuple[str, tuple[str, str], str]]:
        """Return (code, (key, name), message) for each name in a layer that is no installed distribution, and
        for each `prefer` that names one without such an entry.
        """
        from mm_registry.claims import preferred_without_claim

        installed = self._read()
        names = {canonical_name(record.name) for record in installed.records}
        runtime = (spec for spec, _, _ in list(self._runtime.entries.values()))
        absent = layer.unmatched(names, lambda name: installed.version(name) is not None)
        idle = preferred_without_claim(layer, names, (*self._found, *runtime))
        return [
            *(("selected-not-installed", key, message) for key, message in absent),
            *(("preferred-without-claim", key, message) for key, message in idle),
        ]

    # Its import

    def load(self, spec: EntrySpec) -> object:
        """Import the target of an entry, once, and return the object; what was registered at run time is
        returned as it is.

        Raises:
            BrokenPluginError: it cannot be imported. A second call says the same without trying again.
            UnavailablePluginError: the entry must not be used (see `resolve`).
            RegistryError: the entry is a fact about ids, with nothing to import.
        """
        if spec.distribution == RUNTIME:
            return self._runtime.object(spec)
        from mm_registry.resolution import refuse_fact, refuse_unusable

        refuse_unusable(spec)
        refuse_fact(spec)
        return self._imports.load(spec)

    def activate(self, distributions: Iterable[str]) -> ActiveHooks:
        """Import the hooks modules of the named distributions, and of no other, and return them checked.

        Raises:
            UnavailablePluginError: a name is not that of an installed distribution, or it must not be used.
            BrokenPluginError: a hooks module cannot be imported.
            HookError: it implements a hook that does not exist, or wrongly.
        """
        from mm_registry.hooks import activate

        return activate(self, distributions)

    # What the program registers itself

    def register(self, group: str, id: str, obj: object, *, replace: bool = False) -> EntrySpec:
        """Offer `obj` as `id`, as if a distribution named "runtime" did. With `replace`, the plain id means it
        whatever else claims the id.

        Raises:
            RegistryError: the program registered another object under this id, the id is malformed, the group
                holds nothing to import, or it is frozen.
        """
        from mm_registry.claims import misnamed

        problem = misnamed(group, id)
        if problem is None and not GROUPS[group].has_targets:
            problem = f"{group} holds facts about ids, which only a distribution's metadata can state"
        if problem is not None:
            raise RegistryError(problem)
        return self._runtime.add(group, id, obj, replace=replace)

    def runtime_entries(self, group: str) -> Registered:
        """Return what the program registered in a group, to be handed to `restore_runtime`."""
        return self._runtime.of(group)

    def restore_runtime(self, group: str, entries: Registered) -> None:
        """Set what the program registered in a group back to what `runtime_entries` returned.

        Raises:
            RegistryError: the group is frozen, and this changes something.
        """
        self._runtime.restore(group, entries)

    def freeze(self, group: str | None = None) -> None:
        """Refuse from now on whatever would change what ids mean, in one group or in all: `register`,
        `restore_runtime`, and (when all are frozen) `select_for_job`. Repeating what is so already is allowed.
        """
        if group is None:
            self._runtime.frozen = True
        else:
            self._ids(group)  # refuses a group that does not exist
            self._runtime.frozen_groups |= {group}

    @property
    def frozen(self) -> bool:
        """Whether all groups are frozen."""
        return self._runtime.frozen

    @contextmanager
    def temporary(self, group: str) -> Iterator[None]:
        """Undo, at the end of the block, what was registered in a group or frozen in it."""
        runtime = self._runtime
        before, frozen = runtime.of(group), (runtime.frozen, runtime.frozen_groups)
        try:
            yield
        finally:
            runtime.frozen, runtime.frozen_groups = frozen
            runtime.restore(group, before)

    # Inside

    def _read(self) -> Installed:
        with self._lock:
            if self._installed is None:
                from mm_registry.claims import claims_of_all
                from mm_registry.discovery import read_installed

                environ = os.environ if self._environ is None else self._environ
                layers = layers_of(environ, *self._places)
                installed = read_installed(sys.path if self._path is None else self._path)
                self._found, self._odd = claims_of_all(installed)
                self._layers = layers
                self._installed = installed
            return self._installed

    def _diagnostics(self) -> tuple[Diagnostic, ...]:
        odd = list(self._odd)
        for layer in self.selection.layers:
            for code, (_, name), message in self.unmatched(layer):
                odd.append(Diagnostic("warning", code, message, name, layer.origin))
        said = (diagnostic._replace(message=visible(diagnostic.message)) for diagnostic in odd)
        return tuple(sorted(said, key=lambda d: (d.level, d.code, d.distribution, d.path, d.message)))

    def _claims(self) -> Claims:
        with self._lock:
            changes = self._runtime.changes
            if self._claims_cache is None or self._claims_cache[0] != changes:
                from mm_registry.resolution import Claims

                self._read()
                self._claims_cache = (changes, Claims(self._found, self._runtime, self.selection))
            return self._claims_cache[1]

    def _ids(self, group: str) -> Mapping[str, Sequence[EntrySpec]]:
        if group not in GROUPS:
            near = closest(group, GROUPS, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"the groups are {', '.join(GROUPS)}"
            raise RegistryError(f"there is no group {group!r}; {mend}")
        return self._claims().groups.get(group, {})

    def _meaning(self, group: str, id: str, distribution: str | None = None) -> Meaning:
        self._ids(group)  # refuses a group that does not exist
        return self._claims().meaning(group, id, distribution)

    def listed(self, spec: EntrySpec) -> EntrySpec:
        """Return an entry with the status that `specs` and `discover` show."""
        return self._shown(self._claims(), spec)

    def _shown(self, claims: Claims, spec: EntrySpec) -> EntrySpec:
        failed = self._imports.failed(spec)
        return failed if failed is not None and spec.status not in EXCLUDED else claims.shown(spec)


_default: PluginManager | None = None
_default_lock = threading.Lock()


def default_manager() -> PluginManager:
    """Return the manager of this process, over `sys.path` and `os.environ`; made at the first call."""
    global _default
    with _default_lock:
        if _default is None:
            _default = PluginManager()
        return _default


def reset_default_manager() -> None:
    """Forget the manager of this process, and what was registered in it: the next question reads the
    environment anew (for tests).
    """
    global _default
    with _default_lock:
        _default = None
