"""`wandit` inside FSDP2, in one process: dtypes at the borders of units, and MindSpeed-MM's names of
modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_wan_parts import TINY_WAN

from mm_core.accelerator import Accelerator
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.models.sora import SoRAModel
from mm_core.weights import materialize
from mm_plugin_wan22.policy import WANDIT
from mm_plugin_wan22.predictor import WanDiT

BLOCKS = "predictor.blocks.{*}"


@pytest.fixture(autouse=True)
def _group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Accelerator("cpu").init_process_group()
    yield
    dist.destroy_process_group()


def build(**config: Any) -> SoRAModel:
    with torch.device("meta"):
        predictor = WanDiT(**TINY_WAN)
    model = SoRAModel(predictor=predictor, sharding_policies={"predictor": WANDIT})
    model.fully_shard(None, Fsdp2Config(sharding_size="auto", **config))
    materialize(model.predictor, "cpu", 3)
    return model


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"sub_modules_to_wrap": [BLOCKS, "predictor.head"], "recompute_modules": [BLOCKS]}, 0.0),
        ({"align_fsdp_param_groups": True, "param_dtype": "bf16", "recompute_modules": [BLOCKS]}, 0.03),
        ({"param_dtype": "bf16", "reduce_dtype": "fp32"}, 0.03),
        ({"param_dtype": "bf16", "sub_modules_to_wrap": [BLOCKS, "predictor.head"]}, 0.03),
        (
            {
                "param_dtype": "bf16",
                "sub_modules_to_wrap": [BLOCKS, "predictor.text_embedding", "predictor.patch_embedding"],
            },
            0.03,
        ),
    ],
)
def test_every_way_of_wrapping_computes_the_same(config: dict[str, Any], tolerance: float) -> None:
    given = {
        "latents": torch.randn(2, 16, 3, 4, 6),
        "timestep": torch.tensor([12.4, 873.3]),
        "prompt": torch.randn(2, 9, 24),
        "prompt_mask": torch.ones(2, 9, dtype=torch.long),
    }
    exact = build().predictor(**given)
    model = build(**config)
    seen: list[torch.Tensor] = []
    model.predictor.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    output = model.predictor(**given)
    output.float().square().mean().backward()
    assert (output.float() - exact).abs().max() <= tolerance * exact.abs().max()
    assert all(p.grad is not None for p in model.predictor.parameters())
    # bf16 would make 872 of 873.3, and another phase of every fast sinusoid
    assert torch.equal(seen[0], given["timestep"])
