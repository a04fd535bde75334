"""One micro batch of a model on fake tensors: what its units compute, keep and need, without computing or allocating it.

The root runs once, with all that it does between its units; of the units, one of each kind runs, alone, and the others
repeat what it did (`mm_core.planning.replay`). So a model of a hundred blocks is traced in the time of one block.
Everything runs as on a CPU, whose attention kernel keeps what flash attention keeps on a device: queries, keys, values,
the result and its log-sum-exp.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mm_core.planning.model import Flops, UnitCost
from mm_core.planning.recorder import Recorder, Segment
from mm_core.planning.replay import Replayer, mark_gradients
from mm_core.sharding.activations import RecomputeWrapper
from mm_core.sharding.apply import prepare_modules
from mm_core.sharding.grouped import even_load
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.plan import ALIGNED, ShardingPlan, bare_name, is_inside

Forward = Callable[[nn.Module, Any], Sequence[Any]]


@dataclass(frozen=True)
class Trace:
    """One micro batch on one rank.

    Args:
        segments: of the whole micro batch, in order; paths are relative to the root.
        units: costs of each kind of unit, the root last.
        numel: elements of each parameter that this rank computes with, by bare name: fewer than the whole where experts
            or tensor parallelism give it a part.
        held: bytes of frozen parameters and buffers outside the plan.
    """

    segments: tuple[Segment, ...]
    units: tuple[UnitCost, ...]
    numel: dict[str, int]
    held: int


def trace_micro_batch(
    root: nn.Module,
    plan: ShardingPlan,
    mesh: DeviceMesh,
    forward: Forward,
    *,
    prepare: Callable[[], Any] | None = None,
    others: Iterable[nn.Module] = (),
    parallel: ParallelMesh | None = None,
) -> Trace:
    """Trace forward, loss and backward of one micro batch.

    Args:
        root: the module that the plan was built from, on the meta device. It is used up: its parameters become fake
            tensors, and its units stand-ins.
        plan: of the root.
        mesh: that it is sharded over; of a fake process group, if nobody else is there.
        forward: `(root, inputs) -> (loss, …)`: the loss (0-d), and whatever else is held during the backward pass.
        prepare: makes the inputs; without it they are None. It runs without gradients.
        others: frozen modules on the meta device that `prepare` uses.
        parallel: the mesh of which `mesh` is a part.
    """
    modules, experts = prepare_modules(root, plan, mesh, parallel)
    numel: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), even_load(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(view tensor|torch.utils.checkpoint).*")
        held = sum(_fill(module, None, {}) for module in others)
        owners = {p.name: unit.path for unit in (*plan.units, plan.root) for p in unit.parameters}
        held += _fill(root, plan, numel)
        tensors = [t for module in (root, *others) for t in (*module.parameters(), *module.buffers())]
        recorder = Recorder([_local(t) for t in tensors], _group_names(parallel, experts))
        _watch_gradients(root, owners, recorder)
        replayer = Replayer(recorder)
        outermost = _hook(root, plan, modules, replayer)
        if parallel is not None and parallel.tp is not None:
            # DTensor runs an operation on whole tensors when it meets it for the first time, to know the result's shape.
            _run(root, recorder, forward, prepare)
            gc.collect()
            recorder.restart()
            replayer.forget()
        segments = _run(root, recorder, forward, prepare)
    units = _costs(plan, numel, replayer, segments, outermost)
    return Trace(tuple(segments), units, numel, held)


def _run(
    root: nn.Module, recorder: Recorder, forward: Forward, prepare: Callable[[], Any] | None
) -> list[Segment]:
    with recorder:
        inputs = None
        if prepare is not None:
            with torch.no_grad():
                inputs = prepare()
        recorder.mark("", "mark")
        recorder.phase = "forward"
        kept = forward(root, inputs)
        recorder.mark("", "mark")
        recorder.phase = "backward"
        kept[0].backward()
        recorder.mark("", "mark")
    return recorder.segments


def _fill(module: nn.Module, plan: ShardingPlan | None, numel: dict[str, int]) -> int:
    """Put fake tensors in the place of those on the meta device, parameters in the dtype of compute.

    Returns:
        Bytes of what the plan does not shard: buffers and ignored modules; without a plan, everything.
    """
    made: dict[int, torch.Tensor] = {}
    ignored = set(plan.ignored_parameters) if plan is not None else set()
    held = 0
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            bare = bare_name(f"{path}.{name}" if path else name)
            if id(parameter) not in made:
                own = plan is None or bare in ignored
                dtype = None if own or plan is None else plan.param_dtype
                made[id(parameter)] = filled = _fake_parameter(parameter, dtype)
                numel[bare] = _local_numel(filled)
                held += _local_numel(filled) * filled.itemsize if own else 0
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")
                held += buffer.nbytes
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(part, name, torch.empty_like(value, device="cpu"))
    return held


def _fake_parameter(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    dtype = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    if isinstance(parameter, DTensor):
        local = torch.empty(parameter.to_local().shape, dtype=dtype, device="cpu")
        value: torch.Tensor = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    else:
        value = torch.empty(parameter.shape, dtype=dtype, device="cpu")
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _group_names(parallel: ParallelMesh | None, experts: DeviceMesh | None) -> dict[str, str]:
    """Name of each process group that modules use themselves -> dimension of the mesh."""
    meshes = {"ep": None if experts is None else experts["ep"]}
    if parallel is not None:
        meshes |= {"cp": parallel.cp, "tp": parallel.tp}
    return {mesh.get_group().group_name: name for name, mesh in meshes.items() if mesh is not None}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_numel(tensor: torch.Tensor) -> int:
    return _local(tensor).numel()


def _watch_gradients(root: nn.Module, owners: dict[str, str], recorder: Recorder) -> None:
    """Note each parameter's gradient when it comes, and let go of it: what waits for its reduction is counted by unit."""

    def watch(name: str, parameter: nn.Parameter) -> None:
        def come(p: torch.Tensor) -> None:
            recorder.add_gradient(owners.get(name, ""), _local_numel(p) * p.itemsize, name)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(come)

    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            watch(bare_name(name), parameter)


