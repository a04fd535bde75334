"""What recomputation computes again, what it keeps, and what it refuses."""

from __future__ import annotations

import logging
from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm_core.planning.live_bytes import LiveBytes
from mm_core.sharding import ShardingPlan, Unit
from mm_core.sharding.activations import RecomputeWrapper, offloaded_modules, wrap_activations
from mm_core.sharding.offload import OffloadWrapper
from mm_core.sharding.plan import ShardingError, bare_name
from tests.distributed.models import DENSE, MODELS, WAN, TinyModel

FORMS = {
    "full": {},
    "selective": {"recompute_granularity": "selective"},
    "reentrant": {"use_reentrant": True},
}
form = pytest.mark.parametrize("settings", [pytest.param(value, id=name) for name, value in FORMS.items()])


def plan(recompute: tuple[str, ...] = (), **settings: Any) -> ShardingPlan:
    return ShardingPlan("predictor", (), Unit("", ()), recompute=recompute, **settings)


def wrapped(model: nn.Module, recompute: tuple[str, ...], **settings: Any) -> nn.Module:
    wrap_activations(dict(model.named_modules()), plan(recompute, **settings))
    return model


def blocks_of(tiny: TinyModel) -> tuple[str, ...]:
    return tuple(tiny.blocks.replace("{*}", str(i)) for i in range(3))


def built(tiny: TinyModel) -> nn.Module:
    torch.manual_seed(0)
    return tiny.build("cpu")


def gradients(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    loss().backward()
    return {bare_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], exact: bool = True
) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=0, atol=0 if exact else 1e-6 * float(grad.abs().max())
        )


class Operations(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        self.counts[name if not name.startswith("_scaled_dot_product") else "attention"] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, tiny: TinyModel) -> tuple[Counter[str], Counter[str]]:
    """Of the forward and of the backward pass."""
    with Operations() as forward:
        loss = tiny.loss(model, 0)[0]
    with Operations() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize("name", ["wan", "dense"])
def test_selective_recomputes_no_expensive_operation_and_full_all_of_them(name):
    tiny = MODELS[name]
    found = {"none": operations(built(tiny), tiny)}
    for kind in ("full", "selective"):
        model = wrapped(built(tiny), blocks_of(tiny), recompute_granularity=kind)
        found[kind] = operations(model, tiny)
    with Operations() as in_blocks:  # what the three blocks do in the forward pass
        model = built(tiny)
        hooks = [model.get_submodule(path) for path in blocks_of(tiny)]
        inside = Inside(hooks)
        with inside:
            tiny.loss(model, 0)
    del in_blocks
    products = ("mm", "addmm", "bmm")
    done = sum(inside.counts[op] for op in products)
    assert done > 10
    backward = {kind: sum(counts[1][op] for op in products) for kind, counts in found.items()}
    # Early stop: what comes after the last tensor that backward needs is not computed again; the last product of
    # a block is such.
    assert done - 3 <= backward["full"] - backward["none"] <= done
    assert backward["selective"] == backward["none"]
    attention = {kind: counts[1]["attention"] for kind, counts in found.items()}
    assert attention["full"] - attention["none"] == inside.counts["attention"] > 0
    assert attention["selective"] == attention["none"]
    # The cheap ones are computed again.
    assert found["selective"][1]["mul"] > found["none"][1]["mul"]


