"""What plugins do to the kit itself: hang, write into its files, fork, or cannot be used at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy import Toy, good_toy, installed
from toy_site import DISTRIBUTION

from mm_core.testing import Outcome, Report, check_plugin

Checked = Callable[..., Report]
DIT = "predictor/toy_dit"
WRITES = """\
import os

for fd in range(3, 40):
    try:
        os.write(fd, b'{"event": "end"}\\nnonsense\\n')
    except OSError:
        pass
"""


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """Install a toy and run some checks on it."""

    def check(toy: Toy, *only: str, **options: float) -> Report:
        with installed(toy, tmp_path / "site"):
            return check_plugin(DISTRIBUTION, only=only, **options)

    return check


def of(report: Report, name: str, subject: str = DIT) -> tuple[Outcome, str]:
    (found,) = (r for r in report.results if (r.check, r.subject) == (name, subject))
    return found.status, found.message


@pytest.mark.parametrize("before", ["", "import signal\n\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"])
def test_a_config_class_that_hangs_is_a_result(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    # Shorter than the import may take: the kit must not lose patience before the import's own limit.
    monkeypatch.setattr("mm_core.testing.run.TIME_LIMIT", 1.0)
    toy = good_toy()
    toy.entries["mm_core.configs"][DIT] = "mm_plugin_toy.fatal:ToyDiTConfig"
    toy.files["fatal.py"] = f"{before}import time\n\ntime.sleep(600)\n"
    report = checked(toy, "companions-exist", "target-exists", time_limit=6)
    status, message = of(report, "companions-exist")
    assert status is Outcome.CRASHED
    assert "not imported within 6 s" in message
    assert of(report, "target-exists")[0] is Outcome.PASSED


@pytest.mark.parametrize("file", ["config.py", "predictor.py"])
def test_writing_into_the_kits_files_is_a_result(checked: Checked, file: str) -> None:
    toy = good_toy()
    toy.prepend(file, WRITES)
    report = checked(toy, "companions-exist", "target-exists")
    status, message = of(report, "companions-exist" if file == "config.py" else "target-exists")
    assert status is Outcome.CRASHED
    assert "wrote into the files" in message


def test_a_fork_that_comes_back_tells_nothing(checked: Checked) -> None:
    toy = good_toy()
    toy.prepend("config.py", "import os\n\nos.fork()")
    toy.prepend("predictor.py", "import os\n\nos.fork()")
    report = checked(toy, "companions-exist", "target-exists")
    assert {str(result.status) for result in report.results} == {"passed"}


def test_a_plugin_for_another_core_is_told_so(checked: Checked) -> None:
    toy = good_toy()
    toy.requires[0] = "mmzoo-core>=7"
    report = checked(toy, "target-builds", "builds-a-module")
    status, message = of(report, "target-builds")
    assert status is Outcome.FAILED
    assert "it needs mmzoo-core >=7" in message
    assert of(report, "builds-a-module") == (Outcome.SKIPPED, "not tried, because target-builds failed")


def test_one_cause_is_told_once(checked: Checked) -> None:
    toy = good_toy()
    toy.replace(
        "config.py", "class ToyDiTConfig(SectionModel):", "class ToyDiTConfig(SectionModel):\n    needed: int"
    )
    report = checked(toy, "section-is-accepted", "builds-a-module", "two-ranks-equal-one")
    assert of(report, "section-is-accepted")[0] is Outcome.FAILED
    for name in ("builds-a-module", "two-ranks-equal-one"):
        assert of(report, name) == (Outcome.SKIPPED, "not tried, because section-is-accepted failed")
    assert of(report, "builds-a-module", "ae/toy_vae")[0] is Outcome.PASSED
    assert not report.ok


def test_importing_torch_is_no_change_of_its_settings(checked: Checked) -> None:
    toy = good_toy()
    toy.prepend("config.py", "import torch")
    report = checked(toy, "config-is-light", "import-keeps-torch-state")
    assert of(report, "config-is-light")[0] is Outcome.FAILED
    assert of(report, "import-keeps-torch-state")[0] is Outcome.PASSED


def test_a_function_of_torch_that_is_replaced_is_found(checked: Checked) -> None:
    toy = good_toy()
    toy.prepend("predictor.py", "import torch\n\ntorch.equal = lambda a, b: True")
    status, message = of(checked(toy, "import-keeps-torch-state"), "import-keeps-torch-state")
    assert status is Outcome.FAILED
    assert "function torch.equal" in message


def test_a_call_that_fails_says_what_it_was_given(checked: Checked) -> None:
    toy = good_toy()
    toy.replace("examples.py", "prompt=(5, 6)", "prompt=(5, 7)")
    status, message = of(checked(toy, "predicts-the-latents-shape"), "predicts-the-latents-shape")
    assert status is Outcome.FAILED
    assert "prompt [2, 5, 7]" in message
    assert "its example" in message
