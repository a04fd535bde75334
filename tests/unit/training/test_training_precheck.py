"""What is known before a rank is started, and where a mistake in it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
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


def test_all_wrong_patterns_are_found_at_once_each_at_its_place(job: Any, tmp_path: Path) -> None:
    text = "sub_modules_to_wrap: ['predictor.bloks.{*}']\nignored_modules:\n- text_encodr\n- ae\nrecompute_num_layers: 2\n"
    with pytest.raises(ConfigError) as caught:
        precheck.check_build(job(text))
    places = [finding.where.rpartition("fsdp2.yaml:")[2] for finding in caught.value.findings]
    assert places == ["1:23", "3:3"]
    with pytest.raises(ConfigError, match=r"fsdp2\.yaml:1:23: recompute_num_layers: 2 has nothing to count"):
        precheck.check_build(job("recompute_num_layers: 2\n"))


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


@pytest.fixture
def weights(job: Any, tmp_path: Path) -> Path:
    """A folder with the weights of the tiny job's predictor, one of them of another shape."""
    predictor = precheck.build_on_meta(job().components["predictor"], None).to_empty(device="cpu")
    state = {name: tensor.contiguous() for name, tensor in predictor.state_dict().items()}
    state["proj_out.bias"] = state["proj_out.bias"][:3].clone()
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def started_from(weights: Path, *words: str) -> TrainingJob:
    files = ["--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json")]
    return load_training_job(parse_train_flags([*files, "--train-iters", "1", "--lr", "1", *words]))


@pytest.mark.parametrize("way", ["section", "load", "load wins"])
def test_weights_that_do_not_fit_are_found_before_a_rank_starts(job: Any, weights: Path, way: str) -> None:
    section = [f"model.predictor.from_pretrained={weights}", "model.predictor.init=pretrained"]
    words = {
        "section": section,
        "load": ["--load", str(weights)],
        "load wins": ["model.predictor.from_pretrained=/tmp", "--load", str(weights)],
    }[way]
    with pytest.raises(ConfigError) as caught:
        precheck.check_build(started_from(weights, *words))
    (finding,) = caught.value.findings
    assert finding.code == "weights"
    assert finding.message.startswith(
        f"{weights} has 1 tensor of another shape than predictor (wandit): proj_out.bias is [3], and ["
    )
    assert ("--load" in finding.path) is (way != "section")


def test_weights_of_the_section_are_not_looked_at_when_load_says_others(
    job: Any, weights: Path, tmp_path: Path
) -> None:
    predictor = precheck.build_on_meta(job().components["predictor"], None).to_empty(device="cpu")
    right = tmp_path / "right"
    right.mkdir()
    state = {name: tensor.contiguous() for name, tensor in predictor.state_dict().items()}
    save_file(state, right / "model.safetensors")
    words = [f"model.predictor.from_pretrained={weights}", "model.predictor.init=pretrained"]
    assert precheck.check_build(started_from(weights, *words, "--load", str(right)))


def test_a_tilde_is_the_home_folder(
    job: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"proj_out\.bias"):
        precheck.check_build(started_from(weights, "--load=~/weights"))
