"""The plugin manager: what is installed, which entry an id means, and its import."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mm_registry.errors import AmbiguousIdError, BrokenPluginError, RegistryError, UnavailablePluginError
from mm_registry.groups import COMPANION_GROUPS, GROUPS, HOOKS, ROLES
from mm_registry.loading import broken, import_target
from mm_registry.selection import VARIABLE, Selection
from mm_registry.spec import RUNTIME, Diagnostic, DiscoveryReport, EntrySpec, Status, canonical_name
from mm_registry.suggestions import closest, unknown_id

if TYPE_CHECKING:
    from mm_registry.discovery import Installed
    from mm_registry.hooks import ActiveHooks

_Claims = Mapping[str, Mapping[str, Sequence[EntrySpec]]]  # group -> id -> claims, by distribution name


class PluginManager:
    """Finds entries by metadata alone, decides between claims, imports targets once.

    Metadata is read at the first question and kept: a manager is a snapshot of the environment.

    Args:
        path: where to look for distributions; None means `sys.path` at the first question. (Targets are
            always imported the usual way, through `sys.path`.)
        environ: where to read `MM_PLUGINS`; None means `os.environ` at the first question.
    """

    def __init__(
        self, path: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._environ = environ
        self._lock = threading.RLock()
        self._installed: Installed | None = None
        self._found: tuple[EntrySpec, ...] = ()
        self._diagnostics: tuple[Diagnostic, ...] = ()
        self._selection = Selection()
        self._runtime: dict[tuple[str, str], tuple[EntrySpec, object, bool]] = {}
        self._claims_cache: _Claims | None = None
        self._objects: dict[tuple[str, str, str], object] = {}
        self._failures: dict[tuple[str, str, str], BrokenPluginError] = {}

    # What there is

    def discover(self) -> DiscoveryReport:
        """Return every entry that is installed or registered, and what was odd. Imports no plugin."""
        from mm_registry.claims import with_ambiguity

        self._read()
        entries = (spec for ids in self._claims().values() for claims in ids.values() for spec in claims)
        return DiscoveryReport(
            with_ambiguity(self._after_imports(spec) for spec in entries), self._diagnostics
        )

    def specs(self, group: str) -> tuple[EntrySpec, ...]:
        """Return the entries of a group by id, then distribution; unusable ones too, `status` and `detail`
        saying why.
        """
        from mm_registry.claims import with_ambiguity

        entries = (spec for claims in self._ids(group).values() for spec in claims)
        return with_ambiguity(self._after_imports(spec) for spec in entries)

    def ids(self, group: str) -> tuple[str, ...]:
        """Return the ids that are claimed in a group, sorted."""
        return tuple(sorted(self._ids(group)))

    def version(self, distribution: str) -> str | None:
        """Return the version of an installed distribution, ours or not; None if it is not installed."""
        return self._read().version(distribution)

    def fingerprint(self) -> str:
        """Return a hex digest of every usable claim (group, id, distribution, version, target) and of the
        core's versions: equal where the same ids mean the same things. Folders do not count.
        """
        claims = [
            [*spec.key, spec.version, spec.target]
            for spec in self.discover().entries
            if spec.status is not Status.BLOCKED
        ]
        core = [self.version("mmzoo-registry"), self.version("mmzoo-core")]
        return hashlib.sha256(json.dumps([core, sorted(claims)]).encode()).hexdigest()

    # Which entry an id means

    def resolve(self, group: str, id: str, distribution: str | None = None) -> EntrySpec:
        """Return the entry that `id` (or `distribution/id`) means in a group. Imports nothing.

        Raises:
            UnknownIdError: nothing offers it.
            AmbiguousIdError: several distributions do, and none was named.
            UnavailablePluginError: it is blocked, made for another API version, or lacks an extra.
            BrokenPluginError: its declaration is malformed, or its import failed before.
        """
        claims, name, distribution = self._claimants(group, id, distribution)
        if not claims:
            raise unknown_id(
                group,
                name,
                self._claims(),
                self.version,
                distribution=distribution,
                diagnostics=self._diagnostics,
            )
        return self._decide(claims)

    def offers(self, group: str, id: str) -> bool:
        """Whether any distribution claims `id` (or `distribution/id`), usable or not."""
        return bool(self._claimants(group, id)[0])

    def find(self, group: str, id: str, distribution: str | None = None) -> EntrySpec | None:
        """Return the optional companion of a component (its config class, sharding policy or weights
        adapter), or None.

        Args:
            group: `"mm_core.configs"`, …
            id: `role/id` of the component, without a distribution.
            distribution: the component's, whose own companion comes first. A distribution that offers the
                same component itself means its companion for that one, so it is not considered for another's.

        Raises:
            AmbiguousIdError, UnavailablePluginError, BrokenPluginError: as `resolve`; blocked ones do not
                count as there.
        """
        claims = [spec for spec in self._ids(group).get(id, ()) if spec.status is not Status.BLOCKED]
        if distribution is not None:
            wanted = canonical_name(distribution)
            own = [spec for spec in claims if canonical_name(spec.distribution) == wanted]
            role, _, component = id.partition("/")
            rivals: set[str] = set()
            if group in COMPANION_GROUPS and role in ROLES:
                offers = self._ids(ROLES[role].name).get(component, ())
                rivals = {canonical_name(spec.distribution) for spec in offers} - {wanted}
            claims = own or [spec for spec in claims if canonical_name(spec.distribution) not in rivals]
        return self._decide(claims) if claims else None

    # Its import

    def load(self, spec: EntrySpec) -> object:
        """Import the target of an entry, once, and return the object; what was registered at run time is
        returned as it is.

        Raises:
            BrokenPluginError: it cannot be imported. A second call says the same without trying again.
            UnavailablePluginError: the entry must not be used (see `resolve`).
        """
        if spec.distribution == RUNTIME:
            registered = self._runtime.get((spec.group, spec.id))
            if registered is None:
                raise RegistryError(
                    f"{spec.id!r} in {spec.group} was registered by the program and is no longer"
                )
            return registered[1]
        self._refuse_unusable(spec)
        self._refuse_failed(spec)
        if spec.key not in self._objects:
            # Not under our lock: a module that registers something at its top holds its import lock.
            try:
                found = import_target(spec)
            except BrokenPluginError as error:
                self._failures[spec.key] = error
                raise
            self._objects.setdefault(spec.key, found)
        return self._objects[spec.key]

    def activate(self, distributions: Iterable[str]) -> ActiveHooks:
        """Import the hooks modules of the named distributions, and of no other, and return them checked.

        Raises:
            UnavailablePluginError: a name is not that of an installed distribution, or it must not be used.
            BrokenPluginError: a hooks module cannot be imported.
            HookError: it implements a hook that does not exist, or wrongly.
        """
        from mm_registry.hooks import ActiveHooks

        active = ActiveHooks()
        wanted = {canonical_name(name): name for name in distributions if name != RUNTIME}
        for name, written in sorted(wanted.items()):
            if self.version(name) is None:
                near = closest(name, {canonical_name(spec.distribution) for spec in self._found}, 1)
                mend = f"; did you mean {near[0]!r}?" if near else ""
                raise UnavailablePluginError(f"the distribution {written!r} is not installed{mend}")
        # pluggy calls the module that was registered last first.
        for spec in reversed(self.specs(HOOKS)):
            if canonical_name(spec.distribution) in wanted:
                active.add(spec, self.load(spec))
        active.verify()
        return active

    # What the program registers itself

    def register(self, group: str, id: str, obj: object, *, replace: bool = False) -> EntrySpec:
        """Offer `obj` as `id`, as if a distribution named "runtime" did. With `replace`, it stands in for all
        other claims.

        Raises:
            RegistryError: the program registered another object under this id, or the id is malformed.
        """
        from mm_registry.claims import misnamed

        problem = misnamed(group, id)
        if problem is not None:
            raise RegistryError(problem)
        target = f"{getattr(obj, '__module__', '?')}:{getattr(obj, '__qualname__', type(obj).__qualname__)}"
        with self._lock:
            present = self._runtime.get((group, id))
            if present is not None and present[1] is not obj and not replace:
                raise RegistryError(
                    f"{id!r} in {group} is registered already, as {present[0].target}; "
                    f"pass replace=True to replace it by {target}"
                )
            spec = EntrySpec(id, group, target, RUNTIME, "", "", origin=RUNTIME)
            self._runtime[group, id] = (spec, obj, replace)
            self._claims_cache = None
        return spec

    def runtime_entries(self, group: str) -> dict[tuple[str, str], tuple[EntrySpec, object, bool]]:
        """Return what the program registered in a group, to be handed to `restore_runtime`."""
        return {key: value for key, value in self._runtime.items() if key[0] == group}

    def restore_runtime(
        self, group: str, entries: Mapping[tuple[str, str], tuple[EntrySpec, object, bool]]
    ) -> None:
        """Set what the program registered in a group back to what `runtime_entries` returned."""
        with self._lock:
            others = {key: value for key, value in self._runtime.items() if key[0] != group}
            self._runtime = {**others, **entries}
            self._claims_cache = None

    # Inside

    def _read(self) -> Installed:
        with self._lock:
            if self._installed is None:
                from mm_registry.claims import claims_of
                from mm_registry.discovery import read_installed

                installed = read_installed(sys.path if self._path is None else self._path)
                self._selection = Selection.from_environ(
                    os.environ if self._environ is None else self._environ
                )
                found: list[EntrySpec] = []
                odd = list(installed.diagnostics)
                for record in installed.records:
                    claims, diagnostics = claims_of(record, self._selection, installed.version)
                    found.extend(claims)
                    odd.extend(diagnostics)
                odd.extend(self._unmatched_selection(installed))
                self._found = tuple(sorted(found, key=lambda spec: spec.key))
                self._diagnostics = tuple(
                    sorted(odd, key=lambda d: (d.level, d.code, d.distribution, d.path, d.message))
                )
                self._installed = installed
            return self._installed

    def _unmatched_selection(self, installed: Installed) -> Iterable[Diagnostic]:
        names = {canonical_name(record.name) for record in installed.records}
        for name in sorted(self._selection.allowed or ()):
            if name not in names and installed.version(name) is None:
                near = closest(name, names, 1)
                mend = f"; did you mean {near[0]!r}?" if near else ""
                message = f"{VARIABLE} lists {name!r}, which is not installed{mend}"
                yield Diagnostic("warning", "selected-not-installed", message, name)

    def _claims(self) -> _Claims:
        self._read()
        with self._lock:
            if self._claims_cache is None:
                claims: dict[str, dict[str, list[EntrySpec]]] = defaultdict(lambda: defaultdict(list))
                for spec in self._found:
                    replaced = self._runtime.get((spec.group, spec.id), (None, None, False))[2]
                    if not replaced:
                        claims[spec.group][spec.id].append(spec)
                for spec, _, _ in self._runtime.values():
                    claims[spec.group][spec.id].append(spec)
                self._claims_cache = {group: dict(ids) for group, ids in claims.items()}
            return self._claims_cache

    def _ids(self, group: str) -> Mapping[str, Sequence[EntrySpec]]:
        if group not in GROUPS:
            near = closest(group, GROUPS, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"the groups are {', '.join(GROUPS)}"
            raise RegistryError(f"there is no group {group!r}; {mend}")
        return self._claims().get(group, {})

    def _claimants(
        self, group: str, id: str, distribution: str | None = None
    ) -> tuple[Sequence[EntrySpec], str, str | None]:
        """The claims that `id` or `distribution/id` can mean, and the two parts."""
        ids = self._ids(group)
        if distribution is None and id not in ids:
            distribution, id = _split(group, id)
        claims = ids.get(id, ())
        if distribution is not None:
            wanted = canonical_name(distribution)
            claims = [spec for spec in claims if canonical_name(spec.distribution) == wanted]
        return claims, id, distribution

    def _after_imports(self, spec: EntrySpec) -> EntrySpec:
        failure = self._failures.get(spec.key)
        return failure.spec if failure is not None and failure.spec is not None else spec

    def _decide(self, claims: Sequence[EntrySpec]) -> EntrySpec:
        """Choose among the claims to one id. Their order does not matter: there is one that may be used, or
        an error.
        """
        contenders = sorted(
            (spec for spec in claims if spec.status is not Status.BLOCKED), key=lambda spec: spec.key
        )
        if len(contenders) > 1:
            raise _ambiguous(contenders)
        spec = contenders[0] if contenders else min(claims, key=lambda spec: spec.key)
        self._refuse_unusable(spec)
        self._refuse_failed(spec)
        return spec

    def _refuse_failed(self, spec: EntrySpec) -> None:
        failure = self._failures.get(spec.key)
        if failure is not None:
            raise BrokenPluginError(failure.message, failure.spec) from failure.__cause__

    @staticmethod
    def _refuse_unusable(spec: EntrySpec) -> None:
        if spec.status is Status.BROKEN:
            raise broken(spec, spec.detail)
        if spec.status in (Status.BLOCKED, Status.INCOMPATIBLE, Status.MISSING_EXTRA):
            noun = GROUPS[spec.group].noun
            message = f"the {noun} {spec.id!r} of {spec.provider} cannot be used: {spec.detail}"
            raise UnavailablePluginError(message, spec)


def _split(group: str, id: str) -> tuple[str | None, str]:
    """(distribution, id) of `distribution/id`; ids of companions hold a slash themselves."""
    head, slash, rest = id.partition("/")
    if not slash or (group in COMPANION_GROUPS and "/" not in rest):
        return None, id
    return head, rest


def _ambiguous(specs: Sequence[EntrySpec]) -> AmbiguousIdError:
    group, id = GROUPS[specs[0].group], specs[0].id
    claims = " and ".join(spec.provider for spec in specs)
    choices = " or ".join(f'"{spec.qualified_id}"' for spec in specs)
    if group.is_component:
        mend = f"write the one that you mean under {group.chosen_by}: {choices}"
    else:
        mend = f"uninstall one, or list in {VARIABLE} only the distributions that you mean"
    return AmbiguousIdError(f"the {group.noun} {id!r} is offered by {claims}; {mend}", tuple(specs))


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
