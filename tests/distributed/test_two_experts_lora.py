"""Adapters of both experts in one job: each learns what a plain loop teaches it, and goes on, out and into videos by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm_core.config import ConfigError, load_generation_job
from mm_core.config.document import read_document
from mm_core.generation.build import build_pipeline
from mm_core.models.conversion import convert
from mm_core.models.sora import EXPERTS
from tests.distributed.harness import run_ranks
from tests.distributed.test_two_experts import check, equal
from tests.distributed.two_experts import BOUNDARY, job_of, plainly, trained, write_files
from tests.e2e.conftest import ROOT, TINY

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]
STEPS, BATCH = 4, 4
LORA = ("--lora-target-modules", "proj_q,proj_v,ffn.0", "--lora-r", "4", "--lora-alpha", "8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both experts have weights in folders of their own: what a whole training of a step left."""
    folder = tmp_path_factory.mktemp("lora")
    files = write_files(folder)
    run_ranks(trained, 1, files, save=str(folder / "run"), steps=1, batch=BATCH)
    data = json.loads(Path(files["model"]).read_text())
    for name in EXPERTS:
        convert(folder / "run", folder / name, component=name)
        data[name].pop("init")
        data[name]["from_pretrained"] = str(folder / name)
    Path(files["model"]).write_text(json.dumps(data))
    return files


@pytest.fixture(scope="module")
def apart(files: dict[str, str]) -> dict[str, Any]:
    return run_ranks(plainly, 1, files, STEPS, BATCH, None, LORA)[0]


def test_adapters_of_both_equal_two_single_runs(files: dict[str, str], apart: dict[str, Any]) -> None:
    results = run_ranks(trained, 2, files, *LORA, steps=STEPS, batch=BATCH)
    for result in results:
        check(result, apart)
        names = {name for name in result["weights"] if ".lora_B." in name}
        for expert in EXPERTS:
            learned = [result["weights"][name] for name in names if name.startswith(f"{expert}.")]
            assert learned
            assert all(np.abs(value).max() > 0 for value in learned)


def inference_file(path: Path, files: dict[str, str], **folders: str) -> Path:
    """The tiny example's, with both experts; `folders` are their weights, by default those of training."""
    data = json.loads(json.dumps(read_document(str(ROOT / TINY / "inference_model.json")).data))
    model = json.loads(Path(files["model"]).read_text())
    data.pop("$schema")
    for name in EXPERTS:
        data[name] = {**model[name], **({"from_pretrained": folders[name]} if folders else {})}
    path.write_text(json.dumps({**data, "boundary_ratio": BOUNDARY}))
    return path


def weights_of(inference: Path, **options: Any) -> dict[str, torch.Tensor]:
    pipeline, _ = build_pipeline(
        load_generation_job(inference), device=torch.device("cpu"), seed=0, **options
    )
    return {
        f"{name}.{key}": value
        for name in EXPERTS
        for key, value in getattr(pipeline.model, name).state_dict().items()
    }


def test_it_goes_on_and_comes_out_under_each_name(
    tmp_path: Path, files: dict[str, str], apart: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    whole = run_ranks(
        trained, 1, files, *LORA, "--save-hf", save=str(tmp_path / "whole"), steps=STEPS, batch=BATCH
    )[0]
    check(whole, apart)
    half = tmp_path / "half"
    (tmp_path / "fsdp2.yaml").write_text('{"sharding_size": "auto", "offload_idle_predictor": true}')
    away = {**files, "fsdp2": str(tmp_path / "fsdp2.yaml")}
    first = run_ranks(trained, 1, away, *LORA, save=str(half), steps=2, batch=BATCH)[0]
    second = run_ranks(trained, 1, away, *LORA, "--load", str(half), steps=STEPS, batch=BATCH)[0]
    equal({**second, "losses": first["losses"] + second["losses"]}, whole)

    # Into videos: a run of both, a folder of each, and weights with each added; each on its own expert.
    adapters = tmp_path / "whole/hf" / f"iter_{STEPS:07d}"
    inference = inference_file(tmp_path / "inference.json", files)
    plain, of_run = weights_of(inference), weights_of(inference, load=tmp_path / "whole")
    of_folders = weights_of(inference, lora=[adapters / name for name in EXPERTS])
    merged = {name: str(tmp_path / "merged" / name) for name in EXPERTS}
    for name, folder in merged.items():
        convert(tmp_path / "whole", Path(folder), component=name, merge_lora=True)
    of_merged = weights_of(inference_file(tmp_path / "merged.json", files, **merged))
    changed = {name for name, value in plain.items() if not torch.equal(of_run[name], value)}
    assert changed == {
        f"{name}.blocks.{block}.{layer}.weight"
        for name in EXPERTS
        for block in range(2)
        for layer in ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v", "ffn.net.0.proj")
    }
    for name in plain:
        torch.testing.assert_close(of_folders[name], of_run[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(of_merged[name], of_run[name], rtol=0, atol=1e-6)


def test_other_weights_under_the_second_adapter_are_told(tmp_path: Path, files: dict[str, str]) -> None:
    run_ranks(trained, 1, files, *LORA, save=str(tmp_path / "run"), steps=1, batch=BATCH)
    data = json.loads(Path(files["model"]).read_text())
    data["low_noise_predictor"]["from_pretrained"] = data["predictor"]["from_pretrained"]
    (tmp_path / "model.json").write_text(json.dumps(data))
    swapped = {**files, "model": str(tmp_path / "model.json")}
    with pytest.raises(
        AssertionError, match=r"weights under the adapters of low_noise_predictor: .*low_noise"
    ):
        run_ranks(trained, 1, swapped, *LORA, "--load", str(tmp_path / "run"), steps=2, batch=BATCH)


def test_a_run_of_both_begins_with_adapters_of_both(tmp_path: Path, files: dict[str, str]) -> None:
    before = run_ranks(trained, 1, files, *LORA, save=str(tmp_path / "run"), steps=1, batch=BATCH)[0]
    load = ("--lora-load", str(tmp_path / "run"), "--lr", "1e-12", "--weight-decay", "0")
    after = run_ranks(trained, 1, files, *LORA, *load, steps=1, batch=BATCH)[0]
    for name, value in before["weights"].items():
        np.testing.assert_allclose(after["weights"][name], value, rtol=0, atol=1e-9, err_msg=name)
    data = json.loads(Path(files["model"]).read_text())
    data.pop("low_noise_predictor")
    data["diffusion"]["expert"] = "low"
    (tmp_path / "model.json").write_text(json.dumps(data))
    lone = {**files, "model": str(tmp_path / "model.json")}
    with pytest.raises(
        AssertionError, match="it has adapters of predictor and low_noise_predictor, and the job trains"
    ):
        run_ranks(trained, 1, lone, *LORA, *load, steps=1, batch=BATCH)


def test_a_folder_of_one_adapter_is_refused_for_two_experts(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="it is the folder of one adapter, and two experts are trained"):
        job_of(files, *LORA, "--lora-load", str(tmp_path))
