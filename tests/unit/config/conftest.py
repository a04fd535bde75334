"""A correct job, as people bring it, and the tools to spoil it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import Finding, TrainFlags, check_training_job, parse_train_flags

MODEL: dict[str, Any] = {
    "load_video_features": False,
    "load_text_features": False,
    "task": "t2v",
    "diffusion": {
        "model_id": "wan_flow_match_scheduler",
        "num_train_timesteps": 1000,
        "shift": 5,
        "sigma_min": 0.0,
        "extra_one_step": True,
        "max_timestep_boundary": 0.417,
        "min_timestep_boundary": 0.0,
    },
    "predictor": {
        "model_id": "wandit",
        "dtype": "bf16",
        "model_type": "t2v",
        "patch_size": [1, 2, 2],
        "text_len": 512,
        "in_dim": 16,
        "hidden_size": 5120,
        "ffn_dim": 13824,
        "out_dim": 16,
        "num_heads": 40,
        "num_layers": 40,
        "pipeline_num_layers": [10, 10, 10, 10],
        "qk_norm": True,
        "qk_norm_type": "rmsnorm",
        "eps": 1e-6,
        "use_fused_rmsnorm": True,
    },
    "patch": {"clip_grad_async": True, "get_dist_model_load_from_pt": True},
    "encoder_offload_interval": 8,
    "ae": {
        "model_id": "wan_video_vae",
        "from_pretrained": "weights/vae",
        "dtype": "bf16",
        "enable_tiling": False,
        "tiling_param": {"tile_sample_min_height": 256, "tile_sample_stride_height": 192},
        "norm_latents": True,
        "do_sample": False,
    },
    "text_encoder": {
        "model_id": "UMT5",
        "dtype": "bf16",
        "hub_backend": "hf",
        "from_pretrained": "weights/text_encoder",
    },
}
DATA: dict[str, Any] = {
    "dataset_param": {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": "data.txt", "data_storage_mode": "combine"},
        "preprocess_parameters": {
            "video_processor_type": "OpensoraplanVideoProcessor",
            "video_reader_type": "DecordVideo",
            "num_frames": 49,
            "max_height": 480,
            "max_width": 832,
            "train_fps": 24,
            "cfg": 0.0,
            "train_pipeline": {
                "video": [
                    {"trans_type": "ResizeVideo", "param": {"transform_size": "auto", "mode": "shortside"}},
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": "auto"}},
                ]
            },
        },
        "use_text_processer": True,
        "text_preprocess_methods": [{"method": "basic_clean"}, {"method": "whitespace_clean"}],
        "tokenizer_config": {
            "autotokenizer_name": "AutoTokenizer",
            "hub_backend": "hf",
            "from_pretrained": "weights/tokenizer",
            "model_max_length": 512,
        },
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "sampler_type": "SequentialSampler",
        "drop_last": True,
        "pin_memory": True,
        "group_frame": False,
    },
}
TOOLS: dict[str, Any] = {
    "profile": {"enable": False, "profile_type": "static", "ranks": [0], "static_param": {"start_step": 10}},
    "memory_profile": {"enable": False, "max_entries": None},
    "sorafeature": {"save_path": "./features"},
}
FSDP2 = """\
sharding_size: auto
sub_modules_to_wrap:
  - predictor.blocks.{*}
param_dtype: "bf16"
reduce_dtype: "fp32"
ignored_modules: [ae, text_encoder]
num_to_forward_prefetch: 0
"""
INFERENCE: dict[str, Any] = {
    "pipeline_class": "WanPipeline",
    "prompt": "a cat",
    "fps": 16,
    "dtype": "bf16",
    "device": "npu",
    "pipeline_config": {"input_size": [81, 480, 720], "cpu_offload": True},
    "boundary_ratio": 0.875,
    "low_noise_predictor": "weights/transformer_2",
    "ae": MODEL["ae"],
    "text_encoder": MODEL["text_encoder"],
    "tokenizer": {"autotokenizer_name": "AutoTokenizer", "from_pretrained": "weights/tokenizer"},
    "predictor": {**MODEL["predictor"], "model_type": "wan2.2-t2v", "from_pretrained": "weights/transformer"},
    "diffusion": {
        "model_id": "UniPCMultistepScheduler",
        "num_train_steps": 1000,
        "num_inference_steps": 40,
        "guidance_scale": [4.0, 3.0],
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
}


@dataclass
class JobFiles:
    """The files of a job in a temporary working directory. Change the data, then `write`."""

    folder: Path
    model: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(MODEL))
    data: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(DATA))
    tools: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(TOOLS))
    inference: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(INFERENCE))
    fsdp2: str = FSDP2

    def write(self) -> None:
        for name in ("model", "data", "tools", "inference"):
            text = json.dumps(getattr(self, name), indent=4)
            (self.folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "fsdp2.yaml").write_text(self.fsdp2, encoding="utf-8")

    def find(self, snippet: str) -> str:
        """Return `file:line:column` of the `^` in a piece of text that stands in one of the files once."""
        text = snippet.replace("^", "", 1)
        for path in sorted(self.folder.glob("*.json")) + sorted(self.folder.glob("*.yaml")):
            content = path.read_text(encoding="utf-8")
            if text in content and path.name != "inference.json":
                before = content[: content.index(text) + snippet.index("^")]
                return f"{path.name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise AssertionError(f"{text!r} stands in no file")

    def flags(self, *more: str) -> TrainFlags:
        words = ["--mm-model", "model.json", "--mm-data", "data.json", "--mm-tool", "tools.json"]
        words += [
            "--fsdp2-config-path",
            "fsdp2.yaml",
            "--train-iters",
            "10",
            "--lr",
            "1e-4",
            "--load",
            "weights/transformer",
        ]
        return parse_train_flags([*words, *more])

    def check(self, *more: str) -> list[str]:
        """Return the errors and warnings of the job as text."""
        return [str(finding) for finding in self.findings(*more) if finding.level != "note"]

    def findings(self, *more: str) -> tuple[Finding, ...]:
        self.write()
        return check_training_job(self.flags(*more))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFiles:
    """A correct job with every path in place, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("vae", "text_encoder", "tokenizer", "transformer", "transformer_2"):
        (tmp_path / "weights" / name).mkdir(parents=True)
    (tmp_path / "clips").mkdir(exist_ok=True)
    (tmp_path / "clips" / "annotations.json").write_text('[{"path": "a.mp4", "cap": "a cat"}]\n')
    (tmp_path / "data.txt").write_text("clips,clips/annotations.json\n")
    job = JobFiles(tmp_path)
    job.write()
    return job


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Return a function that writes a file into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_
