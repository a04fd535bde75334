"""The kit itself: what a plugin does to its process is a result, not an end; declared failures; pytest; the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from toy import Toy, good_toy, installed
from toy_site import DISTRIBUTION

from mm_core.testing import CHECKS, Outcome, Report, Result, check_plugin, load_checks
from mm_core.testing.catalogue import with_catalogue
from mm_core.testing.survey import absolute_path
from mm_registry.errors import UserError

DIT = "predictor/toy_dit"
FEW = ["target-exists", "pickles-by-id", "config-refuses-unknown-keys", "builds-a-module"]


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Callable[[Toy], Path]]:
    """Have a toy on `sys.path`; returns its folder."""
    with ExitStack() as stack:

        def enter(toy: Toy) -> Path:
            site = tmp_path / "site"
            stack.enter_context(installed(toy, site))
            return site

        yield enter


def statuses(report: Report, subject: str = DIT) -> dict[str, Outcome]:
    return {result.check: result.status for result in report.results if result.subject == subject}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("import ctypes\n\nctypes.string_at(0)", "SIGSEGV"),
        ("import os\n\nos._exit(3)", "exit code 3"),
        ("import time\n\ntime.sleep(600)", "within 8 s"),
    ],
    ids=["segfault", "exit", "hang"],
)
def test_an_import_that_ends_or_hangs_its_process_is_a_result(
    install: Callable[[Toy], Path], statement: str, how: str
) -> None:
    toy = good_toy()
    toy.prepend("predictor.py", statement)
    install(toy)
    report = check_plugin(DISTRIBUTION, only=FEW, time_limit=8)
    found = {result.check: result for result in report.results if result.subject == DIT}
    assert statuses(report) == {
        "target-exists": Outcome.CRASHED,
        "pickles-by-id": Outcome.SKIPPED,
        "builds-a-module": Outcome.CRASHED,
        "config-refuses-unknown-keys": Outcome.PASSED,
    }
    assert how in found["target-exists"].message
    assert set(statuses(report, "text_encoder/toy_text").values()) == {Outcome.PASSED}
    assert not report.ok


def test_a_config_class_that_ends_its_process_is_contained(install: Callable[[Toy], Path]) -> None:
    toy = good_toy()
    toy.entries["mm_core.configs"][DIT] = "mm_plugin_toy.fatal:ToyDiTConfig"
    toy.files["fatal.py"] = "import os\n\nos._exit(7)\n"
    install(toy)
    report = check_plugin(DISTRIBUTION, only=["companions-exist", *FEW])
    found = statuses(report)
    assert found["companions-exist"] is Outcome.CRASHED
    assert found["config-refuses-unknown-keys"] is Outcome.SKIPPED
    assert found["builds-a-module"] is Outcome.CRASHED
    assert found["pickles-by-id"] is Outcome.PASSED
    assert "mm_plugin_toy.fatal" in next(r.message for r in report.results if r.status is Outcome.CRASHED)


def test_a_check_that_ends_the_process_does_not_take_the_others_with_it(
    install: Callable[[Toy], Path],
) -> None:
    toy = good_toy()
    toy.replace(
        "predictor.py",
        "        self.channels, self.width",
        "        import os; os._exit(9)\n        self.channels, self.width",
    )
    install(toy)
    report = check_plugin(DISTRIBUTION, only=FEW)
    assert statuses(report) == {
        "target-exists": Outcome.PASSED,
        "pickles-by-id": Outcome.PASSED,
        "config-refuses-unknown-keys": Outcome.PASSED,
        "builds-a-module": Outcome.CRASHED,
    }
    crash = next(result for result in report.results if result.status is Outcome.CRASHED)
    assert crash.message == "the process ended with exit code 9"
    assert set(statuses(report, "ae/toy_vae").values()) == {Outcome.PASSED}


def test_sys_exit_is_a_failure_like_any_other(install: Callable[[Toy], Path]) -> None:
    toy = good_toy()
    toy.prepend("predictor.py", "import sys\n\nsys.exit(4)")
    install(toy)
    report = check_plugin(DISTRIBUTION, only=["target-exists"])
    (result,) = (result for result in report.results if result.subject == DIT)
    assert result.status is Outcome.FAILED
    assert "SystemExit: 4" in result.message
    assert "predictor.py" in result.detail


def declaring(toy: Toy) -> Toy:
    toy.replace(
        "examples.py",
        "prompt=(5, 6)",
        'prompt=(5, 6), known_failures={"config-refuses-unknown-keys": "keys of older files are passed over"}',
    )
    return toy


def test_a_declared_failure_does_not_count_and_its_reason_is_told(install: Callable[[Toy], Path]) -> None:
    toy = declaring(good_toy())
    toy.replace(
        "config.py", "class ToyDiTConfig(SectionModel)", 'class ToyDiTConfig(SectionModel, extra="ignore")'
    )
    install(toy)
    report = check_plugin(DISTRIBUTION, only=["config-refuses-unknown-keys"])
    (result,) = (result for result in report.results if result.subject == DIT)
    assert result.status is Outcome.KNOWN_FAILURE
    assert "keys of older files are passed over" in result.message
    assert report.ok


def test_a_declared_failure_that_passes_counts(install: Callable[[Toy], Path]) -> None:
    install(declaring(good_toy()))
    report = check_plugin(DISTRIBUTION, only=["config-refuses-unknown-keys"])
    assert statuses(report)["config-refuses-unknown-keys"] is Outcome.UNEXPECTED_PASS
    assert not report.ok
    assert report.counts["unexpected_pass"] == 1


def test_a_plugin_without_config_class_api_range_and_example_passes_what_applies(
    install: Callable[[Toy], Path],
) -> None:
    toy = good_toy()
    for group in list(toy.entries):
        if group not in ("mm_core.predictor_models", "mm_core.ae_models"):
            del toy.entries[group]
    toy.requires.clear()
    install(toy)
    report = check_plugin(DISTRIBUTION)
    wrong = [result for result in report.results if not result.ok]
    assert not wrong
    said = {result.check: result.message for result in report.results if result.status is Outcome.SKIPPED}
    assert "mmzoo-core>=0.1,<0.2" in said["declares-its-api-range"]
    assert said["config-has-a-schema"] == "it has no config class"
    assert "mm_core.examples" in said["example-is-valid"]
    # The constructor's signature stands in for the config class.
    assert {
        statuses(report)[check] for check in ("config-refuses-unknown-keys", "config-refuses-wrong-types")
    } == {Outcome.PASSED}
    assert statuses(report)["constructor-takes-its-section"] is Outcome.PASSED


def test_a_component_that_was_not_built_or_not_run_is_named() -> None:
    builds = ["builds-a-module", "encodes-to-its-latent-shape"]
    skipped = [Result(name, "ae/big", Outcome.SKIPPED, "too large") for name in builds]
    tried = [Result(name, DIT, Outcome.PASSED) for name in ("builds-a-module", "predicts-the-latents-shape")]
    tried.append(Result("prompt-mask-is-respected", DIT, Outcome.SKIPPED, "no mask"))
    light = Result("id-is-well-formed", "task/other", Outcome.SKIPPED)
    report = Report("a", "1", (*skipped, *tried, light))
    assert report.ok
    assert report.untried == ("ae/big",)
    assert report.to_dict()["untried"] == ["ae/big"]
    assert Report("a", "1", (Result(builds[0], "ae/big", Outcome.PASSED), skipped[1])).untried == ("ae/big",)
    failed = Report("a", "1", (Result(builds[0], "ae/big", Outcome.FAILED, "no"),))
    assert failed.untried == ()


def test_sizes_come_from_the_constructor_where_there_is_nothing_else(
    install: Callable[[Toy], Path],
) -> None:
    toy = good_toy()
    for group in ("mm_core.configs", "mm_core.examples", "mm_core.hooks"):
        del toy.entries[group]
    install(toy)
    names = ["predicts-the-latents-shape", "encodes-to-its-latent-shape", "encodes-to-embeddings-and-mask"]
    report = check_plugin(DISTRIBUTION, only=names)
    assert report.counts == {"passed": 3}
    assert report.untried == ()


def test_names_of_import_hooks_on_the_path_reach_the_worker_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Setuptools' editable installs of packages without `__init__.py` are found through such a name."""
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    hook = "__editable__.mmzoo_plugin_toy-1.0.finder.__path_hook__"
    monkeypatch.setattr(sys, "path", [hook, "src", ""])
    assert absolute_path() == [hook, str(tmp_path / "src"), str(tmp_path)]


