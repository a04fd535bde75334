"""Requirements that decide whether an entry can be used: the plugin API that it was made for, and its
extras.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from packaging.requirements import InvalidRequirement, Requirement

from mm_registry.spec import canonical_name

API_DISTRIBUTIONS = ("mmzoo-registry", "mmzoo-core")

VersionOf = Callable[[str], str | None]  # distribution -> installed version, None if it is not installed


def required_api(requires: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the ranges of our distributions among `Requires-Dist` lines, `("mmzoo-core>=0.1,<0.2",)`, and
    the lines of ours that cannot be parsed.
    """
    ranges: list[str] = []
    unreadable: list[str] = []
    for line in requires:
        if _named(line) not in API_DISTRIBUTIONS:
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            unreadable.append(line)
            continue
        if _applies(requirement):
            ranges.append(f"{canonical_name(requirement.name)}{_ordered(requirement)}")
    return tuple(sorted(ranges)), unreadable


def api_conflict(ranges: Sequence[str], version_of: VersionOf) -> str | None:
    """Return why an entry with these ranges does not fit what is installed; None if it fits.

    A distribution that is not installed is no conflict: the plugin's import then says what it misses.
    """
    for text in ranges:
        requirement = Requirement(text)
        version = version_of(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            return (
                f"it needs {requirement.name} {_ordered(requirement)} and {version} is installed; install "
                f"a version made for {requirement.name} {version}, or {requirement.name} in that range"
            )
    return None


def missing_of_extras(requires: Sequence[str], extras: Sequence[str], version_of: VersionOf) -> list[str]:
    """Return the requirements of `extras` that are not installed in a fitting version, as `name` or
    `name>=1.2`.
    """
    missing = []
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if _applies(requirement) or not any(_applies(requirement, extra) for extra in extras):
            continue
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{_ordered(requirement)}")
    return missing


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _ordered(requirement: Requirement) -> str:
    """The specifier with lower bounds first, as people write it (`packaging` sorts by character)."""
    return ",".join(sorted(map(str, requirement.specifier), key=_bound))


def _bound(specifier: str) -> tuple[bool, str]:
    return specifier.startswith("<"), specifier


def _named(line: str) -> str:
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return canonical_name(match[1]) if match else ""
