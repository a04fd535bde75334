"""One unit of each kind is run alone, on inputs of its own; all units of the kind then only repeat what it did.

Alone it can be told exactly what a unit keeps: inputs and outputs that nobody else holds are alive after its forward
pass only if its graph needs them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mm_core.planning.kinds import TensorSpec, constant_of, describe, structure_of, unwrapped
from mm_core.planning.recorder import Boundary, Recorder, Segment
from mm_core.sharding.plan import is_inside


@dataclass(frozen=True)
class Output:
    """A tensor among a unit's results: a new one, or one of its inputs handed on."""

    spec: TensorSpec
    of_input: int | None = None
    kept: bool = False


@dataclass
class UnitRecord:
    """What one unit did alone.

    Args:
        path: of the unit.
        kind: its class.
        forward, backward: segments, relative to what was alive when the pass began.
        saved: bytes that it keeps for its backward pass, without kept inputs and outputs.
        kept_inputs: which of its input tensors it keeps.
        results, structure: its outputs; leaves that are no tensors as they are.
        gradients: whether each input tensor gets a gradient.
        whole: whole gradients of parameters that it leaves, by unit.
        input_bytes, output_bytes: each storage once.
    """

    path: str
    kind: str
    structure: TreeSpec
    results: Sequence[Output | Any]
    forward: list[Segment] = field(default_factory=list)
    backward: list[Segment] = field(default_factory=list)
    saved: int = 0
    kept_inputs: tuple[bool, ...] = ()
    gradients: tuple[bool, ...] = ()
    whole: Mapping[str, int] = field(default_factory=dict)
    input_bytes: int = 0
    output_bytes: int = 0

    @property
    def has_graph(self) -> bool:
        """Whether a backward pass goes through it."""
        return any(
            isinstance(o, Output) and o.spec.requires_grad and o.of_input is None for o in self.results
        )


