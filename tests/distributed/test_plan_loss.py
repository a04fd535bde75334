"""What `mm plan` says of losses by chunks: fewer bytes where the head runs, the same FLOPs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from mm_core.config.planned_job import load_planned_job
from mm_core.planning.job import step_costs
from tests import tiny_vlm
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, TOKENS, CHUNK = 20_000, 512, 32


def planned(model: Path, *flags: str) -> tuple[int, int]:
    """Bytes at the peak and FLOPs of a step, in the forked process of a single rank."""
    os.chdir(ROOT)
    dist.destroy_process_group()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # a plan is for other ranks than these
    files = ("--mm-model", str(model), "--mm-data", "examples/qwen3vl/data.json")
    job = load_planned_job([*files, "--seq-length", str(TOKENS), *flags], 2)
    costs = step_costs(job, 2)
    return costs.timeline.peak_bytes, costs.flops.total


@pytest.mark.parametrize("flags", [(), ("--tensor-model-parallel-size", "2")], ids=["fsdp", "tensor"])
def test_chunks_need_less_memory_and_as_many_flops(flags: tuple[str, ...], tmp_path: Path) -> None:
    folder = tiny_vlm.folder(tmp_path / "network", chat=False, vocab_size=VOCABULARY)
    parts = {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}}
    found = []
    for mode, more in (("default", {}), ("dynamic_chunk", {"chunk_size": CHUNK})):
        section = {
            "model_id": "qwen3_vl", "init_from_hf_path": str(folder), "init": "random", "image_encoder": parts,
            "text_decoder": {"freeze": False}, "loss_cfg": {"compute_mode": mode, **more},
        }  # fmt: skip
        (tmp_path / "model.json").write_text(json.dumps(section))
        found += run_ranks(planned, 1, tmp_path / "model.json", *flags)
    (whole, flops), (chunks, same) = found
    logits = TOKENS * VOCABULARY * 4 // (2 if flags else 1)
    assert chunks < whole - logits
    assert same == pytest.approx(flops, rel=0.01)
