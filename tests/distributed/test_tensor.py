"""Models whose matrices are cut over ranks train as in one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.training.optimizer import ShardedAdamW
from mm_core.weights import load_checkpoint, materialize, resolve_load, save_checkpoint
from mm_core.weights.hf_folder import load_hf_folder
from mm_core.weights.hf_save import save_hf_folder
from mm_core.weights.tensors import named_parameters
from mm_registry.errors import UserError
from tests.distributed.against_one import distance, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import DENSE, MOE, WAN, TinyModel, moe

pytestmark = pytest.mark.timeout(180)
LAYERS = "predictor.model.layers.{*}"


def sharded(model: TinyModel, tp: int, seed: int = 0, **fsdp2: Any) -> Any:
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2), ParallelSizes(tp=tp))
    materialize(composite.predictor, "cpu", seed)
    return composite


def gradients(model: TinyModel, tp: int = 1, **fsdp2: Any) -> dict[str, Any]:
    """Whole gradients of a global batch in two micro batches, with a share of its own for each data-parallel rank."""
    composite = sharded(model, tp, **fsdp2)
    mesh = composite.parallel_mesh
    for micro in range(2):
        loss, _ = model.loss(composite.predictor, 0, mesh.dp_rank, mesh.dp_size, micro, 2)
        (loss * mesh.fsdp.size()).backward()
    return {name: whole(p.grad) for name, p in named_parameters(composite.predictor) if p.grad is not None}


def optimizer_of(composite: Any) -> torch.optim.Optimizer:
    return ShardedAdamW(composite.predictor.parameters(), lr=1e-4, weight_decay=0.01, fused=True)


@pytest.fixture(scope="module")
def one_gradient() -> dict[str, dict[str, Any]]:
    return {model.name: run_ranks(gradients, 1, model)[0] for model in (DENSE, MOE)}


@pytest.mark.parametrize(
    ("model", "world", "tp", "fsdp2"),
    [
        pytest.param(DENSE, 2, 2, {}, id="dense-2-of-2"),
        pytest.param(MOE, 2, 2, {}, id="moe-2-of-2"),
        pytest.param(DENSE, 4, 2, {"recompute_modules": (LAYERS,)}, id="dense-2-of-4-recompute"),
        pytest.param(MOE, 4, 2, {}, id="moe-2-of-4", marks=pytest.mark.slow),
        pytest.param(MOE, 4, 2, {"expert_parallel_size": 2}, id="moe-2-of-4-experts"),
        pytest.param(MOE, 4, 2, {"sharding_size": 1}, id="moe-2-of-4-hsdp", marks=pytest.mark.slow),
        pytest.param(
            MOE,
            4,
            2,
            {"recompute_modules": (LAYERS,), "recompute_granularity": "selective"},
            id="moe-2-of-4-selective",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DENSE,
            4,
            2,
            {"align_fsdp_param_groups": True, "num_to_forward_prefetch": 1, "offload_to_cpu": True},
            id="dense-2-of-4-aligned-offload",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_one_process(model, world, tp, fsdp2, one_gradient):
    found = run_ranks(gradients, world, model, tp, **fsdp2)
    assert distance(found[0], one_gradient[model.name]) < 1e-6
    # Ranks that share tensors have the same gradient of those that each has whole: else they would drift apart.
    assert distance(found[1], found[0]) < 1e-7


def test_grouped_products_of_cut_experts_are_those_of_one_process(one_gradient):
    found = run_ranks(gradients, 2, replace(MOE, make=lambda: moe("grouped_mm")), 2)[0]
    assert distance(found, one_gradient["moe"]) < 1e-6


@pytest.mark.slow
def test_bf16_compute_stays_near_fp32(one_gradient):
    found = run_ranks(gradients, 4, MOE, 2, param_dtype="bf16", reduce_dtype="fp32")[0]
    assert 1e-4 < distance(found, one_gradient["moe"]) < 2e-2


def _vision_text() -> nn.Module:
    config = Qwen3VLMoeTextConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
        max_position_embeddings=64, attn_implementation="sdpa", experts_implementation="eager",
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "mrope_interleaved": True,
        },
    )  # fmt: skip
    return Qwen3VLMoeTextModel(config)


def test_norms_of_heads_that_a_plan_forgets_get_the_gradient_of_all_heads():
    """Qwen3-VL's plan cuts the heads and does not name the norms that see them."""
    assert not any("norm" in name for name in Qwen3VLMoeTextConfig.base_model_tp_plan)

    def losses(module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = module(input_ids=batch["ids"], use_cache=False).last_hidden_state
        return hidden.float().sin().flatten(1).sum(1), torch.ones(len(hidden))

    model = replace(MOE, name="vl", make=_vision_text, losses=losses)
    model = replace(
        model,
        policy=replace(MOE.policy, units=("layers.{*}",), experts=("layers.{*}.mlp.experts",), aligned=()),
    )
    found = run_ranks(gradients, 2, model, 2)[0]
    assert distance(found, run_ranks(gradients, 1, model)[0]) < 1e-6


def test_what_a_rank_holds():
    def look() -> dict[str, Any]:
        predictor = sharded(MOE, 2).predictor
        layer = predictor.model.layers[0]
        tensors = {
            "q": layer.self_attn.q_proj.weight,
            "o": layer.self_attn.o_proj.weight,
            "norm": layer.input_layernorm.weight,
            "experts": layer.mlp.experts.down_proj,
            "head": predictor.lm_head.weight,
        }
        return {
            name: (
                tuple(tensor.to_local().shape),
                tuple(whole(tensor).shape),
                "tp" in tensor.device_mesh.mesh_dim_names,
            )
            for name, tensor in tensors.items()
        }

    assert run_ranks(look, 4)[3] == {
        "q": ((16, 48), (64, 48), True),
        "o": ((24, 32), (48, 64), True),
        "norm": ((24,), (48,), False),
        "experts": ((2, 48, 20), (8, 48, 20), True),
        "head": ((24, 48), (96, 48), True),
    }


def test_the_plan_tells_the_bytes_that_a_rank_holds():
    def look() -> tuple[int, int]:
        composite = sharded(MOE, 2)
        plan = composite.sharding_plans["predictor"].as_dict(2, 2)
        held = sum(p.to_local().numel() * 4 for p in composite.predictor.parameters())
        return held, plan["memory"]["shards"]

    for held, told in run_ranks(look, 4):
        assert held == told


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        (MOE, (4, 2), (2, 1)),
        pytest.param(DENSE, (2, 1), (4, 2), marks=pytest.mark.slow),
        pytest.param(DENSE, (2, 2), (1, 1), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_and_folders_go_to_other_sizes(model, before, after, tmp_path):
    def step(composite: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        mesh = composite.parallel_mesh
        loss, _ = model.loss(composite.predictor, number, mesh.dp_rank, mesh.dp_size)
        (loss * mesh.fsdp.size() / 100).backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(tp: int) -> dict[str, Any]:
        composite = sharded(model, tp)
        optimizer = optimizer_of(composite)
        step(composite, optimizer, 0)
        state = {"step": 1, "consumed_samples": 8, "seed": 0}
        save_checkpoint(tmp_path, 1, {"predictor": composite.predictor}, optimizer, state)
        step(composite, optimizer, 1)
        save_hf_folder(composite.predictor, tmp_path / "hf")
        return {name: whole(p) for name, p in named_parameters(composite.predictor)}

    def load(tp: int) -> list[dict[str, Any]]:
        composite = sharded(model, tp, seed=1)
        optimizer = optimizer_of(composite)
        load_checkpoint(resolve_load(tmp_path), {"predictor": composite.predictor}, optimizer, with_rng=False)
        step(composite, optimizer, 1)
        stepped = {name: whole(p) for name, p in named_parameters(composite.predictor)}
        load_hf_folder(composite.predictor, tmp_path / "hf")
        return [stepped, {name: whole(p) for name, p in named_parameters(composite.predictor)}]

    saved = run_ranks(save, before[0], before[1])[0]
    stepped, read = run_ranks(load, after[0], after[1])[0]
    assert distance(stepped, saved) < 1e-6
    assert distance(read, saved) == 0


def test_tied_tensors_stay_one():
    def look() -> tuple[bool, bool]:
        predictor = sharded(DENSE, 2).predictor
        head, embedding = predictor.lm_head.weight, predictor.model.embed_tokens.weight
        return head is embedding, isinstance(head, DTensor)

    assert run_ranks(look, 2) == [(True, True), (True, True)]


class Collectives(TorchDispatchMode):
    """Counts them. (torch's own CommDebugMode hooks each module, which then reads a tensor of its own.)"""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does comes here too
        self.count += func.namespace == "_c10d_functional" and func._opname.startswith("all_")
        return func(*args, **(kwargs or {}))


def test_a_layer_sums_twice_forward_and_twice_backward():
    """As Megatron's does (arXiv:1909.08053, figure 4); the norms of heads sum their few gradients besides."""

    def run() -> tuple[int, int]:
        predictor = sharded(DENSE, 2).predictor
        with Collectives() as forward:
            loss, _ = DENSE.loss(predictor, 0)
        with Collectives() as backward:
            loss.backward()
        return forward.count, backward.count

    # 3 layers; the embedding's sum and the gathered head; backward the head's input, and two norms a layer.
    assert run_ranks(run, 2) == [(3 * 2 + 2, 3 * 4 + 1)] * 2


def _odd() -> nn.Module:
    model = MOE.make()
    model.tp_plan = {**model.tp_plan, "model.layers.*.self_attn.o_proj": "sequence_parallel"}
    return model


def _head_only() -> nn.Module:
    model = MOE.make()
    model._tp_plan = {"lm_head": "colwise_gather_output"}
    return model


@pytest.mark.parametrize(
    ("model", "tp", "message"),
    [
        (
            MOE,
            4,
            "--tensor-model-parallel-size: 4 does not divide the 2 heads of predictor.model.layers.0.self_attn.k_proj; "
            "use one of 1, 2.",
        ),
        (
            WAN,
            2,
            "--tensor-model-parallel-size: predictor is a WanTransformer3DModel, whose class carries no tp_plan that says how "
            "its layers are cut, and its sharding policy does not either (tensor); set it to 1.",
        ),
        (
            replace(MOE, make=_odd),
            2,
            "--tensor-model-parallel-size: the tp_plan of Qwen3MoeForCausalLM gives predictor.model.layers.0.self_attn.o_proj "
            'the style "sequence_parallel", which is not supported (',
        ),
        (
            replace(MOE, make=_head_only),
            2,
            "--tensor-model-parallel-size: the tp_plan of Qwen3MoeForCausalLM names only lm_head, so its blocks would not be "
            "cut; set it to 1.",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(model, tp, message):
    def run() -> str:
        try:
            sharded(model, tp)
        except UserError as error:
            return str(error)
        return "nothing raised"

    for said in run_ranks(run, 4):
        assert message in said


def test_nothing_is_warned_of_tensors_that_are_cut_twice():
    def run() -> list[str]:
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("mm_core").addHandler(handler)
        sharded(MOE, 2, sharding_size=2)
        return said

    assert run_ranks(run, 4) == [[]] * 4
