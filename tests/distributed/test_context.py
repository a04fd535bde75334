"""Ranks that share sequences learn what one process learns: Wan, and text with packed documents."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.context import context_of, context_problem
from mm_core.sharding.context_policy import ContextPolicy, causal_text
from mm_core.sharding.documents import documents_of, refuse_padding
from mm_core.sharding.policy import policy_problem
from mm_core.training.tasks.language import LanguageTask
from mm_core.weights import materialize
from mm_core.weights.tensors import named_parameters
from mm_plugin_wan22.policy import CONTEXT, WANDIT
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError
from tests.distributed.against_one import distance, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import BATCH, DENSE, LENGTH, MODELS, MOE, Batch, Composite, TinyModel

pytestmark = pytest.mark.timeout(180)
TOKENS = 27


def _wan_batch(step: int) -> Batch:
    """27 tokens, which neither 2 nor 4 divides, with a timestep each: 0 in the first frame."""
    generator = torch.Generator().manual_seed(step)
    sigma = torch.rand(BATCH, 1, generator=generator).repeat(1, TOKENS)
    sigma[:, : TOKENS // 3] = 0
    return {
        "video": torch.randn(BATCH, 4, 3, 6, 6, generator=generator),
        "noise": torch.randn(BATCH, 4, 3, 6, 6, generator=generator),
        "sigma": sigma,
        "text": torch.randn(BATCH, 5, 32, generator=generator),
    }


def _wan_losses(module: nn.Module, batch: Batch, per_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    timestep = batch["sigma"] * 1000 if per_token else batch["sigma"][:, -1] * 1000
    prediction = module(batch["video"], timestep, batch["text"])
    losses = (prediction.float() - batch["noise"]).square().flatten(1).mean(1)
    return losses, torch.ones_like(losses)


def wan(heads: int, per_token: bool) -> TinyModel:
    return TinyModel(
        "wan",
        lambda: WanDiT(
            in_dim=4, out_dim=4, hidden_size=48, num_heads=heads, ffn_dim=64, freq_dim=32, text_dim=32, text_len=6,
            num_layers=2, max_seq_len=16,
        ),
        WANDIT,
        _wan_batch,
        lambda module, batch: _wan_losses(module, batch, per_token),
        blocks="blocks.{*}", parts="blocks.{*}.ffn", attention="blocks.{*}.attn1", frozen="condition_embedder.text_embedder",
    )  # fmt: skip


def _packed_batch(step: int) -> Batch:
    """Rows of 12 tokens: one document, two, three, or 12 of one token each."""
    bounds = [(0,), (0, 5), (0, 1, 8), tuple(range(LENGTH))]
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        for start in bounds[row % 4]:
            starts[row, start:] = start
    batch = DENSE.batch(step)
    return {"ids": batch["ids"], "labels": batch["labels"], "positions": torch.arange(LENGTH) - starts}


def _own_token_losses(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of this rank's tokens."""
    logits = module(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False).logits.float()
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    context = context_of(module)
    if context is not None:
        labels = context.split(labels)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum(1), (labels >= 0).sum(1).float()


def text(model: TinyModel = DENSE) -> TinyModel:
    def make() -> Any:
        made: Any = model.make()
        for layer in made.model.layers:
            layer.self_attn.scaling = 0.3
        return made

    policy = replace(model.policy, context=causal_text())
    return replace(model, make=make, policy=policy, batch=_packed_batch, losses=_own_token_losses)


def learn(model: TinyModel, sizes: ParallelSizes, **fsdp2: Any) -> dict[str, Any]:
    """Mean loss and gradients of a global batch in two micro batches."""
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2), sizes)
    materialize(composite.predictor, "cpu", 0)
    mesh, totals = composite.parallel_mesh, torch.zeros(2)
    for micro in range(2):
        loss, weight = model.loss(composite.predictor, 0, mesh.dp_rank, mesh.dp_size, micro, 2)
        (loss * mesh.fsdp.size()).backward()  # FSDP2 takes the mean of the ranks' gradients
        totals += torch.stack([loss.detach(), weight.float()])
    dist.all_reduce(totals)
    totals /= sizes.tp  # whose ranks have the same losses
    gradients = {
        name: whole(p.grad) for name, p in named_parameters(composite.predictor) if p.grad is not None
    }
    quotients = {name: gradient / totals[1].item() for name, gradient in gradients.items()}
    return {"loss": (totals[0] / totals[1]).numpy(), **quotients}


