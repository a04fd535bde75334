"""What two plugin sets (`PluginManager.plugin_set()`) have differently, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from mm_registry.groups import GROUPS
from mm_registry.spec import RUNTIME, canonical_name


class _Claim(NamedTuple):
    group: str
    id: str
    distribution: str
    version: str
    target: str

    @property
    def what(self) -> str:
        return f"{_noun(self.group)} {self.id}"


def describe_difference(
    mine: Mapping[str, Any], other: Mapping[str, Any], *, here: str = "here", there: str = "there"
) -> list[str]:
    """Say how the plugin set `other` differs from `mine`, one phrase a difference; nothing if they are equal.

    Args:
        mine, other: `{"core": {name: version}, "claims": [[group, id, distribution, version, target], …]}`.
        here, there: what the places of the two are called, such as `"on rank 0"` and `"on rank 1"`.
    """
    ours, theirs = _by_distribution(mine), _by_distribution(other)
    versions = {
        **mine.get("core", {}),
        **{claims[0].distribution: claims[0].version for claims in ours.values()},
    }
    lines = [
        f"{name} is {version or 'not installed'} {there} and {versions.get(name) or 'not installed'} {here}"
        for name, version in sorted(other.get("core", {}).items())
        if version != versions.get(name)
    ]
    ids: list[str] = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            lines.append(f"{_title(ours[name])} is missing {there}")
        elif name not in ours:
            lines.append(f"{_title(theirs[name])} is {there}, but not {here}")
        else:
            a, b = ours[name][0], theirs[name][0]
            line = f"{a.distribution} is {b.version} {there} and {a.version} {here}"
            if a.version != b.version and line not in lines:  # the core is told of above
                lines.append(line)
            ids += _claims(ours[name], theirs[name], here, there)
    return lines + ids + _providers(ours, theirs, here, there)


def _by_distribution(plugins: Mapping[str, Any]) -> dict[str, list[_Claim]]:
    found: dict[str, list[_Claim]] = defaultdict(list)
    for claim in plugins.get("claims", ()):
        found[canonical_name(claim[2])].append(_Claim(*map(str, claim)))
    return {name: sorted(claims) for name, claims in found.items()}


def _title(claims: list[_Claim]) -> str:
    """`mmzoo-plugin-haar 0.1.0`, or what the program itself registered."""
    if claims[0].distribution == RUNTIME:
        return f"what the program registers itself ({', '.join(claim.what for claim in claims)})"
    return f"{claims[0].distribution} {claims[0].version}"


def _claims(ours: list[_Claim], theirs: list[_Claim], here: str, there: str) -> list[str]:
    """One distribution that both have: what it offers on one side only, and what means another object."""
    mine = {(claim.group, claim.id): claim for claim in ours}
    other = {(claim.group, claim.id): claim for claim in theirs}
    lines = []
    for key in sorted(mine.keys() | other.keys()):
        a, b = mine.get(key), other.get(key)
        if a is not None and b is None:
            lines.append(f"{a.distribution} does not offer the {a.what} {there}")
        elif b is not None and a is None:
            lines.append(f"{b.distribution} offers the {b.what} {there}, but not {here}")
        elif a is not None and b is not None and a.target != b.target:
            lines.append(f"the {a.what} of {a.distribution} is {b.target} {there} and {a.target} {here}")
    return lines


def _providers(
    ours: Mapping[str, list[_Claim]], theirs: Mapping[str, list[_Claim]], here: str, there: str
) -> list[str]:
    """The components that both have, but from other distributions."""
    mine, other = _owners(ours), _owners(theirs)
    return [
        f"the {_noun(group)} {id} comes from {' and '.join(other[group, id])} {there} "
        f"and from {' and '.join(mine[group, id])} {here}"
        for group, id in sorted(mine.keys() & other.keys())
        if not set(mine[group, id]) & set(other[group, id])
    ]


def _owners(distributions: Mapping[str, list[_Claim]]) -> dict[tuple[str, str], list[str]]:
    """(group, id) of each component -> canonical names of the distributions that offer it."""
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, claims in distributions.items():
        for claim in claims:
            if claim.group in GROUPS and GROUPS[claim.group].is_component:
                owners[claim.group, claim.id].append(name)
    return dict(owners)


def _noun(group: str) -> str:
    return GROUPS[group].noun if group in GROUPS else group
