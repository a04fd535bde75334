"""Compiled Wan blocks: outputs and every gradient are those of the eager twin, for every shape of timestep and condition."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import mm_core
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.compiled import compile_modules

pytestmark = pytest.mark.timeout(300)
BLOCKS = "predictor.blocks.{*}"


def network() -> Any:
    torch.manual_seed(0)
    predictor = mm_core.PREDICTOR_MODEL_MAPPINGS["wandit"](
        model_type="t2v", text_len=8, in_dim=4, out_dim=4, hidden_size=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
        text_dim=16, max_seq_len=32,
    )  # fmt: skip
    for parameter in predictor.parameters():  # nothing may be zero, or some gradients would be
        torch.nn.init.normal_(parameter, std=0.1)
    return predictor


def outputs_and_gradients(predictor: Any, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """For a timestep of each sample, then of each token, then another size of video."""
    found = []
    for size, per_token in (((2, 4, 6), False), ((2, 4, 6), True), ((3, 4, 4), False)):
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(2, 4, *size, generator=generator)
        prompt = torch.randn(2, 5, 16, generator=generator)
        tokens = size[0] * size[1] * size[2] // 4
        timestep = torch.rand(2, tokens if per_token else 1, generator=generator) * 1000
        output = predictor(latents.to(dtype), timestep if per_token else timestep[:, 0], prompt.to(dtype))
        output.float().square().sum().backward()
        found.append(
            {"output": output.detach(), **{n: p.grad.clone() for n, p in predictor.named_parameters()}}
        )
        predictor.zero_grad()
    return found


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # the whole of torch.compile but the C++ compiler, which takes a minute
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_outputs_and_every_gradient_are_the_eager_ones(backend: str) -> None:
    wanted, predictor = outputs_and_gradients(network(), torch.float32), network()
    plan = build_plan(predictor, ShardingPolicy(), Fsdp2Config(compile_modules=(BLOCKS,)))
    compile_modules(dict(predictor.named_modules()), plan, backend)
    assert all("forward" in vars(block) for block in predictor.blocks)  # not that of the class
    for mine, twin in zip(outputs_and_gradients(predictor, torch.float32), wanted, strict=True):
        assert mine.keys() == twin.keys()
        for name, value in twin.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(
                mine[name], value, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
            )
