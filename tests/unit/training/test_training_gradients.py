"""`scale_and_clip` against scaling first and torch's `clip_grad_norm_` after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mm_core.training.gradients import scale_and_clip
from tests.distributed.harness import run_ranks

SHAPES = [(5, 3), (1,), (), (2, 3, 4), (7,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def expected(scale: float, max_norm: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The norm and the gradients, by torch's own function."""
    made = parameters()
    for parameter in made:
        assert parameter.grad is not None
        parameter.grad.mul_(scale)
    norm = nn.utils.clip_grad_norm_(made, max_norm if max_norm > 0 else float("inf"))
    return norm, [p.grad for p in made if p.grad is not None]


@pytest.mark.parametrize("scale", [1.0, 0.125, 8.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_unsharded(scale: float, max_norm: float) -> None:
    norm, grads = expected(scale, max_norm)
    made = parameters()
    without = nn.Parameter(torch.ones(3))
    got = scale_and_clip([*made, without], torch.tensor(scale), max_norm)
    torch.testing.assert_close(got, norm)
    for parameter, grad in zip(made, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert without.grad is None
    clipped = torch.stack([g.norm() for g in grads]).norm()
    assert clipped <= max(max_norm, 0.0) + 1e-5 or max_norm in (0.0, 1e6)


def test_the_norm_is_that_before_clipping_and_stays_fp32() -> None:
    made = parameters(torch.bfloat16)
    norm = scale_and_clip(made, torch.tensor(2.0), 0.1)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected(2.0, 0.1)[0].item(), rel=2e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in made)
    after = torch.stack([p.grad.float().norm() for p in made if p.grad is not None]).norm().item()
    assert after == pytest.approx(0.1, rel=2e-2)


def test_no_gradient_at_all() -> None:
    assert scale_and_clip([nn.Parameter(torch.ones(2))], torch.tensor(3.0), 1.0).item() == 0.0


def test_a_nan_is_not_hidden_by_clipping() -> None:
    made = parameters()
    assert made[0].grad is not None
    made[0].grad[0, 0] = float("nan")
    assert torch.isnan(scale_and_clip(made, torch.tensor(1.0), 1.0))


def sharded(scale: float, max_norm: float) -> list[Any]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    made = []
    for parameter in parameters():
        if parameter.ndim == 0:  # FSDP2 shards no scalars
            continue
        assert parameter.grad is not None
        split = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
        split.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
        made.append(split)
    norm = scale_and_clip(made, torch.tensor(scale), max_norm)
    assert not isinstance(norm, DTensor)
    whole = [norm, *(p.grad.full_tensor() for p in made if isinstance(p.grad, DTensor))]
    return [tensor.numpy() for tensor in whole]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_gradients_have_the_norm_of_the_whole(ranks: int) -> None:
    made = [p for p in parameters() if p.ndim]
    for parameter in made:
        assert parameter.grad is not None
        parameter.grad.mul_(0.25)
    norm = nn.utils.clip_grad_norm_(made, 0.5)
    for got in run_ranks(sharded, ranks, 0.25, 0.5):
        torch.testing.assert_close(torch.as_tensor(got[0]), norm)
        for grad, parameter in zip(got[1:], made, strict=True):
            torch.testing.assert_close(torch.from_numpy(grad), parameter.grad)
