"""One defect is one failure: checks that could only fail for its reason are not tried, and say which check has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mutations_build import MUTATIONS
from toy import Toy, good_toy, installed
from toy_site import DISTRIBUTION

from mm_core.testing import Outcome, check_plugin, load_checks
from mm_core.testing.prerequisites import cause, prerequisites

DIT = "predictor/toy_dit"
SUBJECT = "mmzoo-plugin-toy"
_INSIDE = "        text = prompt[0] if isinstance(prompt, list) else prompt"


def no_super(toy: Toy) -> None:
    toy.replace("predictor.py", "        super().__init__()\n        self.channels", "        self.channels")


def wrong_signature(toy: Toy) -> None:
    toy.files["predictor.py"] = (
        toy.files["predictor.py"]
        .replace("prompt", "caption")
        .replace("if conditions:", "if False:")
        .replace("**conditions: Any,", "")
    )


def raising_forward(toy: Toy) -> None:
    toy.replace("predictor.py", _INSIDE, f"        raise ValueError('not today')\n{_INSIDE}")


def ending_forward(toy: Toy) -> None:
    toy.replace("predictor.py", _INSIDE, f"        __import__('os')._exit(4)\n{_INSIDE}")


def failing_hooks(toy: Toy) -> None:
    toy.prepend("hooks.py", "raise RuntimeError('not today')")


def failing_policy(toy: Toy) -> None:
    toy.prepend("policy.py", "raise RuntimeError('not today')")


def other_api(toy: Toy) -> None:
    toy.requires[:] = ["mmzoo-core>=7"]


@pytest.mark.parametrize(
    ("defect", "check", "subject", "status"),
    [
        (no_super, "builds-a-module", DIT, Outcome.FAILED),
        pytest.param(
            wrong_signature, "has-the-methods-of-its-role", DIT, Outcome.FAILED, marks=pytest.mark.slow
        ),
        pytest.param(
            raising_forward, "predicts-the-latents-shape", DIT, Outcome.FAILED, marks=pytest.mark.slow
        ),
        (ending_forward, "predicts-the-latents-shape", DIT, Outcome.CRASHED),
        pytest.param(failing_policy, "companions-exist", DIT, Outcome.FAILED, marks=pytest.mark.slow),
        (failing_hooks, "hooks-can-be-activated", SUBJECT, Outcome.FAILED),
        pytest.param(other_api, "declares-its-api-range", SUBJECT, Outcome.FAILED, marks=pytest.mark.slow),
    ],
)
def test_one_defect_is_one_failure(
    tmp_path: Path, defect: Callable[[Toy], None], check: str, subject: str, status: Outcome
) -> None:
    toy = good_toy()
    for entries in toy.entries.values():  # the pipeline runs the predictor too, and has checks of its own
        for name in [name for name in entries if name.endswith("toy_pipeline")]:
            del entries[name]
    defect(toy)
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION)
    bad = [(result.check, result.subject, result.status) for result in report.results if not result.ok]
    assert bad == [(check, subject, status)]
    untried = {r.message for r in report.results if r.message.startswith("not tried")}
    assert untried == {f"not tried, because {check} {status}"}


def test_a_declared_failure_keeps_nothing_from_being_tried(tmp_path: Path) -> None:
    toy = good_toy()
    toy.replace(
        "examples.py", "prompt=(5, 6)", 'prompt=(5, 6), known_failures={"builds-on-meta": "an old one"}'
    )
    toy.replace("predictor.py", "self.head = nn.Linear(width, 4 * channels)",
                "self.head = nn.Linear(width, 4 * channels, device='cpu')")  # fmt: skip
    names = ["builds-on-meta", "policy-makes-a-plan", "meta-and-cpu-have-the-same-tensors"]
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=names)
    assert report.counts == {"passed": 2 + len(names), "known_failure": 1}  # those of the network too


def test_a_check_that_is_asked_for_alone_is_tried(tmp_path: Path) -> None:
    toy = good_toy()
    no_super(toy)
    with installed(toy, tmp_path):
        report = check_plugin(DISTRIBUTION, only=["learns"])
    assert report.counts == {"failed": 1}


def test_what_a_check_needs_is_a_check_and_runs_before_it() -> None:
    checks = load_checks()
    order = list(checks)
    for position, (name, check) in enumerate(checks.items()):
        for needed in prerequisites(check):
            assert needed in checks
            assert order.index(needed) < position, f"{needed} runs after {name}"


def test_every_defect_of_forward_is_told_by_one_of_the_steps() -> None:
    checks = load_checks()
    steps = {"predicts-the-latents-shape": Outcome.FAILED}
    roles = {mutation.check for mutation in MUTATIONS if mutation.subject == DIT}
    waiting = {name for name in roles if cause(checks[name], checks, steps)}
    assert {"learns", "gradients-are-right", "resume-is-bit-equal", "eval-is-deterministic"} <= waiting
    assert not {"builds-on-meta", "policy-makes-a-plan", "build-reads-no-weights"} & waiting
