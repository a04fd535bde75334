"""What to answer when an id is unknown: the nearest ids, the registry that has it, the distribution that
provides it.

The answer needs metadata and the table below, never an import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mm_registry.errors import UnknownIdError
from mm_registry.groups import GROUPS
from mm_registry.spec import Diagnostic, EntrySpec

_MESSAGE_BYTES = 1000
_SHOWN_IDS = 12
_CUTOFF = 0.6  # difflib's own default for "close"


@dataclass(frozen=True, slots=True)
class KnownProvider:
    """A distribution that may not be installed: how to install it, and its ids by group."""

    distribution: str
    install: str
    ids: Mapping[str, tuple[str, ...]]


def _provider(distribution: str, folder: str, **ids: tuple[str, ...]) -> KnownProvider:
    groups = MappingProxyType({f"mm_core.{group}": names for group, names in ids.items()})
    return KnownProvider(distribution, f"`pip install ./{folder}` in a clone of MM Zoo", groups)


KNOWN_PROVIDERS: tuple[KnownProvider, ...] = (
    _provider(
        "mmzoo-plugin-wan22",
        "mm_plugins/wan22",
        predictor_models=("wandit",),
        diffusion_models=("wan_flow_match_scheduler",),
        ae_models=("wan_video_vae",),
        pipelines=("WanPipeline",),
    ),
    _provider("mmzoo-plugin-qwen3vl", "mm_plugins/qwen3vl", transformers_models=("qwen3_vl", "qwen3_vl_moe")),
    _provider("mmzoo-plugin-haar", "examples/plugins/mmzoo-plugin-haar", ae_models=("haar_video",)),
)


def closest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Return at most `n` of `options` that `name` may be a misspelling of, nearest first; letter case does
    not count.
    """
    import difflib  # here, because only mistakes need it

    if len(name) > 200:  # nobody misspells that long, and difflib is quadratic
        return []
    spellings: dict[str, list[str]] = {}
    for option in sorted(set(options)):
        spellings.setdefault(option.casefold(), []).append(option)
    near = difflib.get_close_matches(name.casefold(), spellings, n=n, cutoff=_CUTOFF)
    return [option for folded in near for option in spellings[folded]][:n]


def unknown_id(
    group: str,
    id: str,
    claims: Mapping[str, Mapping[str, Sequence[EntrySpec]]],
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
    noun = GROUPS[group].noun
    here = claims.get(group, {})
    absent = [provider for provider in KNOWN_PROVIDERS if version_of(provider.distribution) is None]
    known_here = {name: provider for provider in absent for name in provider.ids.get(group, ())}
    near = closest(id, [*here, *known_here])

    if distribution is not None:
        distribution = _shorten(distribution)
        problem = f"{distribution} offers no {noun} {_clip(id)}"
    else:
        problem = f"no installed distribution offers the {noun} {_clip(id)}"
    hint = (
        _of_distribution(id, distribution, here, version_of)
        or _at_provider(group, id, version_of)
        or _elsewhere(group, id, claims, absent)
        or _nearest(near, here, known_here)
        or _all_of(noun, here)
    )
    unreadable = sum(diagnostic.level == "error" for diagnostic in diagnostics)
    if unreadable:
        first = next(diagnostic.message for diagnostic in diagnostics if diagnostic.level == "error")
        hint += (
            f" ({unreadable} error(s) while reading installed distributions, the first: {_cut(first, 200)})"
        )
    room = _MESSAGE_BYTES - len(problem.encode()) - 2
    return UnknownIdError(problem, _cut(hint, room), group=group, id=id, closest=tuple(near))


def _of_distribution(
    id: str,
    distribution: str | None,
    here: Mapping[str, Sequence[EntrySpec]],
    version_of: Callable[[str], str | None],
) -> str | None:
    """The answer for `distribution/id`, if the distribution is the mistake or has something near."""
    if distribution is None:
        return None
    offers = ", ".join(repr(spec.qualified_id) for spec in here.get(id, ()))
    if version_of(distribution) is not None:
        return f"it is offered as {offers}" if offers else None
    install = next((known.install for known in KNOWN_PROVIDERS if known.distribution == distribution), "")
    parts = [f"{distribution} is not installed", f"run {install}" if install else ""]
    parts.append(f"others offer it as {offers}" if offers else "")
    return "; ".join(filter(None, parts))


def _elsewhere(
    group: str,
    id: str,
    claims: Mapping[str, Mapping[str, Sequence[EntrySpec]]],
    absent: Sequence[KnownProvider],
) -> str | None:
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

    for other, ids in claims.items():
        if other != group and id in ids and GROUPS[other].is_component:
            return answer(other, ids[id][0].provider)
    for provider in absent:
        for other, names in provider.ids.items():
            if other != group and id in names and id not in provider.ids.get(group, ()):
                return answer(other, provider.distribution, f", which is not installed ({provider.install}),")
    return None


def _at_provider(group: str, id: str, version_of: Callable[[str], str | None]) -> str | None:
    """The answer if a known distribution offers exactly this id."""
    for provider in KNOWN_PROVIDERS:
        if id in provider.ids.get(group, ()):
            version = version_of(provider.distribution)
            if version is None:
                return f"{provider.distribution} does, and is not installed; run {provider.install}"
            return f"{provider.distribution} does, but not its installed {version}; run {provider.install}"
    return None


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


def _shorten(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "…"


def _cut(text: str, room: int) -> str:
    """Cut to `room` bytes of UTF-8, at a character."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= room else data[: room - 3].decode("utf-8", "ignore") + "…"
