"""The plugin contract of MM Zoo: entry-point registries with provenance. Imports neither torch nor anything
heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_registry.errors import (
    AmbiguousIdError,
    BrokenPluginError,
    HookError,
    RegistryError,
    SelectionError,
    UnavailablePluginError,
    UnknownIdError,
    UserError,
)
from mm_registry.groups import GROUPS, ROLES, Group
from mm_registry.manager import PluginManager, default_manager, reset_default_manager
from mm_registry.registry import Registry
from mm_registry.spec import Diagnostic, DiscoveryReport, EntrySpec, Status

if TYPE_CHECKING:
    from mm_registry.hooks import ConfigPatch, collect_patches, hookimpl, run_post_build

_HOOKS = ("ConfigPatch", "collect_patches", "hookimpl", "run_post_build")

__all__ = [
    "GROUPS",
    "ROLES",
    "AmbiguousIdError",
    "BrokenPluginError",
    "ConfigPatch",
    "Diagnostic",
    "DiscoveryReport",
    "EntrySpec",
    "Group",
    "HookError",
    "PluginManager",
    "Registry",
    "RegistryError",
    "SelectionError",
    "Status",
    "UnavailablePluginError",
    "UnknownIdError",
    "UserError",
    "collect_patches",
    "default_manager",
    "hookimpl",
    "reset_default_manager",
    "run_post_build",
]


def __getattr__(name: str) -> Any:
    # pluggy costs as much to import as all the rest, and only jobs and plugins with hooks need it.
    if name not in _HOOKS:
        raise AttributeError(f"module 'mm_registry' has no attribute {name!r}")
    from mm_registry import hooks

    return getattr(hooks, name)
