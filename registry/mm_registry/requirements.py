"""Requirements that decide whether an entry can be used: the plugin API that it was made for, and its
extras.

`packaging` decides what they mean. Importing it costs more than all of discovery, so what nearly every plugin
writes, a range of plain versions (`mmzoo-core>=0.1,<0.2`), is compared here; a test holds the two equal.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mm_registry.spec import canonical_name

if TYPE_CHECKING:
    from packaging.requirements import Requirement

API_DISTRIBUTIONS = ("mmzoo-registry", "mmzoo-core")

VersionOf = Callable[[str], str | None]  # distribution -> installed version, None if it is not installed

_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_Bounds = list[tuple[str, str]]
_DIGITS = 18  # of one number of a plain version; Python refuses to read one of thousands
#: What `packaging` raises for a requirement or a marker: KeyError for `"x" in extras`, RecursionError for brackets in
#: brackets in brackets.
_UNREADABLE = (ValueError, KeyError, RecursionError)


def required_api(requires: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the ranges of our distributions among `Requires-Dist` lines, `("mmzoo-core>=0.1,<0.2",)`, and
    the lines of ours that cannot be parsed.
    """
    ranges: list[str] = []
    unreadable: list[str] = []
    for line in requires:
        if _named(line) not in API_DISTRIBUTIONS:
            continue
        plain = _plain_range(line)
        if plain is not None:
            name, bounds = plain
            ranges.append(f"{name}{_in_order(sign + version for sign, version in bounds)}")
            continue
        from packaging.requirements import Requirement

        try:
            requirement = Requirement(line)
            applies = _applies(requirement)
        except _UNREADABLE:
            unreadable.append(line)
            continue
        if applies:
            ranges.append(f"{canonical_name(requirement.name)}{_ordered(requirement)}")
    return tuple(sorted(ranges)), unreadable


def api_conflict(ranges: Sequence[str], version_of: VersionOf) -> str | None:
    """Return why an entry with these ranges does not fit what is installed; None if it fits.

    A distribution that is not installed is no conflict: the plugin's import then says what it misses.
    """
    for text in ranges:
        name = _named(text)
        version = version_of(name)
        if version is None or _fits(text, version):
            continue
        return (
            f"it needs {name} {text[len(name) :]} and {version} is installed; install "
            f"a version made for {name} {version}, or {name} in that range"
        )
    return None


def missing_of_extras(requires: Sequence[str], extras: Sequence[str], version_of: VersionOf) -> list[str]:
    """Return the requirements of `extras` that are not installed in a fitting version, as `name` or
    `name>=1.2`.
    """
    return [text for _, text, _ in unmet(in_force(requires, extras), version_of)]


def in_force(requires: Iterable[str], extras: Sequence[str] = ()) -> Iterator[Requirement]:
    """Yield the requirements of `Requires-Dist` lines that hold on this machine: without extras, or those that
    only `extras` bring. Lines that cannot be parsed are left out.
    """
    from packaging.requirements import Requirement

    for line in requires:
        try:
            requirement = Requirement(line)
            always = _applies(requirement)
            holds = not always and any(_applies(requirement, extra) for extra in extras) if extras else always
        except _UNREADABLE:
            continue
        if holds:
            yield requirement


def unmet(
    requirements: Iterable[Requirement], version_of: VersionOf
) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, `name>=1.2`, installed version or None) of each requirement that no installed version fits."""
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None or not _contains(requirement, version):
            yield canonical_name(requirement.name), f"{requirement.name}{_ordered(requirement)}", version


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _ordered(requirement: Requirement) -> str:
    """The specifier with lower bounds first, as people write it (`packaging` sorts by character)."""
    return _in_order(map(str, requirement.specifier))


def _in_order(bounds: Iterable[str]) -> str:
    return ",".join(sorted(bounds, key=lambda bound: (bound.startswith("<"), bound)))


def _plain_range(line: str) -> tuple[str, _Bounds] | None:
    """(canonical name, [(sign, version)]) of a requirement that is nothing but a range of plain
    versions; None for any other.
    """
    match = _NAME.match(line)
    if match is None or match[1][-1] in "._-":
        return None
    rest = line[match.end() :].strip(" ")
    bounds = [_plain_bound(bound.strip(" ")) for bound in rest.split(",")] if rest else []
    plain = [bound for bound in bounds if bound is not None]
    if len({sign for sign, _ in plain}) < len(bounds):
        return None  # (some versions of packaging drop bounds that say the same)
    return canonical_name(match[1]), plain


def _plain_bound(text: str) -> tuple[str, str] | None:
    for sign in _COMPARE:
        version = text.removeprefix(sign).strip(" ")
        if text.startswith(sign) and _is_release(version):
            return sign, version
    return None


def _is_release(version: str) -> bool:
    """Whether a version is numbers and dots only, written without needless zeros: `"1.20"`."""
    return version.isascii() and all(
        number.isdigit() and len(number) <= _DIGITS and (number[0] != "0" or number == "0")
        for number in version.split(".")
    )


def _fits(requirement: str, version: str) -> bool:
    """Whether a version lies in the range of a requirement; pre-releases count."""
    plain = _plain_range(requirement)
    if plain is None or not _is_release(version):
        from packaging.requirements import Requirement

        return _contains(Requirement(requirement), version)
    return all(_COMPARE[sign](_release(version), _release(bound)) for sign, bound in plain[1])


def _contains(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except ValueError:  # older ones of packaging raise for a version that is none
        return False


def _release(version: str) -> tuple[int, ...]:
    """`"1.2.0"` as a tuple to compare; zeros at the end mean nothing."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _named(line: str) -> str:
    match = _NAME.match(line)
    return canonical_name(match[1]) if match else ""
