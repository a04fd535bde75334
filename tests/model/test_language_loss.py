"""The loss of language models: transformers' own, the definition of each weighting, chunks of logits, packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from mm_core.config.transformers_model import LossConfig
from mm_core.models import packed_attention
from mm_core.models.packed_attention import ends_of
from mm_core.models.transformers_model import TransformersModel
from mm_core.training.losses.chunked import chunked_cross_entropy
from mm_core.training.losses.head import LossHead
from mm_core.training.tasks.language import IGNORED, LanguageTask
from mm_registry.errors import UserError
from tests import tiny_vlm
from tests.packing import packed

CPU = torch.device("cpu")
TYPES = ("default", "per_sample_loss", "per_token_loss", "token_loss", "square_loss")
MODES = ("default", "chunk", "dynamic_chunk")
SAMPLES = [tiny_vlm.sample(kind, 5 + 2 * i, i) for i, kind in enumerate(tiny_vlm.KINDS)]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def network(request: Any) -> Any:
    return tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl(request.param))


@pytest.fixture(autouse=True)
def _as_it_was(request: Any) -> Any:
    yield
    if "network" in request.fixturenames:
        restore(request.getfixturevalue("network"))


def restore(network: Any) -> None:
    """A network that tasks have changed, as transformers made it."""
    network.lm_head.__dict__.pop("forward", None)
    network.config.get_text_config()._attn_implementation = "sdpa"


def gradients(network: Any) -> Gradients:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def learnt(network: Any, *batches: Any, **options: Any) -> tuple[float, Gradients]:
    """The loss of a global batch as the loop takes it, and its gradients.

    Args:
        options: of `LossConfig`, and `coef`: its `router_aux_loss_coef`.
    """
    coef, loss = options.pop("coef", 0.0), options
    model = TransformersModel(network, loss=LossConfig(**loss), router_aux_loss_coef=coef)
    task = LanguageTask(model, seed=0, device=CPU)
    network.zero_grad()
    total, weight = 0.0, 0.0
    for inputs in task.prepare(batches):
        sums, weights, _ = task.loss(task.forward(model, inputs), inputs)
        sums.sum().backward()
        total, weight = total + sums.detach().double().sum(), weight + weights.double().sum()
    found = {name: gradient / weight for name, gradient in gradients(network).items()}
    restore(network)
    return float(total / weight), found


def by_definition(network: Any, loss_type: str) -> tuple[float, Gradients]:
    """The same from transformers' own mean loss of each sample, which runs alone and without padding."""
    network.zero_grad()
    total, weight = 0.0, 0.0
    for sample in SAMPLES:
        one = {
            name: t[None] if name in ("input_ids", "labels", "mm_token_type_ids") else t
            for name, t in sample.items()
        }
        mean = network(**one, use_cache=False).loss
        number = int((sample["labels"] != IGNORED).sum())
        share = {"per_sample_loss": 1.0, "square_loss": number**0.5}.get(loss_type, float(number))
        (mean * share).backward()
        total, weight = total + mean.item() * share, weight + share
    return total / weight, {name: gradient / weight for name, gradient in gradients(network).items()}


def close(found: tuple[float, Gradients], wanted: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
        )


ARRANGED: dict[str, Callable[[], list[Any]]] = {
    "alone": lambda: [tiny_vlm.collate([one]) for one in SAMPLES],
    "padded": lambda: [tiny_vlm.collate(SAMPLES)],
    "packed": lambda: [packed([SAMPLES[:3], SAMPLES[3:]], 72)],
    "packed_in_two": lambda: [packed([SAMPLES[:1], SAMPLES[1:2]], 40), packed([[], SAMPLES[2:]], 60)],
}


@pytest.mark.parametrize("arranged", ARRANGED)
def test_loss_and_gradients_are_those_of_transformers(network: Any, arranged: str) -> None:
    """Of texts, one image, two images and a video: text, vision tower and deepstack mergers learn the same."""
    wanted = by_definition(network, "default")
    assert len(wanted[1]) == len(list(network.parameters()))
    close(learnt(network, *ARRANGED[arranged]()), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_type", TYPES)
def test_each_weighting_in_each_mode_is_its_definition(loss_type: str, mode: str) -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    sizes = {} if mode == "default" else {"chunk_size": 7}
    wanted = by_definition(network, loss_type)
    for arranged in ("padded", "packed_in_two"):
        batches = ARRANGED[arranged]()
        close(learnt(network, *batches, loss_type=loss_type, compute_mode=mode, **sizes), wanted)


def test_packed_documents_are_balanced_each_by_itself() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl(True))
    cases: tuple[dict[str, Any], ...] = ({}, {"loss_type": "square_loss", "compute_mode": "chunk"})
    for loss in cases:
        wanted = learnt(network, *ARRANGED["alone"](), coef=0.1, **loss)
        assert wanted[0] != pytest.approx(learnt(network, *ARRANGED["alone"](), **loss)[0])
        for arranged in ("padded", "packed", "packed_in_two"):
            close(learnt(network, *ARRANGED[arranged](), coef=0.1, **loss), wanted)


