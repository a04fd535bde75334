"""Every check that builds and runs a component fails for a plugin that is broken in that way, and only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from defects import Mutation
from mutations_build import MUTATIONS
from toy import good_toy, installed
from toy_site import DISTRIBUTION

from mm_core.testing import Outcome, Report, check_plugin, load_checks

pytestmark = pytest.mark.timeout(120)
STAGES = ("build", "ranks")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """One thread, because ranks are forked; and torch's settings are put back."""
    torch.set_num_threads(1)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def told(report: Report) -> str:
    odd = [result for result in report.results if result.status is not Outcome.PASSED]
    return "\n".join(f"{r.status} {r.subject} {r.check}: {r.message}\n{r.detail}" for r in odd)


def test_the_whole_toy_passes_every_check_and_skips_none(tmp_path: Path) -> None:
    with installed(good_toy(), tmp_path):
        report = check_plugin(DISTRIBUTION, stages=STAGES)
    assert report.counts == {"passed": len(report.results)}, told(report)
    assert {result.check for result in report.results} == {
        name for name, check in load_checks().items() if check.stage in STAGES
    }


def test_without_examples_sizes_are_derived_and_nothing_fails(tmp_path: Path) -> None:
    toy = good_toy()
    del toy.entries["mm_core.examples"]
    names = [
        "predicts-the-latents-shape",
        "decodes-to-the-video-shape",
        "padding-does-not-matter",
        "dataset-has-items",
    ]
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=names, in_process=True)
    found = {result.check: (str(result.status), result.message) for result in report.results}
    why = "its plugin declares no example with data that it could read"
    assert found == {**dict.fromkeys(names[:3], ("passed", "")), "dataset-has-items": ("skipped", why)}


def test_without_an_example_a_model_of_the_published_size_is_not_built(tmp_path: Path) -> None:
    toy = good_toy()
    del toy.entries["mm_core.examples"]
    toy.replace(
        "config.py", "width: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 8", "width: int = 4096"
    )
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=["learns"], in_process=True)
    (result,) = report.results
    assert result.status is Outcome.SKIPPED
    assert "million parameters; declare a tiny example" in result.message


def test_without_an_example_defaults_that_do_not_do_are_no_failure(tmp_path: Path) -> None:
    toy = good_toy()
    del toy.entries["mm_core.examples"]
    toy.replace("config.py", "width: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 8", "width: int")
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=["learns", "builds-on-meta"], in_process=True)
    assert report.counts == {"skipped": 3}  # one of the network
    assert all("its defaults do not do" in result.message for result in report.results)


def test_reading_the_list_of_checks_imports_no_torch() -> None:
    code = (
        "import sys; from mm_core.testing import load_checks; load_checks(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_check_has_a_mutation() -> None:
    wanted = {name for name, check in load_checks().items() if check.stage in STAGES}
    assert {mutation.check for mutation in MUTATIONS} == wanted


def test_a_predictor_has_at_least_thirty_checks() -> None:
    ours = [c for c in load_checks().values() if c.stage in STAGES and "predictor" in (c.roles or ())]
    assert len(ours) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.check}-{m.says}"[:60].replace(" ", "_"))
def test_a_broken_toy_fails(tmp_path: Path, mutation: Mutation) -> None:
    with installed(mutation.toy(), tmp_path):
        report = check_plugin(DISTRIBUTION, only=[mutation.check], in_process=True)
    result = next(r for r in report.results if r.subject == mutation.subject)
    assert result.status is Outcome.FAILED, f"{result.status} {result.message}"
    assert mutation.says in result.message, told(report)