@functools.cache
def wan_alone(heads: int, per_token: bool) -> dict[str, Any]:
    return run_ranks(learn, 1, wan(heads, per_token), ParallelSizes())[0]


@functools.cache
def text_alone(name: str) -> dict[str, Any]:
    return run_ranks(learn, 1, text(MODELS[name]), ParallelSizes())[0]


BLOCKS = "predictor.blocks.{*}"


@pytest.mark.parametrize(
    ("world", "sizes", "heads", "per_token", "fsdp2"),
    [
        pytest.param(2, {"cp": 2}, 4, True, {}, id="ulysses-2"),
        pytest.param(
            2,
            {"cp": 2, "cp_algo": "ring"},
            3,
            True,
            {"recompute_modules": (BLOCKS,)},
            id="ring-2-recompute",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"cp": 2}, 4, False, {"sharding_size": 2}, id="ulysses-2-of-4-hsdp", marks=pytest.mark.slow
        ),
        pytest.param(4, {"cp": 4, "cp_algo": "ring"}, 3, False, {}, id="ring-4"),
        pytest.param(4, {"cp": 4}, 4, True, {}, id="ulysses-4", marks=pytest.mark.slow),
        pytest.param(
            2,
            {"cp": 2, "cp_algo": "ring"},
            3,
            True,
            {"recompute_modules": (BLOCKS,), "recompute_granularity": "selective"},
            id="ring-2-selective",
        ),
        pytest.param(
            2,
            {"cp": 2},
            4,
            False,
            {"recompute_modules": (BLOCKS,), "use_reentrant": True},
            id="ulysses-2-reentrant",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wan_learns_what_one_process_learns(world, sizes, heads, per_token, fsdp2):
    found = run_ranks(learn, world, wan(heads, per_token), ParallelSizes(**sizes), **fsdp2)
    assert all(distance(each, wan_alone(heads, per_token)) < 2e-6 for each in found)


@pytest.mark.parametrize(
    ("world", "sizes", "model", "fsdp2"),
    [
        pytest.param(2, {"cp": 2}, DENSE, {}, id="ulysses-2"),
        pytest.param(4, {"cp": 4, "cp_algo": "ring"}, DENSE, {}, id="ring-4"),
        pytest.param(4, {"cp": 4}, DENSE, {}, id="ulysses-4-of-2-keys", marks=pytest.mark.slow),
        pytest.param(
            4,
            {"cp": 2, "cp_algo": "ring", "ep": 4},
            MOE,
            {"recompute_modules": ("predictor.model.layers.{*}",), "expert_parallel_size": 4},
            id="ring-2-of-4-experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {"cp": 2, "tp": 2}, DENSE, {}, id="ulysses-2-tensor-2", marks=pytest.mark.slow),
    ],
)
def test_packed_text_learns_what_one_process_learns(world, sizes, model, fsdp2):
    """In one process transformers masks the documents itself."""
    found = run_ranks(learn, world, text(model), ParallelSizes(**sizes), **fsdp2)
    assert all(distance(each, text_alone(model.name)) < 2e-6 for each in found)


def test_what_a_recomputed_block_keeps_is_this_ranks_part():
    """Recomputation keeps a block's inputs: of the first block not the whole sequence either, nor a view of it."""

    def run() -> list[int]:
        composite = wan(4, False).composite()
        fsdp2 = Fsdp2Config(recompute_modules=(BLOCKS,))
        composite.fully_shard(None, fsdp2, ParallelSizes(cp=dist.get_world_size()))
        materialize(composite.predictor, "cpu", 0)
        inputs: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 3 and tensor.shape[1] > 6 and tensor.shape[2] == 48:  # tokens, not the text
                inputs.append(tensor.untyped_storage().nbytes() // (48 * 4))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            composite.predictor(torch.zeros(1, 4, 3, 6, 6), torch.zeros(1), torch.zeros(1, 5, 32))
        return inputs

    assert TOKENS in run_ranks(run, 1)[0]
    for tokens in run_ranks(run, 2):
        assert set(tokens) <= {13, 14}


def test_bf16_compute_stays_near_fp32():
    for algorithm in ("ulysses", "ring"):
        sizes = ParallelSizes(cp=2, cp_algo=algorithm)
        found = run_ranks(learn, 2, wan(4, True), sizes, param_dtype="bf16", reduce_dtype="fp32")[0]
        assert 1e-4 < distance(found, wan_alone(4, True)) < 2e-2


def test_the_language_task_counts_each_token_once():
    """Padded rows, and a loss that balances experts, which is of whole samples."""

    def run(sizes: ParallelSizes) -> dict[str, Any]:
        with torch.device("meta"):
            model = TransformersModel(
                MOE.make(),
                sharding_policy=replace(MOE.policy, context=causal_text()),
                router_aux_loss_coef=0.1,
            )
        model.fully_shard(None, Fsdp2Config(), sizes)
        materialize(model.model, "cpu", 0)
        task = LanguageTask(model, seed=0, device=torch.device("cpu"))
        batch = MOE.batch(0)
        mask = torch.arange(LENGTH) < torch.tensor([[12], [7], [12], [3], [9], [12], [5], [11]])
        given = {
            "input_ids": batch["ids"],
            "labels": batch["labels"].masked_fill(~mask, -100),
            "attention_mask": mask.long(),
        }
        (inputs,) = task.prepare([given])
        losses, weights, metrics = task.loss(task.forward(model, inputs), inputs)
        (losses.sum() * sizes.cp).backward()  # FSDP2 takes the mean of the ranks' gradients
        totals = torch.stack([losses.detach().sum(), weights.sum(), metrics["router_aux_loss"]])
        dist.all_reduce(totals)
        return {"totals": totals.numpy(), **{n: whole(p.grad) for n, p in named_parameters(model.model)}}

    one = run_ranks(run, 1, ParallelSizes())[0]
    for algorithm in ("ulysses", "ring"):
        assert distance(run_ranks(run, 2, ParallelSizes(cp=2, cp_algo=algorithm))[0], one) < 2e-6


@pytest.fixture(scope="module")
def meta() -> Any:
    with torch.device("meta"):
        return wan(4, False).make()


def test_what_cannot_be_shared_is_refused_by_name(meta):
    plan = build_plan(meta, WANDIT, Fsdp2Config())
    assert plan.context.attention == ("blocks.0.attn1", "blocks.1.attn1")
    assert context_problem(meta, plan, ParallelSizes(cp=4)) is None
    assert context_problem(meta, plan, ParallelSizes(cp=3, cp_algo="ring")) is None
    assert context_problem(meta, plan, ParallelSizes(cp=3)) == (
        "--context-parallel-size: 3 does not divide the 4 heads of predictor.blocks.0.attn1, which ulysses_cp_algo deals "
        "out; use one of 1, 2, 4, or --context-parallel-algo megatron_cp_algo (ring attention), which deals out none."
    )
    problem = context_problem(meta, plan, ParallelSizes(cp=4, tp=2))
    assert problem is not None
    assert (
        "4 does not divide the 2 heads of predictor.blocks.0.attn1 of each of the 2 tensor-parallel ranks"
        in problem
    )
    without = build_plan(meta, replace(WANDIT, context=None), Fsdp2Config())
    assert context_problem(meta, without, ParallelSizes(cp=2)) == (
        "--context-parallel-size: 2 ranks cannot share the sequences of predictor, since its sharding policy does not say "
        "where they are split (context); set it to 1."
    )


def test_a_sliding_window_and_dropout_are_refused():
    with torch.device("meta"):
        model = text().make()
    plan = build_plan(model, text().policy, Fsdp2Config())
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert "layers.1.self_attn has an attention_dropout of 0.1" in str(
        context_problem(model, plan, ParallelSizes(cp=2))
    )
    model.model.layers[0].self_attn.sliding_window = 4
    assert "layers.0.self_attn has a sliding window of 4" in str(
        context_problem(model, plan, ParallelSizes(cp=2))
    )


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"attention": ("attn1",)}, "context: it splits nothing"),
        ("blocks", 'context: "blocks" is of type str, expected a ContextPolicy'),
        (
            {"attention": "blocks", "split_outputs": {"rope": 1}},
            'context: attention is "blocks", expected a tuple',
        ),
        ({"attention": ("a",), "split_outputs": {"rope": -1}}, "a dimension is a number from 0 on"),
        (
            {"attention": ("a",), "split_inputs": {"rope": 1}},
            "expected a mapping from arguments to dimensions",
        ),
        ({"attention": ("a",), "split_outputs": {"a..b": 1}}, 'context: split_outputs: "a..b": '),
        (
            {"attention": ("a",), "split_outputs": {"a": 1}, "positions": 3},
            "positions is 3, expected the name",
        ),
    ],
)
def test_a_policy_that_cannot_be_meant_is_a_problem(context, message):
    value = ContextPolicy(**context) if isinstance(context, dict) else context
    assert message in str(policy_problem(ShardingPolicy(context=value)))


