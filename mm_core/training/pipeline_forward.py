"""A forward pass through stages that lie on several ranks, without gradients: for validation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mm_core.training.pipeline import PipelineStep
from mm_core.training.tasks.base import LossParts, Task


class PipelineForward:
    """Sends each micro batch from stage to stage; a stage begins with the next one while the others still work.

    Micro batches may differ in shape. All ranks of the pipeline call it with the same ones, in the same order.

    Args:
        step: that of training, which has the stages.
        task: makes losses of what the last stage returns; it may have another seed than training's.
    """

    def __init__(self, step: PipelineStep, task: Task) -> None:
        self.step, self.task = step, task
        group = step.mesh.pp_group
        assert group is not None, "a pipeline has a group"
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)

    def __call__(self, inputs: Any) -> LossParts | None:
        """Run this rank's stages on one prepared micro batch; the last stage returns its losses, others None."""
        step, parts = self.step, None
        boundary = step.boundary_of(inputs)
        for part in step.parts:
            received: tuple[torch.Tensor, ...] = ()
            if not part.first:
                received = tuple(torch.empty(t.shape, dtype=t.dtype, device=step.device) for t in boundary)
                for tensor in received:
                    dist.recv(tensor, self._rank(part.index - 1), group=self.group)
            outputs = step.forward_part(part, received, inputs)
            if part.last:
                parts = self.task.loss(outputs, inputs)
                continue
            for tensor, like in zip(outputs, boundary, strict=True):
                sent = tensor.to(like.dtype).contiguous()
                dist.send(sent, self._rank(part.index + 1), group=self.group)
        return parts

    def _rank(self, stage: int) -> int:
        """Stages are dealt to the ranks in turn, as torch's interleaved schedules have it."""
        return self.ranks[stage % len(self.ranks)]
