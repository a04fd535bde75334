"""What to answer when an id is unknown: the nearest ids, the registry that has it, the distribution that
provides it.

The answer needs metadata and the table below, never an import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mm_registry.errors import UnknownIdError
from mm_registry.groups import FAREWELLS, GROUPS
from mm_registry.spec import EXCLUDED, Diagnostic, EntrySpec, Status, canonical_name

if TYPE_CHECKING:
    from mm_registry.known_providers import KnownProvider

Claims = Mapping[str, Mapping[str, Sequence[EntrySpec]]]  # group -> id -> claims

_MESSAGE_BYTES = 1000
_SHOWN_IDS = 12
_CUTOFF = 0.6  # difflib's own default for "close"
_COMPARED = 16  # options that difflib looks at: it takes some 20 microseconds for each


def closest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Return at most `n` of `options` that `name` may be a misspelling of, nearest first; letter case does
    not count.
    """
    import difflib  # here, because only mistakes need it

    if len(name) > 200:  # nobody misspells that long, and difflib is quadratic
        return []
    wanted = name.casefold()
    spellings: dict[str, list[str]] = {}
    for option in sorted(set(options)):
        spellings.setdefault(option.casefold(), []).append(option)
    # Two of too different lengths cannot be close; the bounds are rounded outwards.
    shortest, longest = int(len(wanted) * _CUTOFF / (2 - _CUTOFF)), len(wanted) * (2 - _CUTOFF) / _CUTOFF + 1
    likely = [option for option in spellings if shortest <= len(option) <= longest]
    if len(likely) > _COMPARED:
        pairs = {wanted[i : i + 2] for i in range(len(wanted) - 1)} or {wanted}
        shared = re.compile("|".join(map(re.escape, sorted(pairs)))).findall
        likely = sorted(likely, key=lambda option: (-len(shared(option)), option))[:_COMPARED]
    near = difflib.get_close_matches(wanted, likely, n=n, cutoff=_CUTOFF)
    return [option for folded in near for option in spellings[folded]][:n]


def unknown_id(
    group: str,
    id: str,
    claims: Claims,
    version_of: Callable[[str], str | None],
    *,
    distribution: str | None = None,
    diagnostics: Sequence[Diagnostic] = (),
) -> UnknownIdError:
    """Return the error for an id that no distribution offers in a group; its message is at most 1 kB.

    Args:
        group: the group that was asked.
        id: what was asked for.
        claims: all claims, group -> id -> claims.
        version_of: distribution -> installed version or None.
        distribution: the one that the id was asked of (`distribution/id`), if any.
        diagnostics: those of level "error" are counted in the message: the id may sit in an unreadable
            distribution.
    """
    from mm_registry.known_providers import known_providers

    noun = GROUPS[group].noun
    here = claims.get(group, {})
    known = list(known_providers(claims))
    absent = [provider for provider in known if version_of(provider.distribution) is None]
    known_here: dict[str, KnownProvider] = {}
    for provider in absent:
        for name in provider.ids.get(group, ()):
            known_here.setdefault(name, provider)
    near = [name for name in closest(id, [*here, *known_here]) if name != id or name in here]
    exact = [name for name in (id,) if name in known_here]

    if distribution is not None:
        problem = f"{_plain(distribution)} offers no {noun} {_clip(id)}"
    else:
        problem = f"no installed distribution offers the {noun} {_clip(id)}"
    provided = _at_provider(group, id, version_of, known)
    answers = [_of_distribution(id, distribution, here, version_of, known)]
    if answers[0] is None:
        answers = [_farewell(group, id, claims), provided, _elsewhere(group, id, claims, absent)]
        if provided is None:
            answers.append(_nearest(near, here, known_here))
    hint = "; ".join(filter(None, answers)) or _all_of(noun, here)
    unreadable = sum(diagnostic.level == "error" for diagnostic in diagnostics)
    if unreadable:
        first = next(diagnostic.message for diagnostic in diagnostics if diagnostic.level == "error")
        hint += (
            f" ({unreadable} error(s) while reading installed distributions, the first: {_cut(first, 200)})"
        )
    room = _MESSAGE_BYTES - len(problem.encode("utf-8", "replace")) - 2
    found = tuple(dict.fromkeys([*exact, *near]))
    return UnknownIdError(problem, _cut(hint, room), group=group, id=id, closest=found)