class Replayer:
    """Runs units by their records, and makes those that are missing.

    Args:
        recorder: of the step.

    Attributes:
        uses: how often each record was run, with the paths of the units.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.records: dict[Any, UnitRecord] = {}
        self.uses: dict[int, tuple[UnitRecord, list[str]]] = {}

    def forget(self) -> None:
        """Let units run alone anew."""
        self.records.clear()
        self.uses.clear()

    def stand_in(self, path: str, module: nn.Module) -> None:
        """Let a unit's forward be a replay, in place."""
        kind = structure_of(module)
        name = type(unwrapped(module)).__name__
        forward = module.forward

        def replay(*args: Any, **kwargs: Any) -> Any:
            return self.run(path, name, kind, forward, args, kwargs)

        module.forward = replay

    def run(
        self, path: str, name: str, kind: Any, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A unit's forward pass, by its record."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        specs = describe(tensors)
        constants = tuple(constant_of(leaf) for leaf in leaves if not isinstance(leaf, FakeTensor))
        key = (kind, str(spec), tuple(specs), constants, torch.is_grad_enabled())
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = self._record(path, name, forward, leaves, spec, specs)
        self.uses.setdefault(id(record), (record, []))[1].append(path)

        def here(unit: str) -> str:
            return path + unit[len(record.path) :] if is_inside(unit, record.path) else unit

        recorder = self.recorder
        recorder.mark("", "mark")
        base = recorder.live
        recorder.append(s.at(base, here, recorder.phase, recorder.whole) for s in record.forward)
        with recorder.paused():
            anchor = torch.zeros((), requires_grad=True) if record.has_graph else torch.zeros(())
            made = list(_Replay.apply(record, recorder, here, anchor, *tensors))
        results = []
        for result in record.results:
            if not isinstance(result, Output):
                results.append(result)
            elif result.of_input is not None:
                results.append(tensors[result.of_input])
            else:
                results.append(made.pop(0))
        recorder.append(())
        return tree_unflatten(results, record.structure)

    def _record(
        self,
        path: str,
        kind: str,
        forward: Callable[..., Any],
        leaves: list[Any],
        spec: TreeSpec,
        specs: list[TensorSpec],
    ) -> UnitRecord:
        recorder = self.recorder
        gc.collect()  # what dies in between would be counted as freed by the unit
        before = recorder.live
        with recorder.apart() as segments:
            head = _Fresh(specs)
            inputs = head.tensors()
            storages = [weakref.ref(t.untyped_storage()) for t in inputs]
            sizes = {s.storage: t.untyped_storage().nbytes() for s, t in zip(specs, inputs, strict=True)}
            base = recorder.live
            recorder.append(())
            recorder.mark(path, "enter")
            given = iter(inputs)
            args, kwargs = tree_unflatten(
                [next(given) if isinstance(leaf, FakeTensor) else leaf for leaf in leaves], spec
            )
            output = forward(*args, **kwargs)
            recorder.mark(path, "leave")
            record = UnitRecord(path, kind, *_results(output, inputs))
            record.forward = [s.at(-base) for s in segments]
            record.input_bytes = sum(sizes.values())
            new = [t for t in tree_flatten(output)[0] if isinstance(t, FakeTensor) and not _is_in(t, inputs)]
            output_storages = [weakref.ref(t.untyped_storage()) for t in new]
            output_sizes = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in new}
            record.output_bytes = sum(output_sizes.values())
            ends = [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
            tail = _Tail.apply(recorder, path, *ends) if record.has_graph else None
            del args, kwargs, output, inputs, given, ends, new, head.made
            gc.collect()
            record.kept_inputs = tuple(s() is not None for s in storages)
            alive = iter(s() is not None for s in output_storages)
            record.results = [
                Output(r.spec, None, next(alive)) if isinstance(r, Output) and r.of_input is None else r
                for r in record.results
            ]
            kept = sum(
                sizes[number]
                for number in {s.storage for s, ref in zip(specs, storages, strict=True) if ref() is not None}
            )
            kept += sum({id(s): s.nbytes() for ref in output_storages if (s := ref()) is not None}.values())
            record.saved = max(0, recorder.live - before - kept - (0 if tail is None else tail.nbytes))
            if tail is not None:
                segments.clear()
                recorder.phase = "backward"
                tail.backward()
                recorder.mark(path, "end")
                start = next(s.live for s in segments if s.boundary == "begin" and s.unit == path)
                first = next(i for i, s in enumerate(segments) if s.boundary == "begin" and s.unit == path)
                record.backward = [s.at(-start) for s in segments[first:]]
                record.whole = dict(recorder.whole)
            record.gradients = head.received(len(specs))
            del tail, head
            gc.collect()
        return record


class _Fresh:
    """Inputs of a unit that runs alone: tensors on storages of their own, of which nothing holds a reference."""

    def __init__(self, specs: list[TensorSpec]) -> None:
        self.specs = specs
        self.made: list[torch.Tensor] = []
        self.gradients: dict[int, torch.Tensor | None] = {}

    def tensors(self) -> list[torch.Tensor]:
        storages: dict[int, torch.Tensor] = {}
        made: list[torch.Tensor] = []
        same: dict[TensorSpec, torch.Tensor] = {}
        differentiated = [i for i, s in enumerate(self.specs) if s.requires_grad and self.specs.index(s) == i]
        anchor = torch.zeros((), requires_grad=True)
        leaves = iter(_Head.apply(self, differentiated, anchor) if differentiated else ())
        for i, spec in enumerate(self.specs):
            if spec in same:
                made.append(same[spec])
                continue
            if i in differentiated:
                tensor = next(leaves)
            else:
                known = storages.get(spec.storage)
                tensor = (
                    spec.make() if known is None else known.as_strided(spec.size, spec.stride, spec.offset)
                )
                storages.setdefault(spec.storage, tensor)
            same[spec] = tensor
            made.append(tensor)
        return made

    def received(self, count: int) -> tuple[bool, ...]:
        first = {spec: i for i, spec in reversed(list(enumerate(self.specs)))}
        return tuple(self.gradients.get(first[self.specs[i]]) is not None for i in range(count))


class _Head(torch.autograd.Function):
    """Makes tensors that need a gradient and are no leaves, so that they may be changed in place and do not stay alive."""

    @staticmethod
    def forward(ctx: Any, fresh: _Fresh, places: list[int], anchor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fresh, ctx.places = fresh, places
        return tuple(fresh.specs[i].make() for i in places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        ctx.fresh.gradients.update(zip(ctx.places, grads, strict=True))
        return None, None, None


class _Tail(torch.autograd.Function):
    """Ends a unit that runs alone: its backward pass gives the gradients of the unit's results."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, path: str, *ends: torch.Tensor) -> torch.Tensor:
        ctx.recorder, ctx.path, ctx.specs = recorder, path, describe(ends)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        made = tuple(spec.make() for spec in ctx.specs)
        ctx.recorder.mark(ctx.path, "begin")
        return None, None, *made


class _Replay(torch.autograd.Function):
    """A unit in the graph of the whole step: keeps as much as the unit does, and repeats its record in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        record: UnitRecord,
        recorder: Recorder,
        name: Callable[[str], str],
        anchor: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = [r for r in record.results if isinstance(r, Output) and r.of_input is None]
        made = tuple(output.spec.make() for output in outputs)
        ctx.mark_non_differentiable(
            *(t for t, o in zip(made, outputs, strict=True) if not o.spec.requires_grad)
        )
        ctx.record, ctx.recorder, ctx.name = record, recorder, name
        ctx.saved, ctx.specs = [], describe(inputs)
        if record.has_graph:
            # A view with the same storage, so that an output does not keep its own graph alive.
            ctx.saved = [t.detach() for t, kept in zip(inputs, record.kept_inputs, strict=True) if kept]
            ctx.saved += [t.detach() for t, o in zip(made, outputs, strict=True) if o.kept]
            ctx.saved.append(torch.empty(record.saved, dtype=torch.uint8))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        record, recorder = ctx.record, ctx.recorder
        recorder.mark("", "mark")
        recorder.append(s.at(recorder.live, ctx.name, "backward", recorder.whole) for s in record.backward)
        with recorder.paused():
            ctx.saved.clear()
            made = tuple(
                spec.make() if needed else None
                for spec, needed in zip(ctx.specs, record.gradients, strict=True)
            )
        for unit, size in record.whole.items():
            if not is_inside(unit, record.path):  # those of the unit are reduced by now
                recorder.add_gradient(ctx.name(unit), size)
        recorder.append(())
        return None, None, None, None, *made


class Mark(torch.autograd.Function):
    """Tensors as they are; their gradients' passing by is marked."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, path: str, boundary: Boundary, *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.place = recorder, path, boundary
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        recorder, path, boundary = ctx.place
        recorder.mark(path, boundary)
        if boundary == "end":
            recorder.reduced(path)
        return None, None, None, *grads


def mark_gradients(recorder: Recorder, path: str, boundary: Boundary, value: Any) -> Any:
    """Mark when the gradients of the tensors somewhere in `value` are there."""
    leaves, spec = tree_flatten(value)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not places or not torch.is_grad_enabled():
        return value
    for i, tensor in zip(
        places, Mark.apply(recorder, path, boundary, *(leaves[i] for i in places)), strict=True
    ):
        leaves[i] = tensor
    return tree_unflatten(leaves, spec)


def _is_in(tensor: torch.Tensor, tensors: Iterable[torch.Tensor]) -> bool:
    storage = tensor.untyped_storage()
    return any(storage is other.untyped_storage() for other in tensors)


def _results(output: Any, inputs: Sequence[torch.Tensor]) -> tuple[TreeSpec, list[Output | Any]]:
    leaves, structure = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    specs = iter(describe(tensors))
    results: list[Output | Any] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            results.append(leaf)
            continue
        spec = next(specs)
        place = next((i for i, t in enumerate(inputs) if t is leaf), None)
        results.append(Output(spec, place))
    return structure, results