class Inside(Operations):
    """Counts while one of some modules runs."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.depth = 0
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.step(1))
            module.register_forward_hook(lambda *_: self.step(-1))

    def step(self, by: int) -> None:
        self.depth += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["wan", "dense"])
def test_memory_between_the_passes_falls(name):
    tiny = MODELS[name]

    def alive(recompute: tuple[str, ...], **settings: Any) -> int:
        model = wrapped(built(tiny), recompute, **settings)
        with LiveBytes((*model.parameters(), *model.buffers())) as bytes_:
            loss = tiny.loss(model, 0)[0]
            found = bytes_.now
        loss.backward()
        return found

    blocks = blocks_of(tiny)
    nothing, full = alive(()), alive(blocks)
    assert full < 0.35 * nothing
    assert alive(blocks, use_reentrant=True) <= full
    assert full < alive(blocks, recompute_granularity="selective") < 0.8 * nothing
    assert full < alive(blocks[:1]) < nothing
    assert alive(tuple(tiny.parts.replace("{*}", str(i)) for i in range(3))) < nothing


def test_scores_of_attention_that_is_not_fused_are_not_kept():
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    def alive(tokens: int) -> int:
        model = wrapped(nn.Sequential(Eager(), Eager()), ("0", "1"), recompute_granularity="selective")
        with LiveBytes((*model.parameters(), *model.buffers())) as bytes_:
            out = model(torch.randn(2, tokens, 16, requires_grad=True))
            found = bytes_.now
        out.sum().backward()
        return found

    assert alive(512) == pytest.approx(2 * alive(256), rel=0.01)  # not four times


@form
def test_dropout_draws_the_same_numbers_again(settings):
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.dropout(self.linear(F.dropout(x.sin(), 0.3)), 0.5)

    x = torch.randn(8, 16, requires_grad=True)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Drops() for _ in range(3)))

    plain, again = model(), wrapped(model(), ("0", "1", "2"), **settings)
    expected = gradients(plain, lambda: plain(x).square().sum())
    assert_same(
        gradients(again, lambda: again(x).square().sum()), expected, exact="use_reentrant" not in settings
    )


Pair = namedtuple("Pair", "first second")


@form
def test_tensors_anywhere_in_arguments_and_results_are_differentiated(settings):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, pair: Any, *, extra: dict[str, Any], scale: float, nothing: None = None) -> Any:
            assert nothing is None
            out = pair[0] * self.weight * extra["x"] * scale
            return Pair(out, {"other": [out + pair[1], "text", None]}), 7

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        leaves = {name: torch.arange(1.0, 5.0).requires_grad_() for name in "abc"}
        pair = (leaves["a"], leaves["b"])
        result, seven = model[0](pair, extra={"x": leaves["c"], "n": 3}, scale=2.0)
        assert isinstance(result, Pair)
        assert (seven, result.second["other"][1:]) == (7, ["text", None])
        (result.first.sum() + result.second["other"][0].square().sum()).backward()
        return {**{name: leaf.grad for name, leaf in leaves.items()}, "w": next(model.parameters()).grad}

    expected = run(nn.Sequential(Nested()))
    assert all(grad is not None for grad in expected.values())
    assert_same(run(wrapped(nn.Sequential(Nested()), ("0",), **settings)), expected)


@form
def test_a_first_block_whose_inputs_need_no_gradient_is_trained(settings, caplog):
    x = torch.randn(8, 16)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)))

    plain, again = model(), wrapped(model(), ("0", "1"), **settings)
    expected = gradients(plain, lambda: plain(x).square().sum())
    with caplog.at_level(logging.WARNING):
        assert_same(gradients(again, lambda: again(x).square().sum()), expected)
        gradients(again, lambda: again(x).square().sum())
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "predictor.0: no input needs a gradient, with which the reentrant form of recomputation would give its "
        "parameters none; it is recomputed in the newer form."
    ] * ("use_reentrant" in settings)


@form
def test_frozen_blocks_let_gradients_through(settings):
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        made[1].requires_grad_(False)
        return made

    plain, again = model(), wrapped(model(), ("0", "1", "2"), **settings)
    x = torch.randn(8, 16)
    expected = gradients(plain, lambda: plain(x).square().sum())
    assert not any(name.startswith("1.") for name in expected)
    assert_same(gradients(again, lambda: again(x).square().sum()), expected)


def ids() -> torch.Tensor:
    return torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


@form
@pytest.mark.parametrize("recompute", [(0, 1, 2), (1,)], ids=["all", "middle"])
def test_a_cache_that_the_model_makes_itself_does_not_change_gradients(settings, recompute, caplog):
    """facts.md §4, trap 4: recomputed layers append to it again; the reentrant form then gives wrong gradients."""

    def loss(model: nn.Module) -> torch.Tensor:
        return model(input_ids=ids(), labels=ids(), use_cache=True).loss

    plain = built(DENSE)
    expected = gradients(plain, lambda: loss(plain))
    again = wrapped(built(DENSE), tuple(f"model.layers.{i}" for i in recompute), **settings)
    with caplog.at_level(logging.WARNING):
        assert_same(gradients(again, lambda: loss(again)), expected, exact="use_reentrant" not in settings)
    assert "use_cache=False" in caplog.text


@form
def test_a_cache_with_contents_is_refused(settings):
    model = wrapped(built(DENSE), ("model.layers.1",), **settings)
    with torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        model(input_ids=ids(), past_key_values=cache)  # nothing is recomputed without gradients
    with pytest.raises(
        ShardingError, match=r'"predictor.model.layers.1" is called with a cache .* use_cache=False'
    ):
        model(input_ids=ids(), past_key_values=cache)


def test_a_model_that_recomputes_itself_is_refused():
    wan, dense = built(WAN), built(DENSE)
    wan.enable_gradient_checkpointing()
    dense.gradient_checkpointing_enable()
    for model, tiny in ((wan, WAN), (dense, DENSE)):
        with pytest.raises(ShardingError, match="of this model recomputes activations itself"):
            wrapped(model, blocks_of(tiny))
        wrapped(model, ())  # its own is left alone


def test_a_model_that_recomputes_itself_later_is_told(caplog):
    model = wrapped(built(DENSE), ("model.layers.0",))
    model.gradient_checkpointing_enable()
    model.train()
    with caplog.at_level(logging.WARNING):
        model(input_ids=ids(), use_cache=False)
    assert "predictor.model.layers.0: its Qwen3DecoderLayer recomputes activations itself" in caplog.text


def test_selective_and_reentrant_do_not_go_together():
    with pytest.raises(ShardingError, match="selective cannot be done with use_reentrant: true"):
        wrapped(built(WAN), ("blocks.0",), recompute_granularity="selective", use_reentrant=True)


@pytest.mark.parametrize(
    ("recompute", "offload", "expected"),
    [
        ((), ("blocks.0.attn1", "blocks.0.attn2"), ("blocks.0.attn1", "blocks.0.attn2")),
        (
            ("blocks.0",),
            ("blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1"),
            ("blocks.0", "blocks.1.attn1"),
        ),
        (("blocks.0.ffn",), ("blocks.0",), ("blocks.0",)),
        (("blocks.0.attn1",), ("blocks.0.attn1",), ("blocks.0.attn1",)),
        (("blocks.1",), ("blocks.1.ffn", "blocks.10.ffn"), ("blocks.1", "blocks.10.ffn")),
        ((), (), ()),
    ],
)
def test_what_is_offloaded_with_recomputed_modules(recompute, offload, expected):
    assert offloaded_modules(plan(recompute, offload_activations=offload)) == expected


def test_wrappers_keep_every_name_and_say_once_that_a_cpu_does_not_offload(caplog):
    model = built(WAN)
    names = [name for name, _ in model.named_parameters()]
    with caplog.at_level(logging.INFO):
        wrapped(
            model,
            ("blocks.0", "blocks.1.ffn"),
            offload_activations=("blocks.0.attn1", "blocks.1", "blocks.2.attn1"),
        )
    assert caplog.text.count("offload_activations has no effect on a CPU") == 1
    assert isinstance(model.blocks[0], OffloadWrapper)
    assert isinstance(model.blocks[0]._checkpoint_wrapped_module, RecomputeWrapper)
    assert [bare_name(name) for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(built(WAN).state_dict())
    model.load_state_dict(built(WAN).state_dict())
    plain = built(WAN)
    expected = gradients(plain, lambda: WAN.loss(plain, 0)[0])
    assert_same(gradients(model, lambda: WAN.loss(model, 0)[0]), expected)
