"""Sums over ranks that work on the same tokens, with their gradients."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def summed(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum of the tensors of all ranks of a 1-D mesh, of one shape. Each rank is given the sum's gradient as its own
    tensor's: all go on with the same value, so it counts once.
    """
    parts = DTensor.from_local(tensor, mesh, [Partial()], run_check=False)
    return parts.redistribute(mesh, [Replicate()]).to_local()


def with_summed_gradient(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A tensor that is the same on all ranks of a 1-D mesh, each of which uses it for a part of the work: its gradient is
    the sum of theirs.
    """
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])
