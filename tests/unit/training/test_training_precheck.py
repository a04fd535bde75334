"""What is known before a rank is started, and where a mistake in it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mm_core.config import ConfigError, TrainingJob, load_training_job, parse_train_flags
from mm_core.sharding import ShardingPolicy
from mm_core.sharding.patterns import PlanError
from mm_core.training import precheck
from mm_registry.hooks import hookimpl

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[3]
TINY = Path("examples/tiny/wan22-t2v")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the tiny job with an fsdp2.yaml of this text."""
    monkeypatch.chdir(ROOT)

    def make(fsdp2: str = "sharding_size: auto\n") -> TrainingJob:
        (tmp_path / "fsdp2.yaml").write_text(fsdp2)
        files = {"--mm-model": TINY / "model.json", "--mm-data": TINY / "data.json"}
        files["--fsdp2-config-path"] = tmp_path / "fsdp2.yaml"
        words = [str(word) for pair in files.items() for word in pair]
        return load_training_job(parse_train_flags([*words, "--train-iters", "1", "--lr", "1"]))

    return make


WRONG = [
    ("sub_modules_to_wrap:\n  - predictor.blocks.{0}\n  - predictor.bloks.{*}\n", "3:5",
     "sub_modules_to_wrap[1]", 'has no "bloks"', "Closest: predictor.blocks"),
    ("ignored_modules: [ae,\n  text_encodr]\n", "2:3", "ignored_modules[1]", 'has no "text_encodr"',
     "Closest: text_encoder"),
    ("recompute_modules: [ae]\n", "1:21", "recompute_modules[0]", "names a part that is not trained", ""),
    ("recompute_modules:\n- predictor.blocks\n", "2:3", "recompute_modules[0]", "never called itself", ""),
    ("ignored_modules:\n- predictor.{\n", "2:3", "ignored_modules[0]", "unbalanced braces", ""),
]  # fmt: skip


@pytest.mark.parametrize(("fsdp2", "place", "path", "message", "suggestion"), WRONG)
def test_a_wrong_pattern_is_found_at_its_place(
    job: Any, tmp_path: Path, fsdp2: str, place: str, path: str, message: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        precheck.check_build(job(fsdp2))
    (finding,) = caught.value.findings
    assert finding.where == f"{tmp_path / 'fsdp2.yaml'}:{place}"
    assert finding.path == path
    assert message in finding.message
    assert finding.suggestion.startswith(suggestion)
    assert bool(finding.suggestion) == bool(suggestion)
    assert ".." not in str(caught.value)


def test_an_error_of_the_policy_stays_what_it_is(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "sharding_policy", lambda component: ShardingPolicy(units=("bloks.{*}",)))
    with pytest.raises(PlanError, match="policy of predictor"):
        precheck.check_build(job())


def test_the_plan_is_that_of_the_tree_after_post_build(job: Any) -> None:
    class Grow:
        @hookimpl
        def post_build(self, role: str, model_id: str, model: Any) -> None:
            if role == "predictor":
                model.adapter = nn.Linear(3, 5, device="meta")

    made = job()
    made.hooks.register(Grow(), "grow")
    made.hooks.sources["grow"] = made.components["predictor"].spec
    (plan,) = precheck.check_build(made).values()
    assert {"adapter.weight", "adapter.bias"} <= {p.name for p in plan.root.parameters}
