"""Which registries an id that was typed on the command line may be meant for, and which claims it names."""

from __future__ import annotations

from collections.abc import Sequence

from mm_registry import GROUPS, ROLES, EntrySpec, Group, PluginManager, UnknownIdError
from mm_registry.groups import FAREWELLS
from mm_registry.spec import canonical_name


def groups_named(name: str | None, *, all_too: bool = False) -> tuple[Group, ...]:
    """Return the groups that `--group` means: a role (`predictor`), a group (`mm_core.configs`, `configs`),
    a mapping's name or, with `all_too`, `all`; without it those of all components.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return tuple(ROLES.values())
    if name == "all" and all_too:
        return tuple(GROUPS.values())
    for group in GROUPS.values():
        if name in (group.name, group.name.partition(".")[2], group.role, group.mapping):
            return (group,)
    from mm_core.config.findings import ConfigError, Finding, did_you_mean

    names = [*(group.role for group in GROUPS.values()), *GROUPS, *(["all"] if all_too else [])]
    mend = did_you_mean(name, names, what="group")
    text = f'there is no group "{name}"'
    raise ConfigError([Finding("error", "unknown-group", text, path="--group", suggestion=mend)])


def claims_named(manager: PluginManager, group: Group, id: str) -> list[EntrySpec]:
    """Return the claims that `id`, an old id or `distribution/id` means in a group; none if nothing claims
    it.
    """
    specs = manager.specs(group.name)
    found = [spec for spec in specs if spec.id == id]
    if found:
        return found
    distribution, slash, rest = id.partition("/")
    wanted = canonical_name(distribution)
    found = [
        spec for spec in specs if slash and spec.id == rest and canonical_name(spec.distribution) == wanted
    ]
    if found:
        return found
    new = manager.alias(group.name, id)
    return claims_named(manager, group, new) if new is not None and new != id else []


def unknown_everywhere(manager: PluginManager, id: str, groups: Sequence[Group]) -> UnknownIdError:
    """Return the error for an id that none of the groups has: the advice of the group that knows most."""
    errors = [error for group in groups if (error := _refused(manager, group, id)) is not None]
    if len(groups) == 1:
        return errors[0]
    dropped = set(manager.ids(FAREWELLS))
    best = min(
        errors,
        key=lambda error: -1.0 if f"{GROUPS[error.group].role}/{id}" in dropped else _distance(id, error),
    )
    told = (
        best.closest
        or f"{GROUPS[best.group].role}/{id}" in dropped
        or len({error.hint for error in errors}) == 1
    )
    hint = best.hint if told else f"`mm list` shows every id{_unreadable(manager)}"
    return UnknownIdError(f"no installed distribution offers {_clip(id)}", hint, id=id, closest=best.closest)


def _refused(manager: PluginManager, group: Group, id: str) -> UnknownIdError | None:
    try:
        manager.resolve(group.name, id)
    except UnknownIdError as error:
        return error
    return None


def _distance(id: str, error: UnknownIdError) -> float:
    """How far the nearest id that the group knows is from what was typed."""
    from difflib import SequenceMatcher

    if not error.closest or len(id) > 200:
        return 1.0
    return 1.0 - SequenceMatcher(None, id.casefold(), error.closest[0].casefold()).ratio()


def _unreadable(manager: PluginManager) -> str:
    """A hint that the id may sit in a distribution that could not be read."""
    errors = [said.message for said in manager.discover().diagnostics if said.level == "error"]
    if not errors:
        return ""
    return f" ({len(errors)} error(s) while reading installed distributions, the first: {errors[0][:200]})"


def _clip(id: str) -> str:
    return repr(id if len(id) <= 60 else id[:57] + "…")
