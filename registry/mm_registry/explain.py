"""Says how an id was decided, and what decides the meaning of ids as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_registry.errors import RegistryError
from mm_registry.groups import EXAMPLES, FAREWELLS, PROVIDERS, id_key
from mm_registry.spec import EntrySpec, Status

if TYPE_CHECKING:
    from mm_registry.manager import PluginManager
    from mm_registry.resolution import Claims, Meaning

#: They help to find or to check an id; its meaning does not depend on them.
_HINTS = frozenset({FAREWELLS, PROVIDERS, EXAMPLES})


@dataclass(frozen=True)
class Verdict:
    """One claim and what became of it, in words."""

    spec: EntrySpec
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.spec.to_dict(), "verdict": self.verdict}


@dataclass(frozen=True)
class Explanation:
    """How an id was decided.

    Attributes:
        group, id: what was asked.
        alias_of: what to write instead, if it is an old id.
        claims: every claim to it, by distribution, as listed, with its verdict.
        selection: the lines of selection that speak of the id or of a distribution that claims it, the
            outermost first.
        chosen: the entry that it means, if that may be used.
        outcome: one sentence: `"means …"`, or the text of the error.
    """

    group: str
    id: str
    alias_of: str | None
    claims: tuple[Verdict, ...]
    selection: tuple[str, ...]
    chosen: EntrySpec | None
    outcome: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-able."""
        return {
            "group": self.group,
            "id": self.id,
            "alias_of": self.alias_of,
            "claims": [claim.to_dict() for claim in self.claims],
            "selection": list(self.selection),
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "outcome": self.outcome,
        }


def explain(manager: PluginManager, claims: Claims, meaning: Meaning, group: str, id: str) -> Explanation:
    """Put together an explanation; `meaning` is what `claims` say about the id."""
    chosen: EntrySpec | None = None
    alias_of = manager.alias(group, id)
    try:
        chosen = manager.resolve(group, id)
    except RegistryError as error:
        outcome = str(error)
    else:
        as_old = f" (an old id; write {alias_of!r} instead)" if alias_of is not None else ""
        origin = f" ({chosen.origin})" if chosen.origin and chosen.origin != chosen.distribution else ""
        outcome = f"means {chosen.target} of {chosen.provider}{origin}{as_old}"
        if meaning.why:
            outcome += f": {meaning.why}"
    key = id_key(group, meaning.id)
    concerned = claims.claims_to(group, meaning.id)
    wins = meaning.alias or chosen
    verdicts = []
    for spec in concerned:
        listed = manager.listed(spec)
        won = wins is not None and spec.key == wins.key
        verdicts.append(Verdict(listed, _verdict(listed, won=won, alias=meaning.alias)))
    distributions = {spec.distribution for spec in concerned}
    return Explanation(
        group, id, alias_of, tuple(verdicts), claims.selection.about(distributions, key), chosen, outcome
    )


def _verdict(spec: EntrySpec, *, won: bool, alias: EntrySpec | None) -> str:
    if won:
        return f"chosen, as an old id of {spec.target!r}" if alias is not None else "chosen"
    if spec.status is Status.AVAILABLE:
        return "could be used; another one was asked for"
    return f"{spec.status.replace('_', ' ')}: {spec.detail}"


def plugin_set(claims: Claims, version_of: Callable[[str], str | None]) -> dict[str, Any]:
    """See `PluginManager.plugin_set`. Failed imports do not count: they depend on what was asked for before."""
    usable = [
        [*spec.key, spec.version, spec.target]
        for group, ids in claims.groups.items()
        if group not in _HINTS
        for specs in ids.values()
        for spec in specs
        if claims.shown(spec).status in (Status.AVAILABLE, Status.AMBIGUOUS)
    ]
    core = {name: version_of(name) for name in ("mmzoo-core", "mmzoo-registry")}
    return {"core": core, "claims": sorted(usable)}
