"""The errors that a user can cause and mend.

Every class here derives from `UserError`: a command line prints its message and exits with `exit_code`,
without a traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_registry.words import visible

if TYPE_CHECKING:
    from mm_registry.spec import EntrySpec


class UserError(Exception):
    """Base of every error that the user caused. `str(error)` is the whole message: where, what, why, and how
    to mend it.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        self.message = visible(message)  # a name or a value in it may hold escape codes for the terminal
        super().__init__(self.message)

    def __str__(self) -> str:
        # Not inherited: a subclass that is a KeyError as well would print the message in quotes.
        return self.message


class RegistryError(UserError):
    """Base of what the registries raise."""


class UnknownIdError(RegistryError, KeyError):
    """No installed distribution offers the id. Being a `KeyError` makes `.get(id)` and `in` behave as for any
    mapping.

    Attributes:
        group: entry-point group that was asked, `"mm_core.predictor_models"`.
        id: what was asked for.
        closest: nearest ids of the same group that exist, installed or known, best first.
        problem: the first half of the message, without the advice.
        hint: the second half: what is meant, or where to get it.
    """

    def __init__(
        self, problem: str, hint: str = "", *, group: str = "", id: str = "", closest: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint
        self.group = group
        self.id = id
        self.closest = closest


class BrokenPluginError(RegistryError):
    """The id exists, but its target cannot be imported. Not a `KeyError`: `.get(id)` must not hide it.

    `spec` is the entry, `__cause__` what Python raised (None if the declaration itself is malformed).
    """

    def __init__(self, message: str, spec: EntrySpec | None = None) -> None:
        super().__init__(message)
        self.spec = spec


class AmbiguousIdError(RegistryError):
    """Several distributions offer the id. `specs` are the claims, by distribution name."""

    def __init__(self, message: str, specs: tuple[EntrySpec, ...] = ()) -> None:
        super().__init__(message)
        self.specs = specs


class UnavailablePluginError(RegistryError):
    """The id exists but may not be used: its distribution is disabled or not on an allow list, it is made
    for another API version, or an extra is not installed.
    """

    def __init__(self, message: str, spec: EntrySpec | None = None) -> None:
        super().__init__(message)
        self.spec = spec


class SelectionError(RegistryError):
    """A selection of plugins (a file, or `plugins` of a job) cannot be used. `path` and `line` say where it
    stands, `key` which of its keys is meant: `("disable", 0)`, `("prefer", "predictor/wandit")`.
    """

    def __init__(
        self, message: str, path: str = "", line: int | None = None, key: tuple[str | int, ...] = ()
    ) -> None:
        where = f"{path}:{line}: " if path and line is not None else f"{path}: " if path else ""
        super().__init__(f"{where}{message}")
        self.problem = message
        self.path = path
        self.line = line
        self.key = key


class HookError(RegistryError):
    """A plugin's hook is misdeclared, or raised: `distribution`, `version` and `hook` say whose; `__cause__`
    says why.
    """

    def __init__(self, message: str, distribution: str = "", version: str = "", hook: str = "") -> None:
        super().__init__(message)
        self.distribution = distribution
        self.version = version
        self.hook = hook