def _of_distribution(
    id: str,
    distribution: str | None,
    here: Mapping[str, Sequence[EntrySpec]],
    version_of: Callable[[str], str | None],
    known: Sequence[KnownProvider],
) -> str | None:
    """The answer for `distribution/id`, if the distribution is the mistake or others have the id."""
    if distribution is None:
        return None
    offers = ", ".join(repr(spec.qualified_id) for spec in here.get(id, ()))
    if version_of(distribution) is not None:
        return f"it is offered as {offers}" if offers else None
    wanted = canonical_name(distribution)
    install = next((provider.install for provider in known if provider.distribution == wanted), "")
    parts = [f"{_plain(distribution)} is not installed", f"run {install}" if install else ""]
    parts.append(f"others offer it as {offers}" if offers else "")
    return "; ".join(filter(None, parts))


def _farewell(group: str, id: str, claims: Claims) -> str | None:
    """The answer if a distribution had the id once."""
    if not GROUPS[group].is_component:
        return None
    said = claims.get(FAREWELLS, {}).get(f"{GROUPS[group].role}/{id}", ())
    told = [
        f"{spec.distribution} dropped it, {spec.target} was the last version that had it: "
        f"`pip install '{spec.distribution}=={spec.target}'`"
        for spec in said
        if spec.status not in EXCLUDED and spec.status is not Status.BROKEN
    ]
    return "; ".join(told) or None


def _elsewhere(group: str, id: str, claims: Claims, absent: Sequence[KnownProvider]) -> str | None:
    """The answer if the id exists in another registry."""
    wanted = GROUPS[group]
    if not wanted.is_component:
        return None

    def answer(other: str, provider: str, tail: str = "") -> str:
        found = GROUPS[other]
        return (
            f"{id!r} is {_a(found.noun)}, not {_a(wanted.noun)}: "
            f"it comes from {provider}{tail} and goes under {found.chosen_by}"
        )

    for other in GROUPS:  # in this order, whatever order the claims were found in
        if other != group and id in claims.get(other, {}) and GROUPS[other].is_component:
            return answer(other, claims[other][id][0].provider)
    for provider in absent:
        for other, names in provider.ids.items():
            if other != group and id in names and id not in provider.ids.get(group, ()):
                return answer(other, provider.distribution, f", which is not installed ({provider.install}),")
    return None


def _at_provider(
    group: str, id: str, version_of: Callable[[str], str | None], known: Sequence[KnownProvider]
) -> str | None:
    """The answer if known distributions offer exactly this id."""
    told = []
    for provider in known:
        if id in provider.ids.get(group, ()):
            version = version_of(provider.distribution)
            state = "and is not installed" if version is None else f"but not its installed {version}"
            told.append(f"{provider.distribution} does, {state}; run {provider.install}")
    return "; ".join(told) or None


def _nearest(
    near: Sequence[str], here: Mapping[str, Sequence[EntrySpec]], known_here: Mapping[str, KnownProvider]
) -> str | None:
    """The answer if something is spelt almost so."""
    parts = []
    for name in near:
        if name in here:
            parts.append(f"{name!r} ({', '.join(spec.provider for spec in here[name])})")
        else:
            provider = known_here[name]
            where = f"of {provider.distribution}, which is not installed: {provider.install}"
            parts.append(f"{name!r} ({where})")
    return f"did you mean {', or '.join(parts)}?" if parts else None


def _all_of(noun: str, here: Mapping[str, Sequence[EntrySpec]]) -> str:
    if not here:
        return f"no installed distribution offers any {noun}"
    names = sorted(here)
    more = f" and {len(names) - _SHOWN_IDS} more" if len(names) > _SHOWN_IDS else ""
    return f"installed: {', '.join(names[:_SHOWN_IDS])}{more}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _clip(id: str) -> str:
    return repr(_shorten(id))


def _plain(name: str) -> str:
    """A name as it is, unless it would spoil the message."""
    short = _shorten(name)
    return short if short.isprintable() else repr(short)


def _shorten(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "…"


def _cut(text: str, room: int) -> str:
    """Cut to `room` bytes of UTF-8, at a character; on one line."""
    text = " ".join(text.splitlines())
    data = text.encode("utf-8", "replace")
    return text if len(data) <= room else data[: room - 3].decode("utf-8", "ignore") + "…"
