"""Whether the module behind an entry is there and can be parsed. Imports nothing: each name is looked up as
`import` would, and its source is read.
"""

from __future__ import annotations

import warnings
from importlib.machinery import ModuleSpec

from mm_core.config.signature import find_module


def target_problem(module: str) -> str | None:
    """Return why a module cannot be imported, as far as files tell; None if they do not."""
    try:
        found = find_module(module)
        if found is None:
            parts = module.split(".")
            names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
            return (
                f"there is no module {next((name for name in names if find_module(name) is None), module)!r}"
            )
    except Exception as error:  # noqa: BLE001 - a finder of somebody's editable install may fail in any way
        return f"the module {module} cannot be looked up: {_say(error)}"
    return _source_problem(found)


def _source_problem(found: ModuleSpec) -> str | None:
    read = getattr(found.loader, "get_source", None)
    if read is None:
        return None  # a namespace package or a compiled module
    try:
        source = read(found.name)
        if source is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a doubtful escape in a string is nobody's problem here
                compile(source, found.origin or found.name, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    except Exception as error:  # noqa: BLE001 - loaders of strangers too
        return f"{found.origin} cannot be read: {_say(error)}"
    return None


def _say(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
