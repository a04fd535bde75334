"""Experts of training and inference files meet at one sigma."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.component import ComponentConfig
from mm_core.config.experts import TrainedSigmas, shifted_sigma, trained_sigmas
from mm_core.config.together import check_files_together
from mm_plugin_wan22.config import WanFlowMatchSchedulerConfig
from mm_registry import UserError
from mm_registry.spec import EntrySpec


def write(folder: Path, name: str, value: Any) -> str:
    """Write a file; return its name, as `mm check` in that folder is given it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2))
    return name


@pytest.fixture
def job(files: Any, tmp_path: Path) -> Any:
    """Check files with these diffusion sections, and an inference file with these keys."""

    def check(
        *diffusions: dict[str, Any], boundary: float | None = 0.875, flow_shift: float = 5.0, more: Any = None
    ) -> list[str]:
        names = []
        for index, diffusion in enumerate(diffusions):
            section = {
                "model_id": "wan_flow_match_scheduler",
                "shift": 5,
                "sigma_min": 0.0,
                "extra_one_step": True,
            }
            model = {**files.model, "diffusion": {**section, **diffusion}}
            names.append(write(tmp_path, f"train{index}.json", model))
        files.inference["diffusion"]["flow_shift"] = flow_shift
        files.inference["boundary_ratio"] = boundary
        files.inference |= more or {}
        names.append(write(tmp_path, "sample.json", files.inference))
        return [str(finding) for finding in check_files_together(names)]

    return check


def place(file: str, key: str, value: Any) -> str:
    """Where the value of a key stands."""
    for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
        if line.strip().rstrip(",") == f'"{key}": {json.dumps(value)}':
            return f"{file}:{number}:{line.index(':') + 3}"
    raise AssertionError(f"{key} is not in {file}")


HIGH, LOW = {"max_timestep_boundary": 0.358}, {"min_timestep_boundary": 0.358}


def test_the_mistake_of_the_published_i2v_files(job: Any) -> None:
    (found,) = job(HIGH, LOW)
    assert found == (
        f"{place('sample.json', 'boundary_ratio', 0.875)} warning: boundary_ratio 0.875 is sigma 0.8750, but the "
        "high-noise expert is trained down to sigma 0.8997 (max_timestep_boundary 0.358 at shift 5, "
        f"{place('train0.json', 'max_timestep_boundary', 0.358)}): between them it denoises what it was not trained for. "
        "Write 0.9, or train both experts with the other boundary"
    )


def test_one_expert_alone_tells_it_too(job: Any) -> None:
    (found,) = job(LOW)
    assert (
        "the low-noise expert is trained from sigma 0.8997 (min_timestep_boundary 0.358 at shift 5" in found
    )
    assert "what it was trained for between them is left to the other expert" in found
    (found,) = job(LOW, boundary=0.95)
    assert (
        "boundary_ratio 0.95 is sigma 0.9500, but the low-noise expert is trained from sigma 0.8997" in found
    )
    assert "between them it denoises what it was not trained for" in found


@pytest.mark.parametrize(
    ("diffusion", "boundary"),
    [
        ({"max_timestep_boundary": 0.417}, 0.875),
        ({"min_timestep_boundary": 0.417}, 0.875),
        ({"max_timestep_boundary": 0.358}, 0.9),
        ({"boundary": 0.875, "expert": "high"}, 0.875),
        ({"boundary": 0.9, "expert": "low", "shift": 3.0}, 0.9),
        ({"max_timestep_boundary": 0.3, "shift": 3.0}, 0.875),
        ({}, 0.875),  # trained on all noise levels, it can stand for any expert
        ({"min_timestep_boundary": 0.2, "max_timestep_boundary": 0.6}, 0.875),
    ],
)
def test_agreeing_files_are_left_alone(job: Any, diffusion: dict[str, Any], boundary: float) -> None:
    shift = diffusion.get("shift", 5.0)
    assert job(diffusion, boundary=boundary, flow_shift=shift) == []


def test_a_fraction_means_another_sigma_at_another_shift(job: Any) -> None:
    (found,) = job({**HIGH, "shift": 3.0}, boundary=0.9, flow_shift=3.0)
    assert "is trained down to sigma 0.8433 (max_timestep_boundary 0.358 at shift 3" in found


def test_a_stated_sigma_is_shown_without_a_shift(job: Any) -> None:
    (found,) = job({"boundary": 0.9, "expert": "high"})
    assert f"sigma 0.9000 (boundary 0.9, {place('train0.json', 'boundary', 0.9)})" in found


def test_experts_that_do_not_meet(job: Any) -> None:
    gap, ratio = job(HIGH, {"min_timestep_boundary": 0.417}, boundary=0.9)
    assert gap == (
        f"{place('train1.json', 'min_timestep_boundary', 0.417)} warning: the low-noise expert is trained from sigma "
        "0.8748 down (min_timestep_boundary 0.417 at shift 5, "
        f"{place('train1.json', 'min_timestep_boundary', 0.417)}), but the high-noise expert down to 0.8997 "
        f"(max_timestep_boundary 0.358 at shift 5, {place('train0.json', 'max_timestep_boundary', 0.358)}): between them "
        "no expert is trained. Let both files state one boundary"
    )
    assert "low-noise expert is trained from sigma 0.8748" in ratio
    overlap = job({"max_timestep_boundary": 0.417}, LOW, boundary=0.875)[0]
    assert "between them both experts are trained" in overlap