def test_a_point_that_does_not_exist_is_named(meta):
    policy = replace(WANDIT, context=replace(CONTEXT, split_outputs={"rotary": 1}))
    with pytest.raises(UserError, match=r"policy of predictor, context.split_outputs: .*rotary"):
        build_plan(meta, policy, Fsdp2Config())


def test_an_argument_that_does_not_exist_is_named(meta: Any):
    policy = replace(WANDIT, context=replace(CONTEXT, split_inputs={"blocks.0": {"hidden": 1}}))
    plan = build_plan(meta, policy, Fsdp2Config())
    assert context_problem(meta, plan, ParallelSizes(cp=2)) == (
        "policy of predictor, context: predictor.blocks.0 is called with (hidden_states, encoder_hidden_states, temb, "
        "rotary_emb), none of which is hidden."
    )


MISFITS: list[tuple[dict[str, Any], str]] = [
    # torch says it of a rotary table of the whole sequence
    ({"split_outputs": {}}, "must match the size"),
    ({"attention": ("blocks.{*}.ffn",)}, "predictor.blocks.0.ffn computed attention without torch's"),
    ({"split_inputs": {"blocks.1": {"hidden_states": 1}}, "split_outputs": {}}, "runs before any point"),
    ({"split_inputs": {"": {"latents": 2}, "blocks.0": {"hidden_states": 1}}}, "give two lengths"),
    (
        {"unsupported": ("timestep",)},
        "predictor is given timestep, with which ranks cannot share a sequence yet",
    ),
    ({"causal": True}, "blocks.0.attn1 calls attention with is_causal=False"),
]


