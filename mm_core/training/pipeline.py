"""One optimizer step of a model whose stages lie on several ranks, by the schedules of `torch.distributed.pipelining`.

Every stage prepares the inputs of every micro batch for itself: they are keyed by sample, so that all stages have the
same ones, and what is sent from rank to rank is only what the model computes. The last stage has the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from mm_core.config.pipeline_stages import idle_share, schedule_name
from mm_core.sharding.context import context_of
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.participation import participation_of
from mm_core.sharding.pipeline import StageCall, StagePart, stages_of
from mm_core.sharding.plan import ShardingError
from mm_core.training.step import GradientExchange
from mm_core.training.sums import StepSums
from mm_core.training.tasks.base import Task
from mm_registry.errors import UserError

_SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
}
_Boundary = tuple[torch.Tensor, ...]


class PipelineStep:
    """Forward and backward of all micro batches of an optimizer step, on this rank's stages.

    Args:
        model: after `fully_shard` with pipeline stages.
        task: what calls the model, and makes losses of its output.
        mesh: of the model; its `pp` is there.
        accumulation: micro batches of a step.
        device: what this rank computes on.
        exchange: told of the last micro batch, if gradients are exchanged in part before.

    Raises:
        ShardingError: the model has several parts that are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        mesh: ParallelMesh,
        accumulation: int,
        device: torch.device,
        exchange: GradientExchange | None = None,
    ) -> None:
        plans: Any = model.sharding_plans
        if len(plans) != 1:
            raise ShardingError(
                f"--pipeline-model-parallel-size {mesh.sizes.pp} cuts one network into stages, but the model trains "
                f"{' and '.join(plans)}; train one of them."
            )
        self.model, self.task, self.mesh, self.device = model, task, mesh, device
        self.accumulation, self.exchange = accumulation, exchange
        self.path, plan = next(iter(plans.items()))
        self.root: Any = model.get_submodule(self.path)
        self.dtype = plan.param_dtype or next(self.root.parameters()).dtype
        stages = stages_of(self.root)
        assert stages is not None, "fully_shard cuts a model for a mesh with stages"
        self.parts = stages.parts
        self.participation = participation_of(self.root)
        # Ranks that share a sequence each send their own tokens, to the rank with the same ones.
        context = context_of(self.root)
        self._ask: dict[str, Any] = {"dtype": self.dtype}
        if context is not None:
            self._ask["share"] = lambda length: context.layout_of(length).sizes[context.rank]
        self._schedule: Any = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] | None = None
        self._boundary: _Boundary = ()
        # Of the step that is under way:
        self._inputs: list[Any] = []
        self._sums: StepSums | None = None

    def run(self, inputs: Iterable[Any], sums: StepSums) -> None:
        """Run all micro batches, backward included; gradients are sums over them.

        Args:
            inputs: from `task.prepare`, the same on every stage.
            sums: of the step; the last stage adds to it.

        Raises:
            ShardingError: micro batches of one step differ in shape.
            UserError: what the model says of its inputs.
        """
        self._inputs, self._sums = list(inputs), sums
        assert len(self._inputs) == self.accumulation, (
            f"{len(self._inputs)} of {self.accumulation} micro batches"
        )
        self._fit_shapes()
        # Torch deals its arguments out to the micro batches: the number of each is all that a stage needs, and the loss
        # is a part of the last stage.
        numbers = torch.arange(self.accumulation)
        target = numbers if self.parts[-1].last else None
        try:
            self._schedule.step(target=target, return_outputs=False, micro=numbers)
        except RuntimeError as error:
            # Torch puts what a stage raises in an error of its own.
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        finally:
            self._inputs, self._sums = [], None

    def __str__(self) -> str:
        name = schedule_name(self.accumulation, self.mesh.sizes)
        share = idle_share(self.accumulation, self.mesh.sizes)
        parts = ", ".join(
            f"{part.index} (blocks {part.blocks[0]} to {part.blocks[-1]})" for part in self.parts
        )
        return (
            f"stage{'s' if len(self.parts) > 1 else ''} {parts} of {self.parts[0].count}; {name} over {self.accumulation} "
            f"micro batch{'es' if self.accumulation > 1 else ''}, in which a rank waits {share:.0%} of the time if stages "
            "take equally long"
        )

    # -- what is sent --------------------------------------------------------------------------------------------------

    def _fit_shapes(self) -> None:
        """Make the schedule anew when the shapes of the micro batches change: its buffers have them."""
        boundaries = [self.boundary_of(inputs) for inputs in self._inputs]
        shapes = [[(t.shape, t.dtype) for t in boundary] for boundary in boundaries]
        for number, other in enumerate(shapes[1:], start=2):
            if other != shapes[0]:
                shown = [" and ".join(str(tuple(shape)) for shape, _ in one) for one in (other, shapes[0])]
                raise ShardingError(
                    f"pipeline stages exchange tensors of one size in a step, but micro batch {number} makes {shown[0]} and "
                    f"the first one {shown[1]}; let all samples have one size."
                )
        if shapes[0] == self._shapes:
            return
        self._boundary, self._shapes = boundaries[0], shapes[0]
        stages = [self._stage(part) for part in self.parts]
        name = schedule_name(self.accumulation, self.mesh.sizes)
        self._schedule = _SCHEDULES[name](
            stages if name == "Interleaved1F1B" else stages[0],
            n_microbatches=self.accumulation,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def boundary_of(self, inputs: Any) -> _Boundary:
        """What travels between stages with this micro batch: tensors of the meta device."""
        ask = partial(self.root.stage_boundary, **self._ask)
        found: _Boundary = self.task.forward(_with(self.model, self.path, ask), inputs)
        return tuple(t.requires_grad_(t.is_floating_point()) for t in found)

    def _stage(self, part: StagePart) -> PipelineStage:
        loss = torch.empty((), device="meta", requires_grad=True)
        return _Stage(
            _Body(partial(self._run, part)),
            part.index,
            part.count,
            self.device,
            # Known shapes spare a trial run of the whole model.
            input_args=() if part.first else self._boundary,
            output_args=(loss,) if part.last else self._boundary,
            group=self.mesh.pp_group,
            before_backward=self._before_backward,
        )

    # -- what a stage does ---------------------------------------------------------------------------------------------

    def _run(self, part: StagePart, received: _Boundary, micro: int) -> Any:
        """One micro batch through one stage: what travels on, or the summed loss."""
        inputs = self._inputs[micro]
        outputs = self.forward_part(part, received, inputs)
        if part is self.parts[-1]:
            self._inputs[micro] = None
        if not part.last:
            return self._travelling(outputs)
        losses, weights, metrics = self.task.loss(outputs, inputs)
        assert self._sums is not None
        self._sums.add(losses, weights, metrics, self.task.tokens(inputs))
        return losses.sum()

    def forward_part(self, part: StagePart, received: _Boundary, inputs: Any) -> Any:
        """Run one of this rank's stages: the last one returns what the model does, others what travels on."""
        if self.participation is not None:
            self.participation.absent = part.absent
        call = StageCall(part.first, part.last, part.blocks, received)
        return self.task.forward(_with(self.model, self.path, partial(self.root, stage=call)), inputs)

    def _travelling(self, outputs: _Boundary) -> _Boundary:
        shapes = [tuple(t.shape) for t in outputs]
        expected = [tuple(t.shape) for t in self._boundary]
        assert shapes == expected, f"a stage made {shapes}, but stage_boundary says {expected}"
        sent = tuple(t.to(like.dtype).contiguous() for t, like in zip(outputs, self._boundary, strict=True))
        if any(t.requires_grad for t in sent):
            return sent
        # Nothing before here is trained, but the stages behind send gradients, and autograd wants something to do.
        return tuple(t.detach().requires_grad_(t.is_floating_point()) for t in sent)

    def _before_backward(self, last: bool) -> None:
        if self.exchange is not None:
            self.exchange.begin(self.accumulation - 1 if last else 0)


class _Body(nn.Module):
    """What torch calls a stage's module. It holds no module, so that torch leaves FSDP2 to its own hooks."""

    def __init__(self, run: Callable[[_Boundary, int], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *received: torch.Tensor, micro: torch.Tensor) -> Any:
        return self.run(received, int(micro))


class _Stage(PipelineStage):
    """Torch's stage, which has buffers for a micro batch only while it needs them; torch keeps them for all of them."""

    def __init__(self, *args: Any, before_backward: Callable[[bool], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before_backward = before_backward
        self._has_all_buffers = True  # torch has made them when the first message is to come

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._begin_without_buffers()
        _give_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        self._begin_without_buffers()
        if self.has_backward and not self.is_last:
            _give_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _take_buffers(self.args_recv_info[fwd_chunk_id])  # autograd keeps what it needs of them
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._before_backward(last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if not self.is_last:
            _take_buffers(self.grad_recv_info[bwd_chunk_id])

    def _begin_without_buffers(self) -> None:
        if self._has_all_buffers:
            self._has_all_buffers = False
            for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
                _take_buffers(infos)


def _give_buffers(infos: tuple[Any, ...], device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.buffer is None and info.tensor_meta is not None:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def _take_buffers(infos: tuple[Any, ...]) -> None:
    for info in infos:
        info.buffer = None


class _With:
    """The model as a task sees it, with another call in the place of the network that is trained."""

    def __init__(self, model: nn.Module, path: str, call: Callable[..., Any]) -> None:
        self._model, self._path, self._call = model, path, call

    def __getattr__(self, name: str) -> Any:
        return self._call if name == self._path else getattr(self._model, name)


def _with(model: nn.Module, path: str, call: Callable[..., Any]) -> Any:
    return _With(model, path, call) if path else call
