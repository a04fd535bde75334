"""Hooks: what a plugin may do to a job besides offering components. They run at build time only.

A plugin names a module in the group `mm_core.hooks` and marks functions in it:

    from mm_registry.hooks import ConfigPatch, hookimpl

    @hookimpl
    def overwrite_config(role, model_id, config):
        if role == "predictor" and "num_layers" not in config:
            return ConfigPatch({"num_layers": 30}, reason="the published 5B model has 30")

The module must not import torch: hooks run while a configuration is checked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from mm_registry.errors import HookError, UnavailablePluginError
from mm_registry.groups import HOOKS
from mm_registry.selection import CORE_DISTRIBUTIONS
from mm_registry.spec import RUNTIME, EntrySpec, canonical_name
from mm_registry.suggestions import closest
from mm_registry.words import described, shown

if TYPE_CHECKING:
    from mm_registry.manager import PluginManager

PROJECT = "mm_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class ConfigPatch:
    """What a hook wants changed in one section.

    Attributes:
        changes: dotted path relative to the section -> new value, such as a JSON file could hold.
        reason: one phrase, shown to the user beside each change.
        required: the patch holds even against a value that the user wrote.
    """

    changes: Mapping[str, Any]
    reason: str
    required: bool = False

    def __post_init__(self) -> None:
        for path, value in dict(self.changes).items():
            if not isinstance(path, str) or not path.isprintable() or not all(path.split(".")):
                raise ValueError(
                    f"ConfigPatch: {path!r} is not a dotted path such as 'num_layers' or 'rope.theta'"
                )
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"ConfigPatch: the value of {path!r} is none that a JSON file could hold ({error})"
                ) from error
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise ValueError("ConfigPatch: the reason is empty; the user reads it beside each change")
        object.__setattr__(self, "changes", dict(self.changes))


class HookSpecs:
    """The hooks that there are. An implementation takes the arguments that it wants, by name."""

    @hookspec
    def overwrite_config(self, role: str, model_id: str, config: Mapping[str, Any]) -> ConfigPatch | None:
        """Fill or derive values of one component's section; None changes nothing.

        Args:
            role: `"predictor"`, `"ae"`, …
            model_id: id of the component.
            config: a copy of the section as read; changing it has no effect, the returned patch has.
        """

    @hookspec
    def post_build(self, role: str, model_id: str, model: Any) -> None:
        """Look at or adjust a component's module just after it was built, before it is sharded and loaded."""


class ProvidedPatch(NamedTuple):
    """A patch and whose it is."""

    distribution: str
    version: str
    patch: ConfigPatch


