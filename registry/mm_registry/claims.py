"""Turns what distributions declare into claims to ids, each with the status that its own metadata can decide;
which distributions take part is decided later.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from mm_registry.groups import ALIASES, BY_ROLE, FAREWELLS, GROUPS, HOOKS, PROVIDERS, ROLES, id_key
from mm_registry.requirements import VersionOf, api_conflict, in_force, missing_of_extras, required_api
from mm_registry.spec import RUNTIME, Diagnostic, EntrySpec, Status, canonical_name
from mm_registry.suggestions import closest
from mm_registry.words import shown

if TYPE_CHECKING:
    from mm_registry.discovery import Installed, Record
    from mm_registry.selection import SelectionLayer

_NAME = r"[A-Za-z_]\w*"
_TARGET = re.compile(
    rf"\s*(?P<module>{_NAME}(?:\.{_NAME})*)\s*(?::\s*(?P<object>{_NAME}(?:\.{_NAME})*)\s*)?(?:\[(?P<extras>[^\]]*)\]\s*)?"
)
# No slash: `distribution/id` chooses one of several claims.
_ID_LENGTH = 200
_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.+-]{{,{_ID_LENGTH - 1}}}")
_VERSION = re.compile(r"v?[0-9][0-9a-z]*(?:[._-][0-9a-z]+)*")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


def claims_of_all(installed: Installed) -> tuple[tuple[EntrySpec, ...], tuple[Diagnostic, ...]]:
    """Return the claims of all distributions and everything that is odd, both sorted by content."""
    found: list[EntrySpec] = []
    odd = list(installed.diagnostics)
    for record in installed.records:
        claims, diagnostics = claims_of(record, installed.version)
        found.extend(claims)
        odd.extend(diagnostics)
    odd.extend(_old_ids_in_use(found))
    return tuple(sorted(found, key=lambda spec: spec.key)), tuple(odd)


def claims_of(record: Record, version_of: VersionOf) -> tuple[list[EntrySpec], list[Diagnostic]]:
    """Return the claims of one distribution, and what is odd about them."""
    diagnostics: list[Diagnostic] = []

    def odd(level: str, code: str, message: str) -> None:
        text = f"{record.name} {record.version}: {message}"
        diagnostics.append(Diagnostic(level, code, text, record.name, record.path))

    if canonical_name(record.name) == RUNTIME:
        reserved = f"the name {record.name!r} is reserved for what a program registers itself"
        odd(
            "error",
            "reserved-name",
            f"{reserved}, so none of its entries counts; give the distribution another name",
        )
        return [], diagnostics
    ranges, unreadable = required_api(record.requires)
    for line in unreadable:
        odd(
            "warning",
            "unreadable-requirement",
            f"the requirement {shown(line)} cannot be parsed and is not checked",
        )
    conflict = api_conflict(ranges, version_of)

    claims: dict[tuple[str, str], EntrySpec] = {}
    for group, id, value in record.entries:
        problem = misnamed(group, id)
        if problem is not None:
            odd("error", "misnamed-entry", problem)
            continue
        is_fact = not GROUPS[group].has_targets
        target, extras = (_fact(group, value), ()) if is_fact else _parse(value)
        spec = EntrySpec(
            id=id,
            group=group,
            target=target or value,
            distribution=record.name,
            version=record.version,
            path=record.path,
            editable=record.editable,
            origin=record.origin,
            extras=extras,
            required_api=ranges,
        )
        other = claims.get((group, id))
        if other is not None:
            if other.target != spec.target:
                both = " and as ".join(sorted((shown(other.target), shown(spec.target))))
                detail = f"its own distribution declares it twice: as {both}"
                claims[group, id] = other._replace(status=Status.BROKEN, detail=detail)
                odd("error", "declared-twice", f"{id!r} in {group} is declared twice")
            continue
        if is_fact:
            if target is None:
                wanted = _FACTS[group]
                spec = spec._replace(status=Status.BROKEN, detail=f"its value {shown(value)} is not {wanted}")
                odd(
                    "error",
                    "malformed-value",
                    f"the value {shown(value)} of {id!r} in {group} is not {wanted}",
                )
        elif target is None or (":" not in target and group != HOOKS):
            detail = f"its target {shown(value)} is not of the form package.module:object"
            spec = spec._replace(status=Status.BROKEN, detail=detail)
            form = "is not of the form package.module:object"
            odd("error", "malformed-target", f"the target {shown(value)} of {id!r} in {group} {form}")
        elif conflict is not None:
            spec = spec._replace(status=Status.INCOMPATIBLE, detail=conflict)
        elif extras and (missing := _missing(record, extras, version_of)):
            detail = f"it needs {', '.join(missing)}; run: pip install '{record.name}[{','.join(extras)}]'"
            spec = spec._replace(status=Status.MISSING_EXTRA, detail=detail)
        for extra in extras:
            if canonical_name(extra) not in _extras_in(record.requires):
                odd("warning", "unknown-extra", _unknown_extra(group, id, extra, record.requires))
        claims[group, id] = spec
    for (group, id), spec in claims.items():
        if group == ALIASES and spec.status is Status.AVAILABLE:
            claims[group, id], said = _checked_alias(spec, claims)
            if said:
                odd("error", *said)
        elif group == FAREWELLS and (ROLES[id.partition("/")[0]].name, id.partition("/")[2]) in claims:
            odd("warning", "farewell-of-existing", f"it says farewell to {id!r}, which it still offers")
    return list(claims.values()), diagnostics


def misnamed(group: str, id: str) -> str | None:
    """Return why an entry of this group and id can never be asked for; None if it can."""
    if group not in GROUPS:
        near = closest(group, GROUPS, 1)
        mend = f"did it mean {near[0]!r}?" if near else f"the groups are {', '.join(GROUPS)}"
        return f"there is no group {shown(group)} (entry {shown(id)}); {mend}"
    role, slash, rest = id.partition("/")
    if group not in BY_ROLE:
        if _ID.fullmatch(id):
            return None
        return f"{shown(id)} in {group} is not an id: at most {_ID_LENGTH} letters, digits and _ . + - are allowed"
    if slash and role in ROLES and _ID.fullmatch(rest):
        return None
    return f"{shown(id)} in {group} is not of the form role/id; the roles are {', '.join(ROLES)}"


def preferred_without_claim(
    layer: SelectionLayer, names: Collection[str], specs: Iterable[EntrySpec]
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield (key, message) for each `prefer` of a distribution that is installed and has no such entry."""
    offered: dict[str, set[str]] = defaultdict(set)
    if layer.prefer:
        for spec in specs:
            offered[id_key(spec.group, spec.id)].add(spec.key[2])
    for key, name in sorted(layer.prefer.items()):
        if (name in names or name == RUNTIME) and name not in offered[key]:
            others = f"; {', '.join(sorted(offered[key]))} does" if offered[key] else ""
            where = layer.where("prefer", key)
            yield ("prefer", key), f"{where} prefers {name!r} for {key!r}, which it does not offer{others}"