def _hook(
    root: nn.Module, plan: ShardingPlan, modules: dict[str, nn.Module], replayer: Replayer
) -> list[str]:
    """Let outermost units be replayed, and mark where the root and units inside units begin and end.

    Returns:
        The outermost units.
    """
    recorder = replayer.recorder
    paths = [unit.path for unit in plan.units if unit.path != ALIGNED]
    outermost = [path for path in paths if not any(path != o and is_inside(path, o) for o in paths)]
    for wrapper in root.modules():
        if isinstance(wrapper, RecomputeWrapper):
            _mark_recomputation(wrapper, recorder)
    for path in ["", *(p for p in paths if p not in outermost)]:
        _mark_passes(path, modules[path] if path else root, recorder)
    for path in outermost:
        replayer.stand_in(path, modules[path])
    return outermost


def _mark_passes(path: str, module: nn.Module, recorder: Recorder) -> None:
    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        recorder.mark(path, "enter")
        return mark_gradients(recorder, path, "end", (args, kwargs)) if path else None

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        recorder.mark(path, "leave")
        if not path and recorder.phase == "forward":
            recorder.phase = "loss"
        return mark_gradients(recorder, path, "begin", output)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def _mark_recomputation(wrapper: RecomputeWrapper, recorder: Recorder) -> None:
    """Mark the second run of what is recomputed; it may end early, by an exception of torch's own."""
    inner = wrapper._checkpoint_wrapped_module

    def enter(_: nn.Module, args: Any) -> None:
        if recorder.phase == "backward":
            recorder.mark("", "recompute")

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        if recorder.phase == "backward":
            recorder.mark("", "recomputed")

    inner.register_forward_pre_hook(enter, prepend=True)
    inner.register_forward_hook(leave, always_call=True)