def test_a_result_survives_json() -> None:
    result = Result("a-check", DIT, Outcome.FAILED, "it does not", 0.25, "Traceback")
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_unknown_names_are_errors_of_the_user(install: Callable[[Toy], Path]) -> None:
    install(good_toy())
    with pytest.raises(UserError, match="did you mean 'mmzoo-plugin-toy'"):
        check_plugin("mmzoo-plugin-tay")
    with pytest.raises(UserError, match="declares no entry point of MM Zoo"):
        check_plugin("pytest")
    with pytest.raises(UserError, match="did you mean 'pickles-by-id'"):
        check_plugin(DISTRIBUTION, only=["pickle-by-id"])
    with pytest.raises(UserError, match=r"no stage 'bild'.*did you mean 'build'"):
        check_plugin(DISTRIBUTION, stages=["bild"])


def test_thirty_checks_apply_to_a_component_of_each_kind() -> None:
    load_checks()
    for role in ("predictor", "ae", "text_encoder", "diffusion"):
        applying = [c for c in CHECKS.values() if not c.whole_plugin and (c.roles is None or role in c.roles)]
        assert len(applying) >= 30, role


def test_the_documentation_lists_the_checks() -> None:
    page = (Path(__file__).parents[3] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert with_catalogue(page) == page, "run: python -m mm_core.testing.catalogue docs/conformance.md"


# pytest

ONE_LINE = """\
import sys

from mm_core.testing import conformance

test_conformance = conformance("mmzoo-plugin-toy", stages=["metadata"])
test_other = conformance("mmzoo-plugin-absent")
assert not {"torch", "mm_plugin_toy"} & set(sys.modules), "collecting imports nothing"
"""


def run_python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_line_in_a_test_file_gives_one_case_a_check(
    install: Callable[[Toy], Path], tmp_path: Path
) -> None:
    toy = good_toy()
    toy.readme = ""
    site = install(toy)
    file = tmp_path / "test_toy.py"
    file.write_text(ONE_LINE)
    done = run_python(site, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-c", os.devnull, str(file))
    lines = done.stdout.splitlines()
    assert any("test_conformance[predictor/toy_dit-can-be-used] PASSED" in line for line in lines), (
        done.stdout
    )
    assert any("test_conformance[mmzoo-plugin-toy-readme-is-included] FAILED" in line for line in lines)
    assert 'set "readme" in pyproject.toml' in done.stdout
    assert any("test_other FAILED" in line for line in lines)
    assert "the distribution 'mmzoo-plugin-absent' is not installed" in done.stdout
    assert "2 failed" in lines[-1]


def test_selected_cases_run_their_checks_alone(install: Callable[[Toy], Path], tmp_path: Path) -> None:
    toy = good_toy()
    toy.prepend("predictor.py", "raise RuntimeError('nobody asked for me')")
    site = install(toy)
    file = tmp_path / "test_toy.py"
    file.write_text('from mm_core.testing import conformance\n\ntest_it = conformance("mmzoo-plugin-toy")\n')
    options = ("-p", "no:cacheprovider", "-q", "-c", os.devnull, "-k", "toy_dit-config-has-a-schema")
    done = run_python(site, "-m", "pytest", *options, str(file))
    assert done.stdout.splitlines()[-1].startswith("1 passed"), done.stdout


# The command


def test_the_command_looks_at_metadata_alone_unless_it_is_told_to_import(
    install: Callable[[Toy], Path],
) -> None:
    toy = good_toy()
    for name in ("predictor.py", "config.py"):
        toy.prepend(name, "raise RuntimeError('imported')")
    site = install(toy)
    done = run_python(site, "-m", "mm_core", "plugin", "check", DISTRIBUTION, "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["imports"] == []
    assert {CHECKS[result["check"]].stage for result in report["results"]} == {"metadata"}


def test_the_command_reports_imports_and_the_whole_traceback(install: Callable[[Toy], Path]) -> None:
    toy = good_toy()
    toy.prepend("predictor.py", "import mm_plugin_toy.broken")
    toy.files["broken.py"] = "def fail():\n    raise RuntimeError('not today')\n\n\nfail()\n"
    toy.prepend("autoencoder.py", "import torch\n\ntorch.set_default_dtype(torch.float64)")
    site = install(toy)
    arguments = ("-m", "mm_core", "plugin", "check", DISTRIBUTION, "--import", "--only", "target-exists")
    done = run_python(site, *arguments, "--format", "json")
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    records = {record["target"]: record for record in report["imports"]}
    failed = records["mm_plugin_toy.predictor:ToyDiT"]
    assert "not today" in failed["error"]
    assert "broken.py" in failed["traceback"]
    assert "in fail" in failed["traceback"]
    changed = records["mm_plugin_toy.autoencoder:ToyVAE"]
    assert changed["changed_torch_state"]
    assert not changed["touched_cuda"]
    assert not changed["initialised_distributed"]
    assert changed["changes"]["torch"] == ["default dtype: torch.float32 → torch.float64"]
    assert changed["seconds"] >= changed["slowest"][0][1] >= 0
    assert any(name == "mm_plugin_toy.autoencoder" for name, _ in changed["slowest"])
    table = run_python(site, *arguments)
    assert table.returncode == 2
    assert "mm plugin check" not in table.stdout + done.stdout, "it is being run"
    assert "RuntimeError: not today" in table.stdout
    assert "changed torch's global state" in table.stdout
    assert "it does not conform" in table.stdout


def test_the_command_says_what_it_does_not_know(install: Callable[[Toy], Path]) -> None:
    site = install(good_toy())
    for arguments, said in (
        (["mmzoo-plugin-tov"], "did you mean 'mmzoo-plugin-toy'"),
        ([DISTRIBUTION, "--only", "meta-bild"], "has no check 'meta-bild'"),
        ([DISTRIBUTION, "--only", "pickles-by-id"], "add --import"),
        ([], "usage: mm plugin check"),
    ):
        done = run_python(site, "-m", "mm_core", "plugin", "check", *arguments)
        assert said in done.stdout + done.stderr
        assert done.returncode == (2 if arguments else 0)
        assert "Traceback" not in done.stderr
