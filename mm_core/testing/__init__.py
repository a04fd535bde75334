"""The conformance kit: what a plugin promises, checked. Importing this package imports neither torch nor a plugin.

In a plugin's tests one line runs everything:

    from mm_core.testing import conformance

    test_conformance = conformance("mmzoo-plugin-haar")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_core._lazy import lazy_exports

if TYPE_CHECKING:
    from mm_core.testing.case import Case, Plugin
    from mm_core.testing.check import CHECKS, Check, CheckFailed, CheckSkipped, check, load_checks, require
    from mm_core.testing.example import Example
    from mm_core.testing.pytest_plugin import conformance
    from mm_core.testing.result import Outcome, Report, Result
    from mm_core.testing.run import check_plugin

_EXPORTS = {
    **dict.fromkeys(("Case", "Plugin"), "mm_core.testing.case"),
    **dict.fromkeys(
        ("CHECKS", "Check", "CheckFailed", "CheckSkipped", "check", "load_checks", "require"),
        "mm_core.testing.check",
    ),
    "Example": "mm_core.testing.example",
    "conformance": "mm_core.testing.pytest_plugin",
    **dict.fromkeys(("Outcome", "Report", "Result"), "mm_core.testing.result"),
    "check_plugin": "mm_core.testing.run",
}

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "CheckFailed",
    "CheckSkipped",
    "Example",
    "Outcome",
    "Plugin",
    "Report",
    "Result",
    "check",
    "check_plugin",
    "conformance",
    "load_checks",
    "require",
]

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
