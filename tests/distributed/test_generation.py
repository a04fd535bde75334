"""`generate` on two ranks: videos dealt out, and videos that ranks share, against one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_core.config import load_generation_job
from mm_core.config.parallel import ContextAlgorithm, ParallelSizes
from mm_core.generation import generate
from mm_core.generation.sharing import Sharing, share_work
from mm_core.generation.video import psnr, read_video
from mm_core.testing.forked import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "pipeline_class": "WanPipeline",
    "prompt": ["a red ball", "two cats", "a tree"],
    "fps": 8,
    "pipeline_config": {"input_size": [5, 32, 48], "seed": 3},
    "predictor": {
        "model_id": "wandit", "init": "random", "model_type": "ti2v", "text_len": 16, "in_dim": 16, "out_dim": 16,
        "hidden_size": 96, "num_heads": 4, "ffn_dim": 160, "freq_dim": 32, "text_dim": 24, "num_layers": 2,
    },
    "ae": {
        "model_id": "wan_video_vae", "init": "random", "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True],
    },
    "text_encoder": {
        "model_id": "UMT5", "init": "random",
        "config": {
            "vocab_size": 682, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        },
    },
    "tokenizer": {"from_pretrained": str(ROOT / "examples/tiny/wan22-t2v/tokenizer"), "model_max_length": 16},
    "diffusion": {"model_id": "FlowMatchEulerDiscreteScheduler", "num_inference_steps": 1, "guidance_scale": 3.0},
}  # fmt: skip


@pytest.fixture
def inference_file(tmp_path: Path) -> Path:
    y, x = np.mgrid[0:32, 0:48].astype(np.float32)
    waves = [np.sin((x * a + y * b) / 5) for a, b in ((1, 0), (0, 1), (1, 1))]
    Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)).save(tmp_path / "first.png")
    path = tmp_path / "inference_model.json"
    path.write_text(
        json.dumps({**TINY, "image": str(tmp_path / "first.png"), "save_path": str(tmp_path / "out")})
    )
    return path


def make(
    path: Path, out: Path, cp: int, algorithm: ContextAlgorithm
) -> tuple[list[str], tuple[int, int, bool]]:
    sharing = share_work(ParallelSizes(cp=cp, cp_algo=algorithm))
    written = generate(load_generation_job(path), save_path=out, sharing=sharing, device="cpu")
    return [each.name for each in written], (sharing.place, sharing.groups, sharing.writes)


def make_both(path: Path, folder: Path) -> list[Any]:
    """Deal videos out to the ranks, then share each of them."""
    return [make(path, folder / "dealt", 1, "ulysses"), make(path, folder / "shared", 2, "ulysses")]


@pytest.mark.timeout(120)
def test_videos_are_dealt_out_or_shared(inference_file: Path, tmp_path: Path) -> None:
    names, alone = make(inference_file, tmp_path / "one", 1, "ulysses")
    assert alone == (0, 1, True)
    dealt, shared = zip(*run_ranks(make_both, 2, inference_file, tmp_path), strict=True)
    assert dealt == (([names[0], names[2]], (0, 2, True)), ([names[1]], (1, 2, True)))
    assert shared == ((names, (0, 1, True)), ([], (0, 1, False)))
    for name in names:
        assert (tmp_path / "dealt" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        one, two = (read_video(tmp_path / folder / name) for folder in ("one", "shared"))
        assert psnr(one, two) > 50


def test_one_rank_by_itself_shares_nothing() -> None:
    assert share_work(ParallelSizes()) == Sharing()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_command_starts_ranks(inference_file: Path, tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "mm_core",
        "generate",
        "--mm-model",
        str(inference_file),
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    paths = [Path(text) for text in done.stdout.splitlines()]
    assert [path.name[:3] for path in paths] == ["000", "001", "002"]
    assert all(path.is_file() and path.with_suffix(".json").is_file() for path in paths)
    wrong = subprocess.run(
        [*line, "--prompt", "none.txt"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert wrong.returncode == 2
    assert "there is no such file" in wrong.stderr