def _costs(
    plan: ShardingPlan,
    numel: dict[str, int],
    replayer: Replayer,
    segments: Sequence[Segment],
    outermost: Sequence[str],
) -> tuple[UnitCost, ...]:
    trainable = {p.name for unit in (*plan.units, plan.root) for p in unit.parameters if p.trainable}
    names: Counter[str] = Counter()
    costs: list[UnitCost] = []
    for record, paths in replayer.uses.values():
        kind = record.kind
        names[kind] += 1
        own = [name for name in numel if is_inside(name, record.path)]
        cost = UnitCost(
            kind=kind if names[kind] == 1 else f"{kind}#{names[kind]}",
            paths=tuple(paths),
            parameter_numel=sum(numel[name] for name in own),
            trainable_numel=sum(numel[name] for name in own if name in trainable),
            flops=_flops(record.forward, record.backward),
            saved_bytes=record.saved,
            transient_bytes=_transient(record.forward, 0),
            backward_transient_bytes=_transient(record.backward, 0),
            input_bytes=record.input_bytes,
            output_bytes=record.output_bytes,
            moved_bytes=sum(s.moved for s in (*record.forward, *record.backward)),
            collectives=_sum(s.sent for s in (*record.forward, *record.backward)),
            calls=_sum(s.calls for s in (*record.forward, *record.backward)),
        )
        costs.append(cost)
    order = {path: i for i, path in enumerate(outermost)}
    costs.sort(key=lambda cost: order.get(cost.path, -1))
    return (*costs, _root_cost(plan, numel, trainable, segments, costs))


def _root_cost(
    plan: ShardingPlan,
    numel: dict[str, int],
    trainable: set[str],
    segments: Sequence[Segment],
    inside: Sequence[UnitCost],
) -> UnitCost:
    forward = [s for s in segments if s.phase != "backward"]
    backward = [s for s in segments if s.phase == "backward"]
    whole = _flops(forward, backward)
    units = Flops()
    sent, calls = _sum(s.sent for s in segments), _sum(s.calls for s in segments)
    for cost in inside:
        units = units + cost.flops.times(cost.count)
        sent.subtract({key: size * cost.count for key, size in cost.collectives.items()})
        calls.subtract({key: number * cost.count for key, number in cost.calls.items()})
    saved = sum(cost.saved_bytes * cost.count for cost in inside)
    own = [name for name in numel if any(p.name == name for p in plan.root.parameters)]
    end = forward[-1].live if forward else 0
    begin = next((s.live for s in segments if s.boundary == "enter" and not s.unit), 0)
    return UnitCost(
        kind="(root)",
        paths=("",),
        parameter_numel=sum(numel[name] for name in own),
        trainable_numel=sum(numel[name] for name in own if name in trainable),
        flops=Flops(*(getattr(whole, f.name) - getattr(units, f.name) for f in fields(Flops))),
        saved_bytes=max(0, end - begin - saved),
        transient_bytes=0,
        backward_transient_bytes=0,
        input_bytes=begin,
        output_bytes=0,
        moved_bytes=sum(s.moved for s in segments) - sum(cost.moved_bytes * cost.count for cost in inside),
        collectives=+sent,
        calls=+calls,
    )


def _flops(forward: Sequence[Segment], backward: Sequence[Segment]) -> Flops:
    found = Flops(
        forward=sum(s.flops for s in forward), attention_forward=sum(s.attention_flops for s in forward)
    )
    again = 0  # how deep in recomputations the segment lies
    for s in backward:
        deeper = again
        if s.boundary == "recompute":
            again += 1
        elif s.boundary == "recomputed":
            again -= 1
        if deeper:
            found = replace(
                found,
                recompute=found.recompute + s.flops,
                attention_recompute=found.attention_recompute + s.attention_flops,
            )
        else:
            found = replace(
                found,
                backward=found.backward + s.flops,
                attention_backward=found.attention_backward + s.attention_flops,
            )
    return found


def _transient(segments: Sequence[Segment], base: int) -> int:
    if not segments:
        return 0
    return max(0, max(s.peak for s in segments) - max(base, segments[-1].live))


def _sum(parts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