def test_documents_do_not_see_each_other_whatever_the_attention() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    wanted = by_definition(network, "default")
    network.config.get_text_config()._attn_implementation = "eager"  # it makes a mask of the positions
    close(learnt(network, *ARRANGED["packed"]()), wanted)


def test_a_kernel_for_sequences_of_different_lengths_is_called_as_torch_has_it(
    network: Any, monkeypatch: Any
) -> None:
    """By a stand-in with the signature of `torch.nn.attention.varlen.varlen_attn`, which has no kernel for CPUs."""
    calls = []

    def varlen(q: Any, k: Any, v: Any, first: Any, second: Any, longest: int, other: int, *, scale: Any, window_size: Any,
               enable_gqa: bool) -> torch.Tensor:  # fmt: skip
        assert first.dtype == torch.int32
        assert first is second
        assert longest == other == int(first.diff().max())
        assert window_size == (-1, 0)
        calls.append(first.tolist())
        parts = [
            F.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1)[None] for t in (q, k, v)),
                is_causal=True,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0].transpose(0, 1)
            for a, b in zip(calls[-1][:-1], calls[-1][1:], strict=True)
        ]
        return torch.cat(parts)

    wanted = learnt(network, *ARRANGED["packed"]())
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda query, value: True)
    monkeypatch.setattr(packed_attention, "_varlen", lambda: varlen)
    close(learnt(network, *ARRANGED["packed"]()), wanted)
    lengths = [len(one["input_ids"]) for one in SAMPLES]
    assert calls[0] == [0, lengths[0], sum(lengths[:2]), sum(lengths[:3]), 72, 72 + lengths[3], 144]


def test_bf16_chunks_are_as_good_as_all_logits_at_once() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    exact = learnt(network, *ARRANGED["padded"]())
    network.to(torch.bfloat16)
    batches = ARRANGED["padded"]()

    def distance(found: tuple[float, Gradients]) -> float:
        name = "lm_head.weight"
        return float((found[1][name] - exact[1][name]).norm() / exact[1][name].norm())

    whole, chunks = learnt(network, *batches), learnt(network, *batches, compute_mode="chunk", chunk_size=5)
    assert chunks[0] == pytest.approx(whole[0], rel=1e-5)  # the loss itself is taken in fp32
    assert distance(chunks) < 1.2 * distance(whole)
    assert chunks[1]["lm_head.weight"].dtype == torch.bfloat16


# -- the chunked cross entropy ------------------------------------------------------------------------------------------


def _reference(leaves: Any, targets: Any, weights: Any, owners: Any) -> torch.Tensor:
    hidden, weight, bias = leaves
    each = F.cross_entropy(hidden @ weight.t() + bias, targets, reduction="none") * weights
    return each.new_zeros(3).index_add(0, owners, each)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_are_exact(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves: Any = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in ((9, 5), (11, 5), (11,))
    ]
    targets = torch.randint(11, (9,), generator=generator)
    weights, owners = (
        torch.rand(9, generator=generator, dtype=torch.float64),
        torch.tensor([0, 0, 2, 2, 2, 0, 0, 2, 2]),
    )
    wanted = _reference(leaves, targets, weights, owners)
    found = chunked_cross_entropy(leaves[0], leaves[1], leaves[2], targets, weights, owners, 3, chunk)
    torch.testing.assert_close(found, wanted)
    theirs = torch.autograd.grad(3 * wanted.sum(), leaves)
    ours = torch.autograd.grad(3 * found.sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(leaves[0], leaves[1], leaves[2], targets, weights, owners, 3, chunk),
            wanted.detach(),
        )


