"""A plugin's hooks: they exist, keep to their own components, and can be run again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from mm_core.testing.case import Case, Plugin
from mm_core.testing.check import CheckFailed, CheckSkipped, check, require
from mm_registry.errors import HookError
from mm_registry.groups import HOOKS, ROLES

if TYPE_CHECKING:
    from mm_core.config.document import Document
    from mm_registry.hooks import ActiveHooks

_STRANGER = "mm_conformance_stranger"


@check("its hooks can be activated", stage="light", whole_plugin=True)
def hooks_can_be_activated(plugin: Plugin) -> None:
    """The module can be imported, every function marked as a hook is one, and takes arguments that the hook has."""
    if not plugin.specs(HOOKS):
        raise CheckSkipped("it has no hooks")
    plugin.must_not_crash(*plugin.specs(HOOKS))
    plugin.manager.activate([plugin.distribution])


@check("its hooks keep to its own components", stage="light", whole_plugin=True)
def hooks_keep_to_their_own(plugin: Plugin) -> None:
    """`overwrite_config` returns None for ids of others, and for its own ids in roles that they do not have."""
    from mm_registry.hooks import collect_patches

    hooks = _hooks(plugin)
    own = {(role, spec.id) for role, group in ROLES.items() for spec in plugin.specs(group.name)}
    for role in ROLES:
        for id in sorted({_STRANGER, *(id for _, id in own)}):
            if (role, id) in own:
                continue
            patches = collect_patches(hooks, role, id, {})
            require(not patches, f"it patches the {ROLES[role].noun} {id!r}, which is not its own")


@check("its hooks leave the section that they are given as it is", stage="light")
def hooks_keep_their_input(case: Case) -> None:
    """What a hook wants changed it returns as a patch; then it can be traced, and conflicts are found."""
    hooks = _hooks(case.plugin)
    given = {"model_id": case.id, **case.section}
    before = copy.deepcopy(given)
    hooks.hook.overwrite_config(role=case.role, model_id=case.id, config=given)
    require(given == before, f"overwrite_config changes the section that it is given for {case.label}")


@check("running its hooks again changes nothing", stage="light")
def hooks_are_idempotent(case: Case) -> None:
    """The same section gives the same patch, and a patched section gives none that changes it: a resumed run starts from
    the patched one.
    """
    hooks = _hooks(case.plugin)
    first, changed = _patched(case, hooks, case.document())
    again, _ = _patched(case, hooks, case.document())
    require(again.data == first.data, "two runs on one section give different patches")
    _, more = _patched(case, hooks, first)
    require(
        not more, f"run on its own result it changes {', '.join(more)}" + ("" if changed else " only then")
    )


def _hooks(plugin: Plugin) -> ActiveHooks:
    if not plugin.specs(HOOKS):
        raise CheckSkipped("it has no hooks")
    plugin.must_not_crash(*plugin.specs(HOOKS))
    try:
        hooks = plugin.manager.activate([plugin.distribution])
    except HookError as error:
        raise CheckFailed(str(error)) from error
    if not hooks.hook.overwrite_config.get_hookimpls():
        raise CheckSkipped("it does not overwrite configurations")
    return hooks


def _patched(case: Case, hooks: ActiveHooks, document: Document) -> tuple[Document, list[str]]:
    """The document after the hooks, and the paths that they changed."""
    from mm_core.config.overwrite import apply_patches
    from mm_registry.hooks import collect_patches

    part = case.part
    section = document.value(part.path)
    patches = collect_patches(hooks, case.role, case.id, section)
    patched, trace, findings = apply_patches(document, part, patches)
    errors = [finding.text for finding in findings if finding.level == "error"]
    require(not errors, f"its patch is refused: {'; '.join(errors)}")
    return patched, [change.path for change in trace]
