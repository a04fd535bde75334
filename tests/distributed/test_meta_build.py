"""A model that is built on the meta device: what it costs to fill it, and what it holds afterwards."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.planning.live_bytes import LiveBytes
from mm_core.weights import load_hf_folder, materialize
from mm_core.weights.tensors import local_part, state_tensors
from tests.distributed.harness import run_ranks
from tests.distributed.models import MODELS, Composite, TinyModel, optimizer_of

pytestmark = pytest.mark.timeout(120)
every_model = pytest.mark.parametrize("name", list(MODELS))


def _filled(model: TinyModel, seed: int = 0, **fsdp2: Any) -> Composite:
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(composite.predictor, "cpu", seed)
    return composite


def _whole(composite: Composite) -> dict[str, Any]:
    tensors = {**state_tensors(composite.predictor), **dict(composite.predictor.named_buffers())}
    return {
        name: (t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()).numpy()
        for name, t in tensors.items()
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@every_model
def test_a_rank_never_holds_more_than_its_shards_and_one_unit(name):
    def build() -> tuple[int, int, int, int, bool]:
        composite = MODELS[name].composite()
        composite.fully_shard(None, Fsdp2Config())
        with LiveBytes() as memory:
            materialize(composite.predictor, "cpu", 0)
            peak, left = memory.peak, memory.now
        # FSDP2 pads shards to the length of the longest.
        shards = sum(local_part(p)[0].untyped_storage().nbytes() for p in composite.predictor.parameters())
        shards += sum(b.nbytes for b in composite.predictor.buffers())
        plan = composite.sharding_plans["predictor"]
        units = [unit.numel * 4 for unit in (*plan.units, plan.root)]
        return peak, left, shards, max(units), peak < sum(units)

    for peak, left, shards, unit, less_than_all in run_ranks(build, 2):
        assert left == shards
        assert shards < peak <= shards + unit
        assert less_than_all


@pytest.mark.parametrize(
    ("name", "world", "fsdp2"),
    [
        ("wan", 2, {}),
        ("wan", 4, {"sharding_size": 2}),
        ("dense", 2, {"align_fsdp_param_groups": True}),
        pytest.param("dense", 4, {"offload_to_cpu": True}, marks=pytest.mark.slow),
        ("moe", 2, {"expert_parallel_size": 2}),
        ("moe", 4, {"expert_parallel_size": 2}),
        pytest.param("moe", 4, {"expert_parallel_size": 4}, marks=pytest.mark.slow),
        pytest.param("moe", 4, {"expert_parallel_size": 2, "sharding_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_same_seed_gives_the_same_whole_tensors_on_any_number_of_ranks(name, world, fsdp2):
    def build(seed: int, **fsdp2: Any) -> dict[str, Any]:
        return _whole(_filled(MODELS[name], seed, **fsdp2))

    one = run_ranks(build, 1, 0)[0]
    for values in run_ranks(build, world, 0, **fsdp2):
        assert _same(values, one)
    assert not _same(run_ranks(build, 1, 1)[0], one)


@every_model
def test_no_two_tensors_begin_alike_and_all_begin_as_the_constructor_has_them(name):
    values = run_ranks(lambda: _whole(_filled(MODELS[name])), 2)[1]
    torch.manual_seed(0)
    constructed = MODELS[name].build("cpu")
    expected = {
        n: t.numpy() for n, t in {**constructed.state_dict(), **dict(constructed.named_buffers())}.items()
    }
    assert values.keys() == expected.keys()
    drawn = set()
    for key, value in expected.items():
        assert (values[key].shape, values[key].dtype) == (value.shape, value.dtype)
        if value.std() == 0 or "freq" in key:
            assert np.array_equal(values[key], value), key
        else:
            assert values[key].std() == pytest.approx(value.std(), rel=5 / value.size**0.5), key
            drawn.add(values[key].ravel()[:4].tobytes())
    tied = name == "dense"
    assert len(drawn) == sum(v.std() > 0 and "freq" not in k for k, v in expected.items()) - tied


def test_tied_weights_stay_one_parameter_through_training():
    def look() -> tuple[bool, bool, int, bool]:
        model = MODELS["dense"]
        composite = _filled(model)
        predictor = composite.predictor
        optimizer = optimizer_of(predictor, lr=1e-2)
        loss, _ = model.loss(predictor, 0, dist.get_rank(), dist.get_world_size())
        loss.backward()
        optimizer.step()
        values = _whole(composite)
        return (
            predictor.lm_head.weight is predictor.model.embed_tokens.weight,
            "lm_head.weight" in dict(predictor.named_parameters()),
            sum(p.numel() for p in predictor.parameters()),
            np.array_equal(values["lm_head.weight"], values["model.embed_tokens.weight"]),
        )

    parameters = sum(p.numel() for p in MODELS["dense"].build().parameters())
    assert run_ranks(look, 2) == [(True, False, parameters, True)] * 2


@every_model
@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_are_loaded_afterwards_give_the_outputs_of_a_normal_build(name, world, tmp_path):
    model = MODELS[name]
    torch.manual_seed(5)
    upstream: Any = model.build("cpu").eval()
    # The names of the model's own state; hub folders of experts have others, which an adapter translates.
    upstream.save_pretrained(tmp_path, **({"save_original_format": False} if name == "moe" else {}))
    with torch.no_grad():
        expected = model.losses(upstream, model.batch(3))[0].numpy()

    def load() -> tuple[Any, bool]:
        composite = model.composite()
        composite.fully_shard(None, Fsdp2Config())
        materialize(composite.predictor, "cpu", 0, random_init=False)
        load_hf_folder(composite.predictor, tmp_path)
        composite.eval()
        with torch.no_grad():
            losses = model.losses(composite.predictor, model.batch(3))[0]
        buffers = dict(upstream.named_buffers())
        same = all(torch.equal(b, buffers[n]) for n, b in composite.predictor.named_buffers())
        return losses.numpy(), same

    for losses, buffers_are_right in run_ranks(load, world):
        assert buffers_are_right
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