def _missing(record: Record, extras: tuple[str, ...], version_of: VersionOf) -> list[str]:
    """What extras need and is not installed; also of extras that they bring (`acme[video]; extra == "all"`)."""
    wanted = list(extras)
    for extra in wanted:
        for requirement in in_force(record.requires, (extra,)):
            if canonical_name(requirement.name) == canonical_name(record.name):
                wanted += sorted(requirement.extras - set(wanted))
    return missing_of_extras(record.requires, wanted, version_of)


def _extras_in(requires: Iterable[str]) -> set[str]:
    return {canonical_name(name) for line in requires for name in _EXTRA.findall(line)}


def _unknown_extra(group: str, id: str, extra: str, requires: Iterable[str]) -> str:
    near = closest(canonical_name(extra), _extras_in(requires), 1)
    mend = f"; did it mean {near[0]!r}?" if near else ""
    return f"{id!r} in {group} asks for the extra {extra!r}, which brings no requirement{mend}"


def _old_ids_in_use(found: Iterable[EntrySpec]) -> Iterator[Diagnostic]:
    """Say of aliases that another distribution offers the id itself, which wins."""
    aliases = [spec for spec in found if spec.group == ALIASES]
    if not aliases:
        return
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for spec in found:
        if spec.group != ALIASES and GROUPS[spec.group].is_component:
            owners[id_key(spec.group, spec.id)].add((spec.key[2], spec.provider))
    for alias in aliases:
        others = sorted(provider for name, provider in owners[alias.id] if name != alias.key[2])
        if others:
            message = (
                f"{alias.provider}: its old id {alias.id!r} is an id of {' and '.join(others)}, which wins; "
                f"{alias.distribution}/{alias.id.partition('/')[2]} still means {alias.target!r}"
            )
            yield Diagnostic("warning", "alias-is-taken", message, alias.distribution, alias.path)


def _checked_alias(
    spec: EntrySpec, claims: dict[tuple[str, str], EntrySpec]
) -> tuple[EntrySpec, tuple[str, str] | None]:
    """Return an alias with its new id as that is spelt, or as broken with (code, message) of a diagnostic."""
    role, _, old = spec.id.partition("/")
    group = ROLES[role].name

    def refused(code: str, why: str) -> tuple[EntrySpec, tuple[str, str]]:
        detail = f"it is an old id of {spec.target!r}, {why}"
        return spec._replace(status=Status.BROKEN, detail=detail), (
            code,
            f"{spec.id!r} in {ALIASES}: {detail}",
        )

    if (group, old) in claims:
        return refused("alias-is-taken", f"but {old!r} is an id of the same distribution, which wins")
    if (group, spec.target) in claims:
        return spec, None
    if (ALIASES, f"{role}/{spec.target}") in claims:
        return refused("alias-chain", "which is an old id itself; name the newest id")
    # Build backends accept only Python names as values, so - . + are written as _.
    spelt = [id for other, id in claims if other == group and re.sub(r"[-.+]", "_", id) == spec.target]
    if len(spelt) == 1:
        return spec._replace(target=spelt[0]), None
    return refused("alias-to-nothing", f"which {spec.distribution} does not offer")


_FACTS = {
    ALIASES: "the new id",
    FAREWELLS: "the last version that had the id, such as v0_3_2",
    PROVIDERS: "the name of a distribution",
}


def _fact(group: str, value: str) -> str | None:
    """The value of a fact about ids, in its usual spelling; None if it is none."""
    value = value.strip()
    if group == ALIASES:
        return value if _ID.fullmatch(value) else None
    if group == FAREWELLS:
        return value.removeprefix("v").replace("_", ".") if _VERSION.fullmatch(value) else None
    return canonical_name(value) if _DISTRIBUTION.fullmatch(value) else None


def _parse(value: str) -> tuple[str | None, tuple[str, ...]]:
    match = _TARGET.fullmatch(value)
    if match is None:
        return None, ()
    target = f"{match['module']}:{match['object']}" if match["object"] else match["module"]
    extras = (extra.strip() for extra in (match["extras"] or "").split(","))
    return target, tuple(extra for extra in extras if extra)
