"""Training a tiny model on the ranks of a test, to be compared with one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.weights import materialize
from mm_core.weights.tensors import named_parameters
from tests.distributed.models import TinyModel, optimizer_of

STEPS = 5


def train(model: TinyModel, steps: int = STEPS, **fsdp2: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of global batches and final weights."""
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    predictor = composite.predictor
    materialize(predictor, "cpu", 0)
    optimizer = optimizer_of(predictor)
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(steps):
        loss, weight = model.loss(predictor, step, rank, world)
        total = torch.stack([loss.detach(), weight])
        dist.all_reduce(total)
        (loss * world / total[1]).backward()  # FSDP2 takes the mean of the ranks' gradients
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total[0] / total[1]).item())
    return losses, {name: whole(p) for name, p in named_parameters(predictor)}


def gradients(model: TinyModel, micro_batches: int = 2, **fsdp2: Any) -> dict[str, Any]:
    """Whole gradients of a global batch in several micro batches."""
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    predictor = composite.predictor
    materialize(predictor, "cpu", 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    for micro in range(micro_batches):
        (model.loss(predictor, 0, rank, world, micro, micro_batches)[0] * world).backward()
    return {name: whole(p.grad) for name, p in named_parameters(predictor) if p.grad is not None}


def whole(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return tensor.numpy().copy()


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in a)
    return (difference / sum(float(np.square(b[name], dtype=np.float64).sum()) for name in b)) ** 0.5
