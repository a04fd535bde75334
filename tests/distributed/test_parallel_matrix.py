"""A model that is shared by several ranks learns what it learns in one process, whatever the way to share it.

`make test` runs a few ways, in which each kind of parallelism stands beside FSDP2's; `make test-full` runs all.
"""

import numpy as np
import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.matrix import CLIP, VISION_LANGUAGE, Run, steps_of
from tests.distributed.parallel import KINDS, Way, initial, reference, train
from tests.distributed.test_parity_matrix import BOUNDS, relative_distance

pytestmark = pytest.mark.timeout(150)

FEW = (
    Way("wan", 4, cp=2, micro=2),
    Way("wan", 2, pp=2, micro=2),
    Way("wan-ti2v", 2, cp=2, micro=2),
    Way("dense", 4, tp=2),
    Way("moe", 4, cp=2, ep=2, algo="ring"),
    # images and videos
    Way("qwen3_vl", 4, cp=2, algo="ring", micro=2),
    Way("qwen3_vl_moe", 4, cp=2, ep=2, micro=1, recompute=True),
    Way("qwen3_vl", 2, tp=2),
)
REST = (
    # experts
    Way("moe", 2, ep=2),
    Way("moe", 4, ep=4, micro=2),
    Way("moe", 4, ep=2, micro=2),
    Way("moe", 4, ep=2, sharding=2, micro=2),
    Way("moe", 4, ep=2, cp=2, micro=1, recompute=True),
    # context
    Way("wan", 2, cp=2),
    Way("wan", 2, cp=2, algo="ring"),
    Way("wan", 4, cp=4, micro=8),
    Way("wan", 4, cp=4, algo="ring", micro=2),
    Way("wan", 4, cp=2, sharding=2, micro=2),
    Way("wan", 2, cp=2, recompute=True, dtype="bf16"),
    Way("dense", 2, cp=2),
    Way("dense", 4, cp=4, algo="ring"),
    Way("dense", 4, cp=2, algo="ring", micro=2, dtype="bf16"),
    # tensors
    Way("dense", 2, tp=2),
    Way("dense", 4, tp=2, sharding=1, micro=2),
    Way("dense", 4, tp=2, cp=2),
    Way("moe", 2, tp=2),
    Way("moe", 4, tp=2, ep=2),
    Way("dense", 4, tp=2, recompute=True, dtype="bf16"),
    # stages, with one micro batch (GPipe), several (1F1B), and parts that lie apart (Interleaved1F1B)
    Way("wan", 2, pp=2, micro=8),
    Way("wan", 2, pp=2, micro=1, layers=((1, 3),)),
    Way("wan", 4, pp=4, micro=2),
    Way("wan", 2, pp=2, vpp=2, micro=2),
    Way("wan", 4, pp=2, micro=2),
    Way("wan", 4, pp=2, micro=2, sharding=1),
    Way("wan", 4, pp=2, vpp=2, micro=1, recompute=True),
    Way("wan", 4, pp=2, micro=2, dtype="bf16"),
    Way("wan", 4, pp=2, cp=2, micro=2),
    # given frames
    Way("wan-ti2v", 2, pp=2, micro=2),
    Way("wan-ti2v", 4, pp=2, cp=2, micro=2),
    Way("wan-flf2v", 2, micro=2),
    Way("wan-flf2v", 4, cp=2, algo="ring", micro=2),
    Way("wan-flf2v", 2, pp=2, micro=2),
    # images and videos
    *(
        way
        for name in VISION_LANGUAGE
        for way in (
            Way(name, 2, cp=2),
            Way(name, 2, cp=2, algo="ring", micro=1, recompute=True),
            Way(name, 4, cp=4, micro=8),
            Way(name, 4, cp=4, algo="ring", micro=2),
            Way(name, 4, cp=2, sharding=2, micro=1),
            Way(name, 4, cp=2, micro=2, dtype="bf16"),
            Way(name, 4, tp=2, micro=1),
            Way(name, 4, tp=2, sharding=1, micro=2, recompute=True),
            Way(name, 4, tp=2, cp=2, algo="ring", micro=2),
            Way(name, 4, tp=2, micro=2, dtype="bf16"),
        )
    ),
    Way("qwen3_vl_moe", 2, ep=2, micro=1),
    Way("qwen3_vl_moe", 4, ep=4, micro=1),
    Way("qwen3_vl_moe", 4, ep=2, sharding=2, micro=1),
    Way("qwen3_vl_moe", 4, ep=2, tp=2, micro=2),
    Way("qwen3_vl_moe", 4, ep=2, cp=2, algo="ring", micro=1),
    Way("qwen3_vl_moe", 2, tp=2),
)  # fmt: skip


def must_agree(way: Way) -> None:
    got: Run = run_ranks(train, way.ranks, way, timeout=120)[0]
    expected = reference(way.model)
    losses, norms, weights = BOUNDS[way.dtype]
    np.testing.assert_allclose(got.losses, expected.losses, rtol=losses)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=norms)
    assert relative_distance(got.weights, expected.weights) <= weights
    if way.dtype == "bf16":
        assert got.losses != expected.losses  # it did compute in bf16


@pytest.mark.parametrize("way", FEW, ids=str)
def test_parity(way):
    must_agree(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", REST, ids=str)
def test_parity_of_every_way(way):
    must_agree(way)


@pytest.mark.parametrize("name", [*KINDS, *VISION_LANGUAGE])
def test_the_bounds_are_far_below_what_training_changes(name):
    run = reference(name)
    start = {key: value.numpy() for key, value in initial(name).state_dict().items()}
    moved = relative_distance(run.weights, start)
    assert moved > 100 * BOUNDS["fp32"][2]
    assert min(run.norms) > CLIP  # clipping has something to do
    assert len(run.losses) == steps_of(name)
