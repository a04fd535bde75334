"""`mm show ID`: one id, in every registry that has it, with all that belongs to it. Reads metadata only:
imports neither torch nor a plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from mm_core.cli.ids import claims_named, groups_named, unknown_everywhere
from mm_core.cli.options import only_word, output_format, take_option
from mm_core.cli.tables import json_text, named_values, printable
from mm_registry import GROUPS, EntrySpec, PluginManager, RegistryError, Status, default_manager
from mm_registry.groups import ALIASES, EXAMPLES, HOOKS
from mm_registry.spec import canonical_name

_HELP = """\
usage: mm show ID [--group GROUP] [--format table|json]

Show one id (`wandit`, or `distribution/wandit`): where it comes from, whether it can be used, and what its
distribution brings along for it: config class, sharding policy, weights adapter, hooks, old ids.
--group takes a role (predictor, ae, …) or an entry-point group; without it, every kind of component is searched.
"""
#: What is registered under the name `role/id` of a component, and what is done without it.
COMPANIONS = {
    "mm_core.configs": "none: `mm check` does not know the keys of its section",
    "mm_core.sharding_policies": "none: units are found by structure",
    "mm_core.weights": "none: keys in a folder of weights are the module's own",
    EXAMPLES: "none: `mm plugin check` takes the defaults",
}
_WITH_POLICY = frozenset({"predictor", "transformers_model"})
_WITH_WEIGHTS = frozenset({"predictor", "ae", "text_encoder", "transformers_model"})
_FIELDS = ("target", "distribution", "version", "status", "detail")


def run(argv: list[str]) -> int:
    """Print the claims to one id and return 0.

    Raises:
        UnknownIdError: nothing that is installed offers it.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    name, rest = take_option(rest, "--group")
    id = only_word(rest, "mm show", "an id")
    groups = groups_named(name)
    manager = default_manager()
    shown = [
        _object(manager, spec, id) for group in groups for spec in claims_named(manager, group, id)
    ]  # fmt: skip
    if not shown:
        raise unknown_everywhere(manager, id, groups)
    sys.stdout.write(json_text(shown) if form == "json" else printable("\n".join(map(_text, shown))))
    return 0


def _object(manager: PluginManager, spec: EntrySpec, asked: str) -> dict[str, Any]:
    """One claim as JSON; docs/plugin-commands.md names its fields."""
    group = GROUPS[spec.group]
    return {
        "asked": asked,
        **spec.to_dict(),
        "role": group.role,
        "chosen_by": group.chosen_by,
        "old_ids": _old_ids(manager, spec),
        "companions": list(_companions(manager, spec)) if group.is_component else [],
        "hooks": [_fields(hooks) for hooks in manager.specs(HOOKS) if hooks.key[2] == spec.key[2]],
    }


def _old_ids(manager: PluginManager, spec: EntrySpec) -> list[str]:
    """Ids that the distribution declares to be old ones of this component."""
    prefix = f"{GROUPS[spec.group].role}/"
    return [
        alias.id.removeprefix(prefix)
        for alias in manager.specs(ALIASES)
        if alias.id.startswith(prefix) and alias.target == spec.id and alias.key[2] == spec.key[2]
    ]


def _companions(manager: PluginManager, spec: EntrySpec) -> Iterator[dict[str, Any]]:
    """What is registered for a component, as the core would look it up."""
    role = GROUPS[spec.group].role
    for group in COMPANIONS:
        name = f"{role}/{spec.id}"
        try:
            found = manager.find(group, name, spec.distribution)
        except RegistryError as error:
            # It is there and cannot be used: its entry says why, or, if there are several, the error does.
            found = getattr(error, "spec", None)
            if found is None:
                yield {
                    "group": group, "id": name, "target": "", "distribution": "", "version": "",
                    "status": str(Status.AMBIGUOUS), "detail": str(error),
                }  # fmt: skip
                continue
        if found is None:  # what takes no part is not found, but it is there
            own = (
                claim for claim in manager.specs(group) if claim.id == name and claim.key[2] == spec.key[2]
            )
            found = next(own, None)
        if found is not None:
            yield {"group": group, "id": name, **_fields(found)}


def _fields(spec: EntrySpec) -> dict[str, str]:
    return {name: str(getattr(spec, name)) for name in _FIELDS}


def _text(shown: dict[str, Any]) -> str:
    group = GROUPS[shown["group"]]
    provider = f"{shown['distribution']} {shown['version']}".rstrip()
    lines = [("status", shown["status"])]
    if shown["detail"]:
        lines.append(("", shown["detail"]))
    lines += [
        ("registry", f"{group.name}, chosen by {group.chosen_by}"),
        ("target", shown["target"]),
        ("origin", shown["origin"]),
        ("path", shown["path"]),
    ]
    if shown["asked"] in shown["old_ids"]:
        lines.insert(0, ("asked", f"{shown['asked']}, an old id of {shown['id']}"))
    if shown["extras"]:
        lines.append(("extras", ", ".join(shown["extras"])))
    lines.append(("made for", "; ".join(shown["required_api"]) or "no version of the plugin API is stated"))
    if shown["old_ids"]:
        lines.append(("old ids", ", ".join(shown["old_ids"])))
    for name in COMPANIONS if group.is_component else ():
        lines.extend(_companion_lines(shown, name))
    lines.append(("hooks", ", ".join(hooks["target"] for hooks in shown["hooks"]) or "none"))
    return f"{shown['id']}: {group.noun} of {provider}\n{named_values(lines)}"


def _companion_lines(shown: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    found = next((companion for companion in shown["companions"] if companion["group"] == name), None)
    if found is None and not _expected(name, shown["role"]):
        return
    noun = GROUPS[name].noun
    if found is None:
        yield noun, COMPANIONS[name]
        return
    foreign = canonical_name(found["distribution"]) != canonical_name(shown["distribution"])
    yield noun, f"{found['target']} (of {found['distribution']})" if foreign else found["target"]
    if found["status"] not in (Status.AVAILABLE, shown["status"]):
        yield "", f"{found['status']}: {found['detail']}"


def _expected(group: str, role: str) -> bool:
    """Whether the lack of a companion is worth a line."""
    if group == "mm_core.sharding_policies":
        return role in _WITH_POLICY
    if group == "mm_core.weights":
        return role in _WITH_WEIGHTS
    return group == "mm_core.configs" and role not in ("pipeline", "task", "callback", "chat_template")