def test_policies_that_do_not_fit_the_forward_pass_are_errors():
    """Not a hang, and not a wrong number."""

    def said(changes: dict[str, Any]) -> str:
        model = replace(wan(4, True), policy=replace(WANDIT, context=replace(CONTEXT, **changes)))
        composite = model.composite()
        composite.fully_shard(None, Fsdp2Config(), ParallelSizes(cp=2))
        materialize(composite.predictor, "cpu", 0)
        try:
            model.loss(composite.predictor, 0)
        except (UserError, RuntimeError) as error:
            return str(error)
        return "nothing raised"

    for found in run_ranks(lambda: [said(changes) for changes, _ in MISFITS], 2):
        for text, (_, message) in zip(found, MISFITS, strict=True):
            assert message in text


def test_documents_begin_where_positions_do_not_go_up_by_one():
    assert documents_of(torch.arange(6)[None]) is None
    rows = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 0, 1]])
    assert documents_of(rows) == ((0, 5), (0, 2, 3, 5))
    assert documents_of(rows.expand(4, 2, 5)) == ((0, 5), (0, 2, 3, 5))
    assert documents_of(rows.expand(3, 2, 5)) is None


@pytest.mark.parametrize("mask", [torch.tensor([[1, 1, 0], [0, 1, 1]]), torch.ones(1, 1, 3, 3)])
def test_padding_that_would_be_attended_to_is_refused(mask):
    refuse_padding(torch.tensor([[1, 1, 0], [1, 1, 1]]), "attention_mask", "predictor")
    with pytest.raises(UserError, match="predictor: attention_mask "):
        refuse_padding(mask, "attention_mask", "predictor")


def test_gathering_is_undone_by_its_backward_pass():
    """Each rank's gradient is the sum of what all ranks made of its tokens."""

    def run() -> bool:
        policy = replace(
            WANDIT, context=replace(CONTEXT, causal=True)
        )  # whose ring deals out two pieces a rank
        composite = Composite(wan(4, False).build(), policy)
        composite.fully_shard(None, Fsdp2Config(), ParallelSizes(cp=3, cp_algo="ring"))
        context = context_of(composite.predictor)
        assert context is not None
        whole_one = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
        own = context.split(whole_one).requires_grad_()
        gathered = context.gather(own)
        (gathered * (dist.get_rank() + 1)).sum().backward()
        assert not context.layout_of(7).in_order
        return torch.equal(gathered, whole_one) and bool((own.grad == 6).all())

    assert all(run_ranks(run, 3))