def test_an_expert_without_a_boundary_in_sampling(job: Any) -> None:
    (found,) = job(HIGH, boundary=None, more={"low_noise_predictor": None})
    assert "boundary_ratio is not given, but the high-noise expert is trained down to sigma 0.8997" in found
    assert found.endswith("Give boundary_ratio 0.9 and low_noise_predictor")
    assert job({}, boundary=None, more={"low_noise_predictor": None}) == []


def test_another_shift_is_a_note(job: Any) -> None:
    (found,) = job({"max_timestep_boundary": 0.417}, flow_shift=3.0)
    assert found.startswith(
        f"{place('sample.json', 'flow_shift', 3.0)} note: flow_shift is 3, while training has shift 5 "
        f"({place('train0.json', 'shift', 5)})"
    )


def test_a_boundary_of_the_wrong_type_is_for_its_own_file(job: Any) -> None:
    assert job(HIGH, boundary=1.5) == []
    assert job(HIGH, boundary=True) == []


def test_the_grid_is_the_schedulers() -> None:
    from mm_plugin_wan22.scheduler import WanFlowMatchScheduler

    cases: list[dict[str, Any]] = [
        {"shift": 5.0, "sigma_min": 0.0, "extra_one_step": True, "max_timestep_boundary": 0.358},
        {"shift": 3.0, "max_timestep_boundary": 0.5},
        {"shift": 8.0, "num_train_timesteps": 250, "sigma_max": 0.99, "min_timestep_boundary": 0.31},
    ]
    for fields in cases:
        scheduler = WanFlowMatchScheduler(**fields)
        told = WanFlowMatchSchedulerConfig(**fields).trained_sigmas()
        start, stop = scheduler.index_range
        assert told.high == pytest.approx(float(scheduler.sigmas[start]) if start else 1.0, abs=1e-6)
        low = float(scheduler.sigmas[stop]) if stop < len(scheduler.sigmas) else 0.0
        assert told.low == pytest.approx(low, abs=1e-6)


def test_the_shifted_grid() -> None:
    assert shifted_sigma(0, steps=1000, shift=5.0) == 1.0
    assert shifted_sigma(417, steps=1000, shift=5.0, extra_one_step=True) == pytest.approx(0.8748, abs=1e-4)
    assert shifted_sigma(1, steps=1, shift=5.0) == 0.0


def test_what_a_plugin_tells_is_checked() -> None:
    spec = EntrySpec("x", "mm_core.diffusion_models", "x:X", "some-plugin", "1.0", "")

    def told(answer: Any) -> Any:
        class Config:
            def trained_sigmas(self) -> Any:
                if isinstance(answer, Exception):
                    raise answer
                return answer

        config: Any = Config()
        return trained_sigmas(ComponentConfig("diffusion", "x", spec, config))

    assert told(None) is None
    assert told(TrainedSigmas(1.0, 0.5, "a", "b")).edge == (0.5, "b")
    with pytest.raises(
        UserError, match=r"trained_sigmas of some-plugin 1.0's config class raised ZeroDivisionError: no"
    ):
        told(ZeroDivisionError("no"))
    with pytest.raises(UserError, match=r"returned a tuple; it must return a TrainedSigmas or None"):
        told((1.0, 0.5))


def test_files_of_several_jobs_are_compared_by_folder(files: Any, tmp_path: Path) -> None:
    for name, boundary in (("one", 0.417), ("two", 0.358)):
        diffusion = {**files.model["diffusion"], "max_timestep_boundary": boundary}
        write(tmp_path / name, "train.json", {**files.model, "diffusion": diffusion})
        files.inference["diffusion"]["flow_shift"] = 5.0
        write(tmp_path / name, "sample.json", files.inference)
    names = [f"{folder}/{file}" for folder in ("one", "two") for file in ("train.json", "sample.json")]
    (found,) = check_files_together(names)
    assert found.file == "two/sample.json"
    assert check_files_together(["one/train.json", "two/train.json", "one/sample.json", "none.json"]) != ()
    assert check_files_together(["one/train.json"]) == ()


def test_a_model_file_and_a_data_file(files: Any) -> None:
    files.model["ae"] = {"model_id": "wan_video_vae", "init": "random"}
    files.data["dataset_param"]["preprocess_parameters"]["num_frames"] = 50
    files.data["dataset_param"]["tokenizer_config"]["model_max_length"] = 600
    files.write()
    frames, tokens = files.find('"num_frames": ^50'), files.find('"model_max_length": ^600')
    found = [str(finding) for finding in check_files_together(["model.json", "data.json"])]
    assert found == [
        f"{frames} error: num_frames is 50, which ae (wan_video_vae) cannot encode: frames must "
        "be 4k + 1; nearest are 49 and 53",
        f"{tokens} error: model_max_length is 600, but predictor (wandit) reads 512 "
        "tokens (text_len). Write 512, or raise text_len",
    ]
