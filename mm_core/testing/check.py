"""How a check is declared, and the table of all of them.

    @check("the state dict survives a round trip", stage="build", roles=("predictor", "ae"))
    def state_dict_round_trip(case: Case) -> None:
        \"\"\"Longer explanation, for the documentation.\"\"\"
        ...
        raise CheckFailed("blocks.0.weight differs after loading")

A check's name is its function's with dashes, `state-dict-round-trip`. Modules of checks import neither torch nor a
plugin at their top: pytest collects the names. What needs torch is imported inside the functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mm_registry.groups import ROLES

if TYPE_CHECKING:
    from mm_core.testing.case import Case, Plugin

Stage = Literal["metadata", "light", "build", "ranks"]
STAGES: tuple[Stage, ...] = ("metadata", "light", "build", "ranks")
"""In the order in which they run: from metadata alone; by importing; by building; on two ranks."""

_F = TypeVar("_F", bound=Callable[..., None])


class CheckFailed(Exception):  # noqa: N818 - it is an outcome, not an error of ours
    """Raised by a check: the plugin does not do what it must. The message is one sentence; `detail` may hold more."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class CheckCrashed(CheckFailed):
    """Raised by a check that cannot run because the plugin ended, or hung, the process that tried."""


class CheckSkipped(Exception):  # noqa: N818
    """Raised by a check that does not apply to this component; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: `state-dict-round-trip`.
        title: what holds when it passes, in one line.
        stage: see `STAGES`.
        roles: the roles that it applies to; None for all.
        whole_plugin: whether it runs once a plugin, with a `Plugin`, rather than once a component, with a `Case`.
        function: what runs; it returns nothing, or raises `CheckFailed` or `CheckSkipped`.
        explanation: the rest of what there is to say.
    """

    name: str
    title: str
    stage: Stage
    roles: frozenset[str] | None
    whole_plugin: bool
    function: Callable[[Any], None]
    explanation: str = ""

    def applies_to(self, subject: Case | Plugin) -> bool:
        """Whether it is a check of this plugin or component at all."""
        role = getattr(subject, "role", None)
        return (role is None) == self.whole_plugin and (self.roles is None or role in self.roles)


_checks: dict[str, Check] = {}
CHECKS: Mapping[str, Check] = MappingProxyType(_checks)
"""All checks by name, in the order in which they run; filled by `load_checks()`."""


def check(
    title: str, *, stage: Stage, roles: Collection[str] | None = None, whole_plugin: bool = False
) -> Callable[[_F], _F]:
    """Declare the function below as a check. See the module's text, and `Check` for the arguments."""
    assert stage in STAGES, stage
    assert roles is None or set(roles) <= set(ROLES), roles

    def declare(function: _F) -> _F:
        name = function.__name__.replace("_", "-")
        known = _checks.get(name)
        assert known is None or known.function.__module__ == function.__module__, f"two checks named {name}"
        explanation = " ".join((function.__doc__ or "").split())
        chosen = None if roles is None else frozenset(roles)
        _checks[name] = Check(name, title, stage, chosen, whole_plugin, function, explanation)
        return function

    return declare


def load_checks() -> Mapping[str, Check]:
    """Import every module of `mm_core.testing.checks` and return `CHECKS`, by stage, causes before what they cause."""
    package = importlib.import_module("mm_core.testing.checks")
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    from mm_core.testing.prerequisites import in_order

    staged = sorted(_checks.values(), key=_place)
    ordered = in_order({item.name: item for item in staged})
    _checks.clear()
    _checks.update(ordered)
    return CHECKS


def _place(item: Check) -> tuple[int, str, int]:
    """By stage, then as they are written, whichever module was imported first."""
    return STAGES.index(item.stage), item.function.__module__, item.function.__code__.co_firstlineno


def require(condition: object, message: str, detail: str = "") -> None:
    """Raise `CheckFailed(message)` unless the condition holds."""
    if not condition:
        raise CheckFailed(message, detail)
