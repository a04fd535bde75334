"""One line in a test file runs the whole kit on a plugin:

test_conformance = conformance("mmzoo-plugin-haar")
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from mm_core.testing.check import load_checks
from mm_core.testing.execute import find_plugin, pairs, selected_checks, subjects
from mm_core.testing.result import Outcome, Report, Result
from mm_core.testing.run import check_plugin
from mm_registry.errors import UserError
from mm_registry.manager import PluginManager

Pair = tuple[str, str]
"""Subject and check."""


def conformance(
    distribution: str, *, only: Collection[str] | None = None, stages: Collection[str] | None = None
) -> Callable[..., None]:
    """Return a test function with one case for each check of each component: `predictor/wandit-meta-build`.

    Collecting reads metadata; the plugin is imported in a worker process when the first case runs, once for all of them.
    If only some cases are selected (`pytest -k`), only their checks run. If the plugin is not installed, there is one case
    and it fails.

    Args:
        distribution: `mmzoo-plugin-haar`, installed.
        only: names of checks; all by default.
        stages: names of stages; all by default.
    """
    try:
        wanted = _pairs(distribution, only, stages)
    except UserError as error:
        return _not_installed(str(error))

    @pytest.mark.parametrize(
        ("subject", "check"), wanted, ids=[f"{subject}-{check}" for subject, check in wanted]
    )
    def test_conformance(subject: str, check: str, request: pytest.FixtureRequest) -> None:
        chosen = _chosen(request, test_conformance) or {(subject, check)}
        names = {name for _, name in chosen}
        whole = names == {name for _, name in wanted}
        report = _report(
            distribution, None if whole and only is None else tuple(sorted(names)), _tuple(stages)
        )
        _judge(
            next(result for result in report.results if (result.subject, result.check) == (subject, check))
        )

    return test_conformance


def _pairs(distribution: str, only: Collection[str] | None, stages: Collection[str] | None) -> list[Pair]:
    load_checks()
    checks = selected_checks(only, stages)
    with tempfile.TemporaryDirectory() as folder:
        plugin = find_plugin(distribution, PluginManager(), Path(folder))
        return [
            (subject.subject, check.name)
            for subject in subjects(plugin, Path(folder), with_examples=False)
            for check in pairs(checks, subject)
        ]


def _not_installed(message: str) -> Callable[..., None]:
    def test_conformance() -> None:
        pytest.fail(message, pytrace=False)

    return test_conformance


def _chosen(request: pytest.FixtureRequest, function: Callable[..., None]) -> set[Pair]:
    """The cases of this test function that this session runs."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    cases = [
        item.callspec.params for item in items if item.function is function and hasattr(item, "callspec")
    ]
    return {(str(case["subject"]), str(case["check"])) for case in cases}


@functools.cache
def _report(distribution: str, only: tuple[str, ...] | None, stages: tuple[str, ...] | None) -> Report:
    return check_plugin(distribution, only=only, stages=stages)


def _judge(result: Result) -> None:
    text = "\n".join(filter(None, (result.message, result.detail)))
    if result.status is Outcome.SKIPPED:
        pytest.skip(result.message)
    if result.status is Outcome.KNOWN_FAILURE:
        pytest.xfail(result.message)
    if not result.ok:
        pytest.fail(f"{result.subject} {result.check}: {result.status}: {text}", pytrace=False)


def _tuple(names: Collection[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(sorted(names))
