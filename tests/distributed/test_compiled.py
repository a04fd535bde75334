"""Compiled blocks compute what their eager twins do, inside recomputation and FSDP2; where they cannot be, it is said."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.combinations import parallel_problems
from mm_core.sharding.compiled import compile_modules
from mm_core.sharding.plan import ShardingError
from tests.distributed.harness import run_ranks
from tests.tiny_vlm import batch, network_of, tiny_qwen3_vl

pytestmark = pytest.mark.timeout(300)
LAYERS = "model.model.language_model.layers.{*}"
POLICY = ShardingPolicy(units=("model.language_model.layers.{*}", "model.visual.blocks.{*}"))


def loss_and_gradients(network: Any, length: int) -> dict[str, torch.Tensor]:
    given = batch("text", "image", length=length)
    del given["sample_index"]
    loss = network(**given, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.replace("_checkpoint_wrapped_module.", "")] = whole.clone()
    network.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def on_rank(moe: bool) -> None:
    """On each of two ranks the same batch, so that the mean of gradients is that of one process."""
    wanted = [loss_and_gradients(network_of(tiny_qwen3_vl(moe)), length) for length in (24, 30)]
    model = TransformersModel(network_of(tiny_qwen3_vl(moe)), sharding_policy=POLICY)
    fsdp2 = Fsdp2Config(compile_modules=(LAYERS,), recompute_modules=(LAYERS,))
    blocks = list(model.model.model.language_model.layers)
    model.fully_shard(None, fsdp2)
    assert all("forward" in vars(block) for block in blocks)  # not those of the class
    for length, expected in zip((24, 30), wanted, strict=True):
        assert_same(loss_and_gradients(model.model, length), expected)


@pytest.mark.parametrize(
    ("ranks", "moe"),
    [(1, False), pytest.param(2, True, marks=pytest.mark.slow)],
    ids=["dense", "moe on 2 ranks"],
)
def test_compiled_layers_under_recomputation_and_fsdp_are_the_eager_ones(
    ranks: int, moe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole of torch.compile but the C++ compiler, which takes a minute.
    monkeypatch.setattr(compile_modules, "__defaults__", ("aot_eager",))
    run_ranks(on_rank, ranks, moe, timeout=280)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_code_of_the_default_compiler() -> None:
    network = network_of(tiny_qwen3_vl(layers=2))
    wanted = loss_and_gradients(network, 24)
    plan = build_plan(network, POLICY, Fsdp2Config(compile_modules=(LAYERS,)), "model")
    compile_modules(dict(network.named_modules()), plan)
    assert_same(loss_and_gradients(network, 24), wanted)


def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    network = network_of(tiny_qwen3_vl())
    plan = build_plan(network, POLICY, Fsdp2Config(compile_modules=(LAYERS,)), "model")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        ShardingError,
        match=r"layers\.0\" cannot be compiled.*No working C\+\+ compiler.*take compile_modules out",
    ):
        compile_modules(dict(network.named_modules()), plan)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compile_modules": ("model.model.language_model.layers",)}, "is never called itself"),
        ({"compile_modules": ("model.lm_heat",)}, "Closest: model.lm_head"),
        ({"compile_modules": (LAYERS, f"{LAYERS}.mlp")}, "of compile_modules, which cannot happen inside compiled code"),
        ({"compile_modules": (LAYERS,), "recompute_modules": (f"{LAYERS}.mlp",)}, "of recompute_modules"),
        ({"compile_modules": (LAYERS,), "sub_modules_to_wrap": (f"{LAYERS}.mlp",)}, "of sub_modules_to_wrap"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_compiled_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        build_plan(network_of(tiny_qwen3_vl()), POLICY, Fsdp2Config(**fields), "model")


@pytest.mark.parametrize(
    ("fields", "sizes", "words"),
    [
        ({}, {"cp": 2}, r"--context-parallel-size"),
        ({}, {"tp": 2}, r"--tensor-model-parallel-size"),
        ({"recompute_modules": (LAYERS,), "recompute_granularity": "selective"}, {}, "recompute_granularity: full"),
        ({"expert_parallel_size": 2, "moe_modules": (f"{LAYERS}.mlp.experts",)}, {}, "expert_parallel_size"),
    ],
)  # fmt: skip
def test_ways_to_share_a_model_that_are_not_compiled_are_refused(
    fields: dict[str, Any], sizes: dict[str, Any], words: str
) -> None:
    network = network_of(tiny_qwen3_vl(moe=True))
    plan = build_plan(network, POLICY, Fsdp2Config(compile_modules=(LAYERS,), **fields), "model")
    problem = next(iter(parallel_problems(network, plan, ParallelSizes(**sizes))))
    assert problem.startswith('compile_modules: "model.model.language_model.layers.0"')
    assert words in problem
