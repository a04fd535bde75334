"""Decides which claim an id means. Pure: from claims and selection to an entry or an error; the order in which
claims were found never matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mm_registry.errors import AmbiguousIdError, RegistryError, UnavailablePluginError
from mm_registry.groups import ALIASES, COMPANION_GROUPS, GROUPS, ROLES, id_key
from mm_registry.loading import broken
from mm_registry.runtime import RuntimeEntries
from mm_registry.selection import PROJECT_FILE, Selection
from mm_registry.spec import EXCLUDED, RUNTIME, EntrySpec, Status, canonical_name


class Meaning(NamedTuple):
    """What an id means before it is known whether that may be used.

    `claims` are all claims to it, `spec` the one that it means (None: nobody claims it, or it is ambiguous),
    `alias` the entry that makes it an old id of `spec`, `why` what settled it if there were several; `id` and
    `distribution` are the parts of `distribution/id`.
    """

    id: str
    distribution: str | None
    claims: Sequence[EntrySpec]
    spec: EntrySpec | None = None
    alias: EntrySpec | None = None
    why: str = ""


class Claims:
    """All claims under one selection, by group and id. A snapshot: it is made anew when the program registers
    something or a job brings its own selection.

    Args:
        found: the claims of installed distributions, sorted by `key`.
        runtime: what the program registered.
        selection: which distributions take part, and what is preferred.
    """

    def __init__(self, found: Iterable[EntrySpec], runtime: RuntimeEntries, selection: Selection) -> None:
        self.selection = selection
        self._runtime = runtime
        claims: dict[str, dict[str, list[EntrySpec]]] = defaultdict(lambda: defaultdict(list))
        excluded: dict[str, tuple[Status, str] | None] = {}
        for spec in found:
            if spec.distribution not in excluded:
                excluded[spec.distribution] = selection.excludes(spec.distribution)
            verdict = excluded[spec.distribution]
            if verdict is not None:
                spec = spec._replace(status=verdict[0], detail=verdict[1])
            claims[spec.group][spec.id].append(spec)
        for spec, _, _ in list(runtime.entries.values()):
            claims[spec.group][spec.id].append(spec)
        self.groups: Mapping[str, Mapping[str, Sequence[EntrySpec]]] = {
            group: dict(ids) for group, ids in claims.items()
        }

    def meaning(self, group: str, id: str, distribution: str | None = None) -> Meaning:
        """Return what `id` or `distribution/id` means."""
        name = id
        if distribution is None and not self._known(group, id):
            distribution, name = split(group, id)
        real = _of(self._to(group, name), distribution)
        aliases = _of(self._aliases(group, name), distribution)
        for claims in (real, aliases):  # an id that exists wins over an old id of another distribution
            if any(spec.status not in EXCLUDED for spec in claims):
                spec, why = self._settle(group, name, claims)
                if claims is real or spec is None:
                    return Meaning(name, distribution, claims, spec, None, why)
                return Meaning(name, distribution, claims, self._new(group, spec), spec, why)
        claims = real or aliases
        return Meaning(name, distribution, claims, min(claims, key=_key) if claims else None)

    def claims_to(self, group: str, id: str) -> list[EntrySpec]:
        """Return every claim to an id and, after those, to it as an old id."""
        return [*self._to(group, id), *self._aliases(group, id)]

    def choose(self, group: str, id: str, claims: Sequence[EntrySpec]) -> EntrySpec:
        """Return the one of some claims to an id that may be used.

        Raises:
            AmbiguousIdError, UnavailablePluginError, BrokenPluginError: there is none.
        """
        spec, _ = self._settle(group, id, claims)
        if spec is None:
            raise ambiguous(group, id, [spec for spec in claims if spec.status not in EXCLUDED])
        return refuse_unusable(spec)

    def companions(self, group: str, id: str, distribution: str | None) -> list[EntrySpec]:
        """Return the claims to a companion that count for the component of one distribution: its own come
        first, and what a rival declares for its component of that id does not count.
        """
        claims = [spec for spec in self._to(group, id) if spec.status not in EXCLUDED]
        if distribution is None:
            return claims
        wanted = canonical_name(distribution)
        own = _of(claims, distribution)
        role, _, component = id.partition("/")
        rivals: set[str] = set()
        if group in COMPANION_GROUPS and role in ROLES:
            rivals = {spec.key[2] for spec in self._to(ROLES[role].name, component)} - {wanted}
        return own or [spec for spec in claims if spec.key[2] not in rivals]

    def shown(self, spec: EntrySpec) -> EntrySpec:
        """Return a claim as it is listed: `ambiguous` or `shadowed` if its plain id does not mean it."""
        if spec.status is not Status.AVAILABLE or not GROUPS[spec.group].contested:
            return spec
        group, id, claims = spec.group, spec.id, self._to(spec.group, spec.id)
        if group == ALIASES:
            role, _, id = spec.id.partition("/")
            group = ROLES[role].name
            real = [claim for claim in self._to(group, id) if claim.status not in EXCLUDED]
            if real:
                detail = f"{_providers(real)} offers {id!r} itself; write {spec.distribution}/{id} to mean this one"
                return spec._replace(status=Status.SHADOWED, detail=detail)
        chosen, why = self._settle(group, id, claims)
        if chosen is None:
            others = [claim for claim in claims if claim.key != spec.key and claim.status not in EXCLUDED]
            names = ", ".join(claim.provider for claim in others)
            detail = f"{names} claims it too; write {spec.distribution}/{id} to mean this one"
            return spec._replace(status=Status.AMBIGUOUS, detail=detail)
        if chosen.key != spec.key:
            detail = f"{why}; write {spec.distribution}/{id} to mean this one"
            return spec._replace(status=Status.SHADOWED, detail=detail)
        return spec

    def _settle(self, group: str, id: str, claims: Sequence[EntrySpec]) -> tuple[EntrySpec | None, str]:
        """(the claim that counts, what settled it); (None, "") if nothing does. An unusable claim contests like
        any other: mending it must not change silently what an id means.
        """
        contenders = [spec for spec in claims if spec.status not in EXCLUDED]
        if len(contenders) < 2:
            return (contenders or [min(claims, key=_key)])[0], ""
        if self._runtime.replaces(group, id):
            for spec in contenders:
                if spec.distribution == RUNTIME:
                    return spec, "the running program replaced it (by register with replace=True)"
        keys = [id_key(group, id), *([id] if group in COMPANION_GROUPS else [])]
        for key in keys:
            preferred = self.selection.preferred(key)
            for spec in contenders if preferred else ():
                if preferred and spec.key[2] == preferred[0]:
                    return spec, f"{preferred[1]} prefers {spec.distribution}"
        return None, ""

    def _to(self, group: str, id: str) -> Sequence[EntrySpec]:
        return self.groups.get(group, {}).get(id, ())

    def _aliases(self, group: str, id: str) -> Sequence[EntrySpec]:
        group_ = GROUPS[group]
        return self._to(ALIASES, f"{group_.role}/{id}") if group_.is_component else ()

    def _known(self, group: str, id: str) -> bool:
        return bool(self._to(group, id) or self._aliases(group, id))

    def _new(self, group: str, alias: EntrySpec) -> EntrySpec:
        """The entry of the same distribution that an alias stands for; the alias itself if it is broken."""
        own = _of(self._to(group, alias.target), alias.distribution)
        return own[0] if own and alias.status is not Status.BROKEN else alias


def split(group: str, id: str) -> tuple[str | None, str]:
    """(distribution, id) of `distribution/id`; where entries are named `role/id` there is a slash more."""
    head, slash, rest = id.partition("/")
    if not slash or (GROUPS[group].by_role and "/" not in rest):
        return None, id
    return head, rest


def ambiguous(group: str, id: str, specs: Sequence[EntrySpec]) -> AmbiguousIdError:
    """The error for several claims to one id; it prints the lines that settle it."""
    specs = sorted(specs, key=_key)
    about = GROUPS[group]
    claims = " and ".join(spec.provider for spec in specs)
    key = id_key(group, id)
    first, *others = (canonical_name(spec.distribution) for spec in specs)
    rest = f" (or {', or '.join(_quoted(name) for name in others)})"
    settle = f"put {_quoted(key)} = {_quoted(first)}{rest} under [plugins.prefer] in {PROJECT_FILE}"
    if about.is_component:
        choices = " or ".join(_quoted(f"{spec.distribution}/{id}") for spec in specs)
        settle = f"write the one that you mean under {about.chosen_by}: {choices}, or {settle}"
    as_old = " (as an old id)" if specs[0].group == ALIASES else ""
    return AmbiguousIdError(f"the {about.noun} {id!r} is offered by {claims}{as_old}; {settle}", tuple(specs))


def refuse_unusable(spec: EntrySpec) -> EntrySpec:
    """Return an entry if it may be used, as far as metadata tells; raise what says why not."""
    if spec.status is Status.BROKEN:
        raise broken(spec, spec.detail)
    if spec.status in EXCLUDED or spec.status in (Status.INCOMPATIBLE, Status.MISSING_EXTRA):
        message = (
            f"the {GROUPS[spec.group].noun} {spec.id!r} of {spec.provider} cannot be used: {spec.detail}"
        )
        raise UnavailablePluginError(message, spec)
    return spec


def refuse_fact(spec: EntrySpec) -> None:
    """Raise RegistryError for an entry whose value is nothing to import."""
    if not GROUPS[spec.group].has_targets:
        raise RegistryError(
            f"the {GROUPS[spec.group].noun} {spec.id!r} of {spec.provider} is nothing to import: its value is "
            f"{spec.target!r}"
        )


def _of(claims: Sequence[EntrySpec], distribution: str | None) -> list[EntrySpec]:
    if distribution is None:
        return list(claims)
    wanted = canonical_name(distribution)
    return [spec for spec in claims if spec.key[2] == wanted]


def _key(spec: EntrySpec) -> tuple[str, str, str]:
    return spec.key


def _providers(specs: Sequence[EntrySpec]) -> str:
    return " and ".join(spec.provider for spec in specs)


def _quoted(text: str) -> str:
    return f'"{text}"'
