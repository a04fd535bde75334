"""What the conformance kit says of a plugin: one result for each check of each component. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a check ended. The last three and `failed` say different things of a plugin that is not as promised."""

    PASSED = "passed"
    SKIPPED = "skipped"  # it does not apply; the message says why
    KNOWN_FAILURE = "known_failure"  # it failed as its example declares; the message gives the reason
    FAILED = "failed"
    UNEXPECTED_PASS = "unexpected_pass"  # its example declares a failure that is none any more
    CRASHED = "crashed"  # the process ended, or ran out of time

    @property
    def ok(self) -> bool:
        return self in (Outcome.PASSED, Outcome.SKIPPED, Outcome.KNOWN_FAILURE)


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one subject.

    Attributes:
        check: name of the check, `state-dict-round-trip`.
        subject: the component, `predictor/wandit`; the distribution for a check of a plugin as a whole.
        status: see `Outcome`.
        message: why it is not a plain pass, in one sentence; empty for a pass.
        seconds: wall-clock time that it took; information, nothing is judged by it.
        detail: a traceback or other text of many lines; may be empty.
    """

    check: str
    subject: str
    status: Outcome
    message: str = ""
    seconds: float = 0.0
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the six fields, JSON-able."""
        return {**asdict(self), "status": str(self.status), "seconds": round(self.seconds, 4)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Return the result that `to_dict` described."""
        return cls(**{**data, "status": Outcome(data["status"])})


@dataclass(frozen=True)
class Report:
    """All results of one plugin.

    Attributes:
        distribution, version: of the plugin.
        results: by subject, then in the order in which the checks ran.
        imports: what importing its targets did, one item a target; empty if none was imported.
        seconds: wall-clock time of the whole.
    """

    distribution: str
    version: str
    results: tuple[Result, ...]
    imports: tuple[Mapping[str, Any], ...] = field(default=())
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no check failed, crashed, or passed against expectation."""
        return all(result.ok for result in self.results)

    @property
    def untried(self) -> tuple[str, ...]:
        """Components that were not built, or not run: every check that builds was skipped, or the one that calls first."""
        from mm_core.testing.check import load_checks
        from mm_core.testing.prerequisites import LAST_STEPS

        checks = load_checks()
        found: dict[str, dict[str, Outcome]] = {}
        for result in self.results:
            known = checks.get(result.check)
            if known is not None and known.stage == "build":
                found.setdefault(result.subject, {})[result.check] = result.status
        return tuple(
            subject
            for subject, ended in found.items()
            if set(ended.values()) == {Outcome.SKIPPED}
            or any(ended.get(name) is Outcome.SKIPPED for name in LAST_STEPS)
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of results by outcome; those that do not occur are left out."""
        found = Counter(result.status for result in self.results)
        return {str(outcome): found[outcome] for outcome in Outcome if found[outcome]}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, JSON-able."""
        return {
            "distribution": self.distribution,
            "version": self.version,
            "ok": self.ok,
            "counts": self.counts,
            "untried": list(self.untried),
            "results": [result.to_dict() for result in self.results],
            "imports": [dict(item) for item in self.imports],
            "seconds": round(self.seconds, 3),
        }
