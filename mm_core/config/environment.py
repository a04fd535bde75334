"""Environment variables: the only place of the core that reads them, and the check of those that are set.

`mm doctor` prints those that are set; `mm train` and `mm check` say what is wrong with them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping

from mm_core.config.findings import Finding, Level, clip, closest
from mm_core.config.variables import OURS, VARIABLES, Variable
from mm_registry.errors import UserError

__all__ = [
    "OURS",
    "VARIABLES",
    "Variable",
    "check_environment",
    "is_read",
    "launched",
    "read",
    "set_variables",
    "variables",
    "whole_number",
]

_CODE = "environment-variable"
_PREFIX = "MM_"


_BY_NAME = {variable.name: variable for variable in VARIABLES}

#: What is no documented value, and harmless: the reason why.
_TOLERATED = {
    (
        "MULTI_STREAM_MEMORY_REUSE",
        "2",
    ): "2 is no documented value (0 or 1), though many of MindSpeed-MM's scripts set it"
}


def variables() -> Mapping[str, str]:
    """Return all variables of this process, for what takes them whole."""
    return os.environ


def read(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the value of a variable of the table; None if it is not set."""
    assert name in _BY_NAME, f"{name} is missing in the table of environment variables"
    return (os.environ if environ is None else environ).get(name)


def whole_number(name: str, default: int, environ: Mapping[str, str] | None = None) -> int:
    """Return a variable that holds a whole number, or `default`.

    Raises:
        UserError: it holds something else.
    """
    value = read(name, environ)
    try:
        return default if value is None else int(value)
    except ValueError:
        raise UserError(
            f'The environment variable {name} is "{clip(value or "")}", not a whole number.'
        ) from None


def launched(environ: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun, something like it, or `mm train` itself has set the rank of this process."""
    return read("RANK", environ) is not None and read("WORLD_SIZE", environ) is not None


def set_variables(environ: Mapping[str, str] | None = None) -> Iterator[tuple[Variable, str]]:
    """Yield each variable of the table that is set, with its value."""
    environ = variables() if environ is None else environ
    for variable in VARIABLES:
        if variable.name in environ:
            yield variable, environ[variable.name]


def is_read(variable: Variable) -> bool:
    """Whether setting the variable has an effect here: somebody reads it, and is installed."""
    library = variable.reader.partition(" ")[0]
    if not library or variable.reader == OURS:
        return bool(library)
    return importlib.util.find_spec(library) is not None


def check_environment(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Return what there is to say about the variables that are set: errors about those that we read, warnings about
    those of libraries, notes about those that nobody reads here. `path` is the variable.
    """
    environ = variables() if environ is None else environ
    findings = [_of(variable, value) for variable, value in set_variables(environ)]
    return [finding for finding in findings if finding is not None] + list(_misspelt(environ))


def _of(variable: Variable, value: str) -> Finding | None:
    if not variable.reader:
        return _finding(variable.name, "note", "no-effect", f"has no effect here: {variable.meaning}")
    tolerated = _TOLERATED.get((variable.name, value))
    if tolerated:
        return _finding(variable.name, "note", "undocumented-value", tolerated)
    if not value:  # `VARIABLE= command` is how a shell takes one away
        return None
    problem = variable.problem(value)
    if problem:
        level: Level = "error" if variable.reader == OURS else "warning"
        text = f'"{variable.shown(value)}" {problem}'
        return _finding(
            variable.name,
            level,
            _CODE,
            text,
            f"Unset it for the default, {variable.default}" if variable.default else "",
        )
    if variable.name == "CUDA_DEVICE_MAX_CONNECTIONS" and int(value) == 1:
        text = "with 1, FSDP2's communication waits behind the computation instead of running beside it"
        return _finding(variable.name, "warning", _CODE, text, "Set it to 2 or more, or unset it")
    return None


def _misspelt(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A variable with our prefix that is no variable of ours, and nearly is."""
    ours = [name for name in _BY_NAME if name.startswith(_PREFIX)]
    for name in environ:
        if name.startswith(_PREFIX) and name not in _BY_NAME:
            near = closest(name, ours)
            if near is not None:
                yield _finding(name, "warning", _CODE, "nothing reads this variable", f"Did you mean {near}?")


def _finding(name: str, level: Level, code: str, text: str, suggestion: str = "") -> Finding:
    return Finding(level, code, text, path=name, suggestion=suggestion)