def test_nothing_to_learn_gives_zeros() -> None:
    hidden, weight = torch.ones(0, 5, requires_grad=True), torch.ones(11, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = chunked_cross_entropy(hidden, weight, None, none, torch.zeros(0), none, 2, 4)
    assert found.tolist() == [0, 0]
    found.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_groups_cannot_have_gradients_of_their_own() -> None:
    hidden, weight, zeros = (
        torch.ones(2, 5),
        torch.ones(11, 5, requires_grad=True),
        torch.zeros(2, dtype=torch.int64),
    )
    found = chunked_cross_entropy(hidden, weight, None, zeros, torch.ones(2), torch.tensor([0, 1]), 2, 4)
    with pytest.raises(RuntimeError, match="different gradients"):
        (found * torch.tensor([1.0, 2.0])).sum().backward()


def test_the_logits_never_exist(monkeypatch: Any) -> None:
    """The largest tensor that the head makes has a chunk's rows."""
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    sizes: list[int] = []
    own = torch.mm

    def mm(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = own(*args, **kwargs)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(torch, "mm", mm)
    model = TransformersModel(
        network, loss=LossConfig(compute_mode="dynamic_chunk", chunk_size=3, loss_type="square_loss")
    )
    task = LanguageTask(model, seed=0, device=CPU)
    (inputs,) = task.prepare([tiny_vlm.collate(SAMPLES)])
    outputs = task.forward(model, inputs)
    assert outputs.logits.shape == (4,)
    assert max(sizes) == 3
    assert len(sizes) == 2 * -(-sum(5 + 2 * i for i in range(4)) // 3)  # of the learnt tokens alone


# -- what cannot be -----------------------------------------------------------------------------------------------------


def test_a_network_that_changes_its_logits_needs_them() -> None:
    config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0)  # fmt: skip
    with pytest.raises(
        UserError, match=r"compute_mode is chunk, but Qwen3ForCausalLM changes its logits .*; write default"
    ):
        LossHead(Qwen3ForCausalLM(config), LossConfig(compute_mode="chunk"))


def test_a_head_that_is_replaced_is_noticed() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    model = TransformersModel(network, loss=LossConfig(compute_mode="chunk"))
    task = LanguageTask(model, seed=0, device=CPU)
    (inputs,) = task.prepare([tiny_vlm.collate(SAMPLES)])
    network.lm_head = torch.nn.Sequential(network.lm_head)
    with pytest.raises(UserError, match="a Sequential has taken the place of the head"):
        task.forward(model, inputs)


def test_padding_before_a_text_cannot_be_mixed_with_packed_rows() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    task = LanguageTask(TransformersModel(network), seed=0, device=CPU)
    batch = tiny_vlm.collate(SAMPLES)
    padded = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    next(task.prepare([padded]))  # as long as transformers makes a mask of it
    next(task.prepare(ARRANGED["packed"]()))
    next(task.prepare([batch]))
    with pytest.raises(UserError, match="padding is not at its end"):
        next(task.prepare([padded]))


@pytest.mark.parametrize("arranged", ["padded", "packed"])
def test_padding_is_no_tokens(arranged: str) -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    task = LanguageTask(TransformersModel(network), seed=0, device=CPU)
    count = sum(task.tokens(inputs) for inputs in task.prepare(ARRANGED[arranged]()))
    assert count == sum(len(sample["input_ids"]) for sample in SAMPLES)


def test_an_attention_that_is_not_known_is_refused() -> None:
    network = tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl())
    task = LanguageTask(TransformersModel(network), seed=0, device=CPU)
    network.config.get_text_config()._attn_implementation = "paged|sdpa"
    with pytest.raises(
        UserError, match=r"attention paged\|sdpa of Qwen3VLForConditionalGeneration is not known"
    ):
        next(task.prepare(ARRANGED["packed"]()))


@pytest.mark.parametrize(
    ("ids", "place"),
    [([[1, 1]], "row 0 has 1 at place 0"), ([[0, 0], [0, 2]], "row 1 has 2 at place 1"), ([[0, -1, 1]], "has 1 at place 2"),
     ([[0, 1, 0]], "has 0 at place 2"), ([[-1, 0]], "has 0 at place 1")],
)  # fmt: skip
def test_documents_count_up(ids: list[list[int]], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        ends_of(torch.tensor(ids))


def test_ends_of_documents() -> None:
    ids = torch.tensor([[0, 0, 1, -1], [0, 1, 2, 3], [-1, -1, -1, -1]])
    assert ends_of(ids) == ((2, 3), (1, 2, 3, 4), ())
