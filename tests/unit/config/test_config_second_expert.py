"""Two experts in one training file: what loads, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mm_core.config import ConfigError, check_file, load_training_job
from mm_core.config.together import check_files_together


def both(files: Any, boundary: float | None = 0.875, second: Any = "weights/low") -> None:
    for key in ("min_timestep_boundary", "max_timestep_boundary"):
        files.model["diffusion"].pop(key, None)
    files.model["diffusion"] |= {} if boundary is None else {"boundary": boundary}
    files.model["predictor"].pop("pipeline_num_layers", None)
    files.model["low_noise_predictor"] = second


def said(files: Any, *flags: str) -> str:
    files.write()
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags(*flags))
    return str(caught.value)


def test_a_folder_is_a_second_expert_with_the_first_ones_section(files: Any) -> None:
    both(files)
    (files.folder / "weights" / "low").mkdir(parents=True)
    files.write()
    job = load_training_job(files.flags())
    first, second = job.components["predictor"], job.components["low_noise_predictor"]
    assert second.fields == first.fields
    assert (second.role, second.path, second.from_pretrained) == (
        "predictor",
        ("low_noise_predictor",),
        "weights/low",
    )
    assert not [f for f in job.findings if f.path.startswith("low_noise_predictor")]
    values = job.resolved()["values"]["model"]
    assert values["low_noise_predictor"]["from_pretrained"] == "weights/low"
    assert values["low_noise_predictor"]["num_layers"] == 40


def test_a_section_is_checked_like_the_first(files: Any) -> None:
    both(files, second={**files.model["predictor"], "num_layer": 3})
    assert '"num_layer"' in said(files)
    both(files, second=dict(files.model["predictor"]))
    # --load names the first one's weights.
    assert "low_noise_predictor (wandit) has no weights" in said(files)


SPOILT: dict[str, tuple[Callable[[Any], Any], tuple[str, ...], str]] = {
    "no boundary": (
        lambda f: both(f, None), (),
        "low_noise_predictor is given, but diffusion (wan_flow_match_scheduler) does not say at which noise level it takes over",
    ),
    "one expert's part": (
        lambda f: [both(f, 0.9), f.model["diffusion"].update(expert="high")], (), "without expert in place of boundary",
    ),
    "no second": (
        lambda f: [both(f), f.model.pop("low_noise_predictor")], (),
        "boundary 0.875 without expert parts the noise levels between two experts, but there is one",
    ),
    "stages": (
        lambda f: both(f), ("--pipeline-model-parallel-size", "2", "--nproc-per-node", "2"),
        "2: pipeline stages are cut from one network, and two experts are trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_does_not_go_together_is_said(case: str, files: Any) -> None:
    spoil, flags, words = SPOILT[case]
    (files.folder / "weights" / "low").mkdir(parents=True)
    spoil(files)
    assert words in said(files, *flags)


def test_an_idle_predictor_needs_a_second_one(files: Any) -> None:
    files.fsdp2 = "offload_idle_predictor: true\n"
    files.write()
    job = load_training_job(files.flags())
    assert any("it is never idle" in finding.message for finding in job.findings)


def test_the_sampler_hands_over_where_training_did(files: Any) -> None:
    both(files)
    model, inference = files.folder / "m.json", files.folder / "i.json"
    model.write_text(json.dumps(files.model), encoding="utf-8")
    sampling = {
        "pipeline_class": "WanPipeline", "boundary_ratio": 0.9, "low_noise_predictor": "weights/low", "prompt": "a",
        **{key: files.model[key] for key in ("predictor", "ae", "text_encoder", "diffusion")},
        "tokenizer": {"from_pretrained": "weights/tokenizer"}, "pipeline_config": {"input_size": [49, 480, 832]},
    }  # fmt: skip
    inference.write_text(json.dumps(sampling), encoding="utf-8")
    found = [f.message for f in check_files_together([str(model), str(inference)]) if f.code == "boundary"]
    assert len(found) == 1
    assert (
        "boundary_ratio 0.9 is sigma 0.9000, but the high-noise expert is trained down to sigma 0.8750"
        in found[0]
    )
    assert not [f for f in check_file(str(model)) if f.level == "error"]