class ActiveHooks(pluggy.PluginManager):
    """The hooks of the distributions that a job uses. `sources` tells whose each registered module is."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(HookSpecs)
        self.sources: dict[str, EntrySpec] = {}

    def add(self, spec: EntrySpec, module: object) -> None:
        """Register the hooks module of an entry.

        Raises:
            HookError: it implements a hook that does not exist, with an argument that the hook does not have,
                as a wrapper, or none.
        """
        try:
            self.register(module, name=spec.qualified_id)
        except (
            Exception,
            SystemExit,
        ) as error:  # pluggy looks at each name, and a module may have a __getattr__
            by_pluggy = isinstance(error, pluggy.PluginValidationError | ValueError)
            text = " ".join(str(error).split()) if by_pluggy else described(error)
            raise HookError(
                f"the hooks of {spec.provider} ({spec.target}) cannot be used: {text}",
                spec.distribution,
                spec.version,
            ) from error
        self.sources[spec.qualified_id] = spec
        callers = self.get_hookcallers(module) or []
        if not callers:
            message = (
                f"the hooks module {spec.target} of {spec.provider} has no function marked with "
                "@mm_registry.hooks.hookimpl"
            )
            raise HookError(message, spec.distribution, spec.version)
        for caller in callers:
            implementation = next(impl for impl in caller.get_hookimpls() if impl.plugin is module)
            if implementation.wrapper or implementation.hookwrapper:
                # Each one is called by itself, so that a patch has one author: nothing is left to wrap.
                message = (
                    f"the hook {caller.name} of {spec.provider} is a wrapper, which is not supported: "
                    "no plugin sees another's result"
                )
                raise HookError(message, spec.distribution, spec.version, caller.name)

    def verify(self) -> None:
        """Refuse hooks that do not exist.

        Raises:
            HookError: a function marked as a hook has a name that is none.
        """
        try:
            self.check_pending()
        except pluggy.PluginValidationError as error:
            spec = self.sources[str(self.get_name(error.plugin))]
            existing = [name for name in vars(HookSpecs) if not name.startswith("_")]
            names = [
                caller.name for caller in self.get_hookcallers(error.plugin) or [] if not caller.has_spec()
            ]
            near = closest(names[0], existing, 1)
            mend = f"did it mean {near[0]!r}?" if near else f"the hooks are {', '.join(existing)}"
            what = f"{spec.provider} implements the hook {names[0]!r} ({spec.target})"
            message = f"{what}, which does not exist; {mend}"
            raise HookError(message, spec.distribution, spec.version, names[0]) from error


def activate(manager: PluginManager, distributions: Iterable[str]) -> ActiveHooks:
    """See `PluginManager.activate`."""
    active = ActiveHooks()
    wanted = {canonical_name(name): name for name in distributions if name != RUNTIME}
    selection = manager.selection
    for name, written in sorted(wanted.items()):
        version = manager.version(name)
        if version is None:
            near = closest(name, {canonical_name(record.name) for record in manager.distributions()}, 1)
            mend = f"; did you mean {near[0]!r}?" if near else ""
            raise UnavailablePluginError(f"the distribution {shown(written)} is not installed{mend}")
        if manager.record(name) is None and name not in CORE_DISTRIBUTIONS:
            raise UnavailablePluginError(
                f"the distribution {written!r} declares no entry point of MM Zoo, so that it has no hooks either"
            )
        excluded = selection.excludes(name)
        if excluded is not None:
            raise UnavailablePluginError(f"the hooks of {name} {version} cannot be used: {excluded[1]}")
    # pluggy calls the module that was registered last first.
    for spec in reversed(manager.specs(HOOKS)):
        if canonical_name(spec.distribution) in wanted:
            active.add(spec, manager.load(spec))
    active.verify()
    return active


def collect_patches(
    hooks: pluggy.PluginManager, role: str, model_id: str, config: Mapping[str, Any]
) -> list[ProvidedPatch]:
    """Call `overwrite_config` of every active distribution and return the patches with their authors, in a
    fixed order.

    Raises:
        HookError: a hook raised, or returned something else than a `ConfigPatch` or None.
    """
    patches = []
    for spec, result in _call_each(hooks, "overwrite_config", role=role, model_id=model_id, config=config):
        if not isinstance(result, ConfigPatch):
            message = (
                f"the hook overwrite_config of {spec.provider} returned a {type(result).__name__} for "
                f"{role} {model_id!r}; it must return a ConfigPatch or None"
            )
            raise HookError(message, spec.distribution, spec.version, "overwrite_config")
        patches.append(ProvidedPatch(spec.distribution, spec.version, result))
    return patches


def run_post_build(hooks: pluggy.PluginManager, role: str, model_id: str, model: Any) -> None:
    """Call `post_build` of every active distribution, in a fixed order.

    Raises:
        HookError: a hook raised.
    """
    for _ in _call_each(hooks, "post_build", role=role, model_id=model_id, model=model):
        pass


def _call_each(hooks: pluggy.PluginManager, name: str, **arguments: Any) -> Iterator[tuple[EntrySpec, Any]]:
    """Call one hook module after the other; yield what is not None, with its source."""
    assert isinstance(hooks, ActiveHooks), "hooks come from PluginManager.activate()"
    plugins = {key: hooks.get_plugin(key) for key in hooks.sources}
    caller = getattr(hooks.hook, name)
    # pluggy keeps implementations in reverse order of call, `tryfirst` ones at the end.
    for key in _names(reversed(caller.get_hookimpls())):
        spec = hooks.sources[key]
        others = [plugin for other, plugin in plugins.items() if other != key]
        own = (
            {**arguments, "config": copy.deepcopy(arguments["config"])}
            if "config" in arguments
            else arguments
        )
        try:
            results = hooks.subset_hook_caller(name, others)(**own)
        except (Exception, SystemExit) as error:  # a hook that exits would end the command, and with its code
            about = f"{arguments['role']} {arguments['model_id']!r}"
            message = (
                f"the hook {name} of {spec.provider} ({spec.target}) raised for {about}: {described(error)}"
            )
            raise HookError(message, spec.distribution, spec.version, name) from error
        for result in results:
            yield spec, result


def _names(implementations: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(implementation.plugin_name for implementation in implementations))
