"""Each check of metadata and imports can fail: the good toy passes all, and one broken in one place fails that one."""

from __future__ import annotations

import json
from pathlib import Path

import mutations_build
import pytest
from mutations_light import MUTATIONS
from toy import good_toy, installed
from toy_site import DISTRIBUTION

from mm_core.testing import CHECKS, Outcome, check_plugin, load_checks

LIGHT = [check.name for check in load_checks().values() if check.stage in ("metadata", "light")]


def test_the_good_toy_passes_every_check(tmp_path: Path) -> None:
    with installed(good_toy(), tmp_path):
        report = check_plugin(DISTRIBUTION, stages=["metadata", "light"])
    wrong = [result for result in report.results if result.status is not Outcome.PASSED]
    assert not [result for result in wrong if result.status is not Outcome.SKIPPED]
    passed = {result.check for result in report.results if result.status is Outcome.PASSED}
    assert set(LIGHT) == passed, "a check that the good toy skips proves nothing"
    assert report.ok
    assert json.loads(json.dumps(report.to_dict()))["counts"]["passed"] == len(report.results) - len(wrong)


@pytest.mark.parametrize("check", LIGHT)
def test_a_toy_broken_in_one_place_fails_its_check(check: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[check]
    toy = good_toy()
    mutation.apply(toy)
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=[check], in_process=True)
    found = {result.subject: result for result in report.results}
    result = found[mutation.subject]
    assert result.status is Outcome.FAILED, result
    assert mutation.says in result.message
    assert not report.ok


def test_every_mutation_is_of_a_check() -> None:
    assert set(MUTATIONS) == set(LIGHT)


def test_every_check_has_a_toy_that_fails_it() -> None:
    broken = set(MUTATIONS) | {mutation.check for mutation in mutations_build.MUTATIONS}
    assert set(CHECKS) - broken == set()
