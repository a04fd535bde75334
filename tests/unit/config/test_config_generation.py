"""An inference file: components, overrides, prompts."""

from __future__ import annotations

from typing import Any

import pytest

from mm_core.config import ConfigError, load_generation_job


def fails(**overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_generation_job("inference.json", overrides)
    return str(caught.value)


def test_a_classic_file_with_two_experts_loads(files: Any) -> None:
    job = load_generation_job("inference.json", {"prompt": "a dog", "pipeline_config.seed": 3, "fps": None})
    assert job.prompts == ("a dog",)
    assert (job.model.fps, job.model.save_fps) == (16, 16)
    assert set(job.components) == {
        "pipeline",
        "predictor",
        "low_noise_predictor",
        "ae",
        "text_encoder",
        "diffusion",
    }
    pipeline = job.components["pipeline"].fields
    assert (pipeline["input_size"], pipeline["boundary_ratio"], pipeline["seed"]) == (
        (81, 480, 720),
        0.875,
        3,
    )
    low, high = job.components["low_noise_predictor"], job.components["predictor"]
    assert (low.from_pretrained, low.role) == ("weights/transformer_2", "predictor")
    assert low.fields == high.fields
    assert job.components["ae"].dtype == "bf16"
    assert [str(f) for f in job.findings if f.level == "warning"] == [
        files_find("inference.json", '"num_train_steps"')
        + ' warning: "num_train_steps" is an old spelling of "num_train_timesteps". Write '
        '"num_train_timesteps": 1000'
    ]
    resolved = job.resolved()
    assert resolved["origins"]["model.prompt"] == "--prompt"
    assert resolved["values"]["low_noise_predictor"]["from_pretrained"] == "weights/transformer_2"


def files_find(name: str, text: str) -> str:
    with open(name, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if text in line:
                return f"{name}:{number}:{line.index(text) + 1}"
    raise AssertionError(text)


def test_prompts_are_texts_or_files_and_a_mistyped_path_is_no_prompt(files: Any) -> None:
    (files.folder / "prompts.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert load_generation_job("inference.json", {"prompt": "prompts.txt"}).prompts == ("one", "two")
    assert load_generation_job("inference.json", {"prompt": ["a", "b"]}).prompts == ("a", "b")
    assert load_generation_job("inference.json", {"prompt": "yes / no, a cat"}).prompts == (
        "yes / no, a cat",
    )
    assert fails(prompt="promts.txt") == (
        '--prompt: prompt is "promts.txt": there is no such file (seen from the working directory). '
        "Did you mean prompts.txt?"
    )
    assert '"prompts.tx": there is no such file' in fails(prompt="prompts.tx")
    assert load_generation_job("inference.json", {"prompt": "a cat. v1.b"}).prompts == ("a cat. v1.b",)
    assert "a prompt is empty" in fails(prompt="  ")
    files.inference.pop("prompt")
    files.write()
    assert fails() == 'inference.json: there is no prompt. Add --prompt "…"'


def test_what_is_wrong_is_said_at_its_place(files: Any) -> None:
    files.inference.update(video="x.mp4", pipeline_class="WanPipelin", device=3)
    files.inference["pipeline_config"]["input_size"] = [81, 480]
    files.inference["diffusion"]["solver_ordr"] = 2
    files.inference["tokenizer"]["from_pretrained"] = "weights/tokeniser"
    files.inference["predictor"].pop("from_pretrained")
    files.write()
    text = fails()
    for expected in (
        files_find("inference.json", '"WanPipelin"')
        + ": no installed distribution offers the pipeline 'WanPipelin'. "
        "Did you mean 'WanPipeline' (mmzoo-plugin-wan22 0.1.0)",
        '"video" is "x.mp4": it is of pipelines of other models; here a video is made from a text',
        '"device" is 3, expected a text in quotes',
        'unknown key "solver_ordr" in diffusion (UniPCMultistepScheduler). Did you mean "solver_order"?',
        'tokenizer.from_pretrained is "weights/tokeniser": there is no such folder (seen from the '
        "working directory). "
        "Did you mean weights/tokenizer?",
        "predictor (wandit) has no weights. Give --load",
    ):
        assert expected in text


def test_the_pipeline_checks_its_settings(files: Any) -> None:
    files.inference["pipeline_config"]["input_size"] = [81, 480]
    files.inference["boundary_ratio"] = 1.5
    files.write()
    text = fails(**{"pipeline_config.seed": "x"})
    assert '--pipeline-config.seed: "seed" is "x", expected a whole number' in text
    assert '"input_size" is [81, 480]: must have exactly 3 values' in text
    assert text.count('"boundary_ratio" is 1.5: must be smaller than 1.0') == 1
    files.inference["boundary_ratio"] = 875
    files.write()
    told = '"boundary_ratio" is 875: must be smaller than 1.0, for it is a sigma; timestep 875 of 1000 is sigma 0.875'
    assert fails().count(told) == 1


def test_sizes_fit_the_autoencoder_and_rates_the_interval(files: Any) -> None:
    files.inference["ae"].update(init="random", dim_mult=[1, 2], temperal_downsample=[True])
    files.inference["ae"].pop("from_pretrained")
    files.inference["pipeline_config"]["input_size"] = [81, 481, 720]
    files.write()
    assert fails() == (
        f"{files_find('inference.json', '481')}: input_size[1] is 481, which ae (wan_video_vae) cannot "
        "encode: height must be a multiple of 2; nearest are 480 and 482"
    )
    files.inference["pipeline_config"]["input_size"] = [82, 480, 20000]
    files.inference.update(fps=4, frame_interval=100)
    files.write()
    text = fails()
    assert '"input_size[2]" is 20000: must be at most 16384' in text
    assert '"frame_interval": must be at most fps (4)' in text


def test_experts_come_in_pairs_and_overrides_have_places(files: Any) -> None:
    files.inference.pop("boundary_ratio")
    files.write()
    assert '"low_noise_predictor" is given without "boundary_ratio": two experts need both' in fails()
    assert "the file has no object fps, so nothing can be set in it" in fails(**{"fps.x": 1})


def test_the_sampler_suits_the_model(files: Any) -> None:
    """Before anything is loaded, which takes minutes."""
    files.inference["diffusion"] = {"model_id": "UniPCMultistepScheduler", "flow_shift": 5.0}
    files.write()
    told = "pipeline (WanPipeline) needs a sampler of flows, which diffusion (UniPCMultistepScheduler) as written here is not"
    assert fails() == (
        f'{files_find("inference.json", """"UniPCM""")}: {told}. Write "prediction_type": "flow_prediction" and '
        '"use_flow_sigmas": true'
    )
    files.inference["diffusion"] = {"model_id": "EulerDiscreteScheduler", "guidance_scale": [4.0, 3.0]}
    files.write()
    assert "is not. Choose one for flows, such as UniPCMultistepScheduler" in fails()
    assert "guidance_scale" not in fails()
    for key in ("low_noise_predictor", "boundary_ratio"):
        files.inference.pop(key)
    files.write()
    assert "guidance_scale [4.0, 3.0] is for two experts, but this file has one. Write one number" in fails()


def test_prompts_are_cleaned_in_one_of_two_ways(files: Any) -> None:
    def methods(**keys: Any) -> tuple[str, ...]:
        files.inference |= keys
        files.write()
        return load_generation_job("inference.json").model.prompt_methods

    assert methods() == ()
    assert methods(use_prompt_preprocess=True) == ("basic_clean", "whitespace_clean")
    steps = [{"method": "lower"}, {"method": "whitespace_clean"}]
    assert methods(use_prompt_preprocess=False, text_preprocess_methods=steps) == (
        "lower",
        "whitespace_clean",
    )
    assert methods(text_preprocess_methods={"method": "lowercase"}) == ("lowercase",)
    files.inference["use_prompt_preprocess"] = True
    files.write()
    assert '"use_prompt_preprocess": text_preprocess_methods is given too' in fails()


def test_weights_may_come_from_a_run(files: Any) -> None:
    files.inference["predictor"].pop("from_pretrained")
    files.write()
    assert load_generation_job("inference.json", {"load": "weights"}).load == "weights"
    assert (
        "there is no such folder or file (seen from the working directory). Did you mean weights?"
        in fails(load="wieghts")
    )


def test_a_training_file_is_no_inference_file(files: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.json needs \"pipeline_class\""):
        load_generation_job("model.json")
