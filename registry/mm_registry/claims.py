"""Turns what distributions declare into claims to ids, each with the status that metadata alone can
decide.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from mm_registry.discovery import Record
from mm_registry.groups import COMPANION_GROUPS, GROUPS, HOOKS, ROLES
from mm_registry.requirements import VersionOf, api_conflict, missing_of_extras, required_api
from mm_registry.selection import Selection
from mm_registry.spec import Diagnostic, EntrySpec, Status
from mm_registry.suggestions import closest

_NAME = r"[A-Za-z_]\w*"
_TARGET = re.compile(
    rf"\s*(?P<module>{_NAME}(?:\.{_NAME})*)\s*(?::\s*(?P<object>{_NAME}(?:\.{_NAME})*)\s*)?(?:\[(?P<extras>[^\]]*)\]\s*)?"
)
# No slash: `distribution/id` chooses one of several claims.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def claims_of(
    record: Record, selection: Selection, version_of: VersionOf
) -> tuple[list[EntrySpec], list[Diagnostic]]:
    """Return the claims of one distribution, and what is odd about them."""
    diagnostics: list[Diagnostic] = []

    def odd(level: str, code: str, message: str) -> None:
        text = f"{record.name} {record.version}: {message}"
        diagnostics.append(Diagnostic(level, code, text, record.name, record.path))

    ranges, unreadable = required_api(record.requires)
    for line in unreadable:
        odd(
            "warning",
            "unreadable-requirement",
            f"the requirement {line!r} cannot be parsed and is not checked",
        )
    blocked = selection.blocks(record.name)
    conflict = api_conflict(ranges, version_of)

    claims: dict[tuple[str, str], EntrySpec] = {}
    for group, id, value in record.entries:
        problem = misnamed(group, id)
        if problem is not None:
            odd("error", "misnamed-entry", problem)
            continue
        target, extras = _parse(value)
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
                detail = f"its own distribution declares it twice: as {other.target} and as {spec.target}"
                claims[group, id] = replace(other, status=Status.BROKEN, detail=detail)
                odd("error", "declared-twice", f"{id!r} in {group} is declared twice")
            continue
        if blocked is not None:
            spec = replace(spec, status=Status.BLOCKED, detail=blocked)
        elif target is None or (":" not in target and group != HOOKS):
            detail = f"its target {value!r} is not of the form package.module:object"
            spec = replace(spec, status=Status.BROKEN, detail=detail)
            odd(
                "error",
                "malformed-target",
                f"the target {value!r} of {id!r} in {group} is not of the form package.module:object",
            )
        elif conflict is not None:
            spec = replace(spec, status=Status.INCOMPATIBLE, detail=conflict)
        elif extras and (missing := missing_of_extras(record.requires, extras, version_of)):
            detail = f"it needs {', '.join(missing)}; run: pip install '{record.name}[{','.join(extras)}]'"
            spec = replace(spec, status=Status.MISSING_EXTRA, detail=detail)
        claims[group, id] = spec
    return list(claims.values()), diagnostics


def with_ambiguity(claims: Iterable[EntrySpec]) -> tuple[EntrySpec, ...]:
    """Return the claims by (group, id, distribution), those that contest an id marked `ambiguous`. For
    display: a claim that was chosen by its qualified id is not ambiguous.
    """
    contenders: dict[tuple[str, str], list[EntrySpec]] = defaultdict(list)
    ordered = sorted(claims, key=lambda spec: spec.key)
    for spec in ordered:
        # Names of hooks modules mean nothing: each is found by its distribution.
        if spec.status is not Status.BLOCKED and spec.group != HOOKS:
            contenders[spec.group, spec.id].append(spec)

    def marked(spec: EntrySpec) -> EntrySpec:
        others = [other for other in contenders[spec.group, spec.id] if other.key != spec.key]
        if not others or spec.status is not Status.AVAILABLE:
            return spec
        names = ", ".join(other.provider for other in others)
        return replace(
            spec,
            status=Status.AMBIGUOUS,
            detail=f"{names} claims it too; write {spec.qualified_id} to mean this one",
        )

    return tuple(marked(spec) for spec in ordered)


def _parse(value: str) -> tuple[str | None, tuple[str, ...]]:
    match = _TARGET.fullmatch(value)
    if match is None:
        return None, ()
    target = f"{match['module']}:{match['object']}" if match["object"] else match["module"]
    extras = (extra.strip() for extra in (match["extras"] or "").split(","))
    return target, tuple(extra for extra in extras if extra)


def misnamed(group: str, id: str) -> str | None:
    """Return why an entry of this group and id can never be asked for; None if it can."""
    if group not in GROUPS:
        near = closest(group, GROUPS, 1)
        mend = f"did it mean {near[0]!r}?" if near else f"the groups are {', '.join(GROUPS)}"
        return f"there is no group {group!r} (entry {id!r}); {mend}"
    role, slash, rest = id.partition("/")
    if group not in COMPANION_GROUPS:
        if _ID.fullmatch(id):
            return None
        return f"{id!r} in {group} is not an id: letters, digits and _ . + - are allowed"
    if slash and role in ROLES and _ID.fullmatch(rest):
        return None
    return f"{id!r} in {group} is not of the form role/id; the roles are {', '.join(ROLES)}"
