"""Commands that only check do without pydantic's plugins, which cost them a tenth of their time."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

_LOADER = "pydantic.plugin._loader"


class _NoPlugins(ModuleType):
    """Stands for the module that looks for plugins. Without any it is asked nothing, but importing it imports the
    standard library's reader of package metadata, and that its reader of mail.
    """

    @staticmethod
    def get_plugins() -> tuple[()]:
        return ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del sys.modules[_LOADER]  # another version of pydantic wants more of it
        return getattr(importlib.import_module(_LOADER), name)


def disable() -> None:
    """Tell pydantic, before it checks the first section, that it has no plugins."""
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") == "__all__":
        sys.modules.setdefault(_LOADER, _NoPlugins(_LOADER))
