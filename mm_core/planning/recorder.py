"""What a step that runs on fake tensors would hold and compute: bytes that are alive, and FLOPs, between marks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

# To compute without memory there is no public way.
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mm_core.planning.model import Phase

Boundary = Literal["enter", "leave", "begin", "end", "recompute", "recomputed", "mark"]
"""A call of a unit starts and ends; its backward pass does; a recomputation does; or something else is over."""
_aten = torch.ops.aten
_OPEN = ("_peak", "_at_peak", "_flops", "_attention", "_moved", "_sent", "_calls")
"""Attributes of a recorder that count since the mark before."""
_COLLECTIVES = ("_c10d_functional", "c10d", "_c10d_functional_autograd")


@dataclass(frozen=True)
class Segment:
    """What happened since the mark before.

    Args:
        phase, unit, boundary: of the mark that ends it.
        peak: the most bytes of activations that were alive at once, whole gradients counted beside.
        whole: bytes of whole gradients at that moment, by the unit that owns their parameters.
        live: bytes of activations alive at its end.
        whole_after: whole gradients at its end.
        flops, attention_flops: computed in it.
        moved: bytes read and written by operations that are neither views nor counted as FLOPs.
        sent: bytes that are handed to collectives in it, by operation and group.
        calls: how often they are called.
    """

    phase: Phase
    unit: str
    boundary: Boundary
    peak: int
    whole: Mapping[str, int]
    live: int
    whole_after: Mapping[str, int]
    flops: int = 0
    attention_flops: int = 0
    moved: int = 0
    sent: Mapping[str, int] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def whole_after_total(self) -> int:
        """Bytes of all whole gradients at its end."""
        return sum(self.whole_after.values())

    def at(
        self,
        base: int,
        name: Callable[[str], str] = str,
        phase: Phase | None = None,
        beside: Mapping[str, int] | None = None,
    ) -> Segment:
        """The same at another place of the step: `base` bytes more are alive, units have other names, and gradients of
        others are there besides.
        """
        others = Counter(beside or {})
        return replace(
            self,
            phase=phase or self.phase,
            unit=name(self.unit),
            peak=self.peak + base,
            live=self.live + base,
            whole=others + Counter({name(unit): size for unit, size in self.whole.items()}),
            whole_after=others + Counter({name(unit): size for unit, size in self.whole_after.items()}),
        )


class Recorder(TorchDispatchMode):
    """Counts what operations on fake tensors allocate, as long as their storages live. Enter it inside a `FakeTensorMode`.

    What a kernel allocates and frees inside one operation is not seen.

    Args:
        ignored: tensors that do not count: parameters and buffers.
        groups: name of a process group -> what it is called; collectives of others do not count.

    Attributes:
        segments: so far.
        live: bytes alive.
        whole: bytes of whole gradients that wait for their reduction, by unit; see `add_gradient`.
        run: number of the recording that is under way; 0 is the step itself.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = (), groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.live = 0
        self.whole: Counter[str] = Counter()
        self.phase: Phase = "prepare"
        self.run = self._runs = 0
        self.noted: set[tuple[int, str]] = set()
        self._ignored = [tensor.untyped_storage() for tensor in ignored]
        self._known: dict[int, weakref.ref[Any] | None] = {id(storage): None for storage in self._ignored}
        self._formulas = _flop_formulas()
        self._groups = dict(groups or {})
        self._paused = False
        self._clear()

    def _clear(self) -> None:
        self._peak: int | None = None
        self._at_peak: tuple[int, dict[str, int]] = (0, {})
        self._flops = self._attention = self._moved = 0
        self._sent: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # its local tensors come by here
        kwargs = kwargs or {}
        if _has_values(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = _of_known_shape(func, args, kwargs)
        if result is None:
            result = func(*_with_known_shapes(func, args), **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf)
        if self._paused:
            return result
        packet = getattr(func, "_overloadpacket", func)
        formula = self._formulas.get(packet)
        if formula is not None:
            count = int(formula(*args, **kwargs, out_val=result))
            self._flops += count
            if "attention" in str(packet) or "attn" in str(packet):
                self._attention += count
        elif getattr(func, "namespace", "") in _COLLECTIVES:
            self._note_collective(func, args)
        elif _moves_memory(func):
            self._moved += _bytes_of((args, kwargs, result))
        self._look()
        return result

    def _watch(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # one object as long as the memory lives
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size

    def _look(self) -> None:
        total = self.live + self.whole.total()
        if self._peak is None or total > self._peak:
            self._peak, self._at_peak = total, (self.live, dict(self.whole))

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name: str = func._opname
        group = next((g for g in map(self._group, reversed(args)) if g is not None), None)
        if group is None or name.startswith("wait_tensor"):
            return
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        # Operations of c10d are given the output first, where it is another tensor than the input.
        source = tensors[-1:] if func.namespace == "c10d" else tensors[:1]
        key = f"{name.strip('_')} {group}"
        self._sent[key] += sum(t.numel() * t.itemsize for t in source)
        self._calls[key] += 1

    def _group(self, argument: Any) -> str | None:
        """What the group that an operation is given is called."""
        if isinstance(argument, torch.ScriptObject):  # a process group on its way through the dispatcher
            argument = dist.ProcessGroup.unbox(argument).group_name
        return self._groups.get(argument) if isinstance(argument, str) else None

    def mark(self, unit: str, boundary: Boundary) -> None:
        """End a segment here."""
        if self._paused:
            return
        self._look()
        peak, whole = self._at_peak
        self.segments.append(
            Segment(
                self.phase,
                unit,
                boundary,
                peak,
                whole,
                self.live,
                dict(self.whole),
                self._flops,
                self._attention,
                self._moved,
                dict(self._sent),
                dict(self._calls),
            )
        )
        self._clear()

    def append(self, segments: Iterable[Segment]) -> None:
        """Add segments that were recorded elsewhere; what comes next is counted anew."""
        self.segments += segments
        self._clear()

    def add_gradient(self, unit: str, size: int, name: str | None = None) -> None:
        """Whole gradients of a unit's parameters have come, of which nothing else counts.

        Args:
            name: of the one parameter that it is; it counts once in each recording.
        """
        if name is None or (self.run, name) not in self.noted:
            self.whole[unit] += size
            self.noted.add((self.run, name or ""))

    def restart(self) -> None:
        """Forget what was recorded; what is alive still counts."""
        self.segments = []
        self.whole.clear()
        self.noted.clear()
        self.phase = "prepare"
        self._clear()

    def reduced(self, unit: str) -> None:
        """The gradients of a unit are whole no more."""
        self.whole.pop(unit, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allocations inside count as alive, but make no peak."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def apart(self) -> Iterator[list[Segment]]:
        """Record into a list of its own, without the gradients that are there already."""
        outer, self.segments = self.segments, []
        self._runs += 1
        run, self.run = self.run, self._runs
        whole, self.whole = self.whole, Counter()
        phase, state = self.phase, {name: getattr(self, name) for name in _OPEN}
        self._clear()
        try:
            yield self.segments
        finally:
            self.segments, self.whole, self.phase, self.run = outer, whole, phase, run
            for name, value in state.items():
                setattr(self, name, value)


def _moves_memory(func: Any) -> bool:
    """Whether an operation reads or writes tensors: questions about them, views and memory without content do not."""
    name = getattr(func, "_opname", "")
    asks = getattr(func, "namespace", "") == "prim"
    return not (asks or getattr(func, "is_view", False) or "empty" in name or name == "_unsafe_view")


def _bytes_of(value: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _has_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is done for real: positions, and what follows from real tensors alone (grids of images,
    lengths), since shapes may follow from them.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not given:
        return func._opname == "arange" and all(isinstance(n, int) for n in args)
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in given)


def _with_known_shapes(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an operation with real masks in them as ones that say how large the result is."""
    if (
        func._opname.startswith(("index", "_index_put", "_unsafe_index"))
        and len(args) > 1
        and isinstance(args[1], list)
    ):
        indices: list[Any] = []
        for index in args[1]:
            with unset_fake_temporarily():
                indices += index.nonzero().unbind(1) if _is_real_mask(index) else [index]
        return args[0], indices, *args[2:]
    return args


def _of_known_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The result of an operation whose form on fake tensors is no help: it looks at values that are there, or asks
    for what kernels of some devices do not: bf16, and sides that are multiples of 16 bytes.
    """
    if func is _aten.masked_select.default and _is_real_mask(args[1]):
        with unset_fake_temporarily():
            count = int(args[1].expand(args[0].shape).sum())
        return torch.empty(count, dtype=args[0].dtype)
    if func is _aten._grouped_mm.default:
        a, b = args[:2]
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
        groups = []
        if a.dim() == b.dim():
            groups = list(a.shape[:1]) if a.dim() == 3 or offsets is None else [len(offsets)]
        return torch.empty(*groups, a.shape[-2], b.shape[-1], dtype=a.dtype)
    return None


def _is_real_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.dtype == torch.bool


def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """Those of torch's own counter, and of operations that it does not know."""
    known = FlopCounterMode(display=False).flop_registry
    extra: dict[Any, Any] = {}
    for name, like in (
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
        (
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_flash_attention_backward",
        ),
    ):
        packet = getattr(_aten, name)
        if packet not in known:
            extra[packet] = known[getattr(_aten, like)]
    grouped = getattr(_aten, "_grouped_mm", None)
    if grouped is not None and grouped not in known:
        extra[grouped] = _grouped_mm_flops
    return {**known, **extra}


def _grouped_mm_flops(a: Any, b: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """`[R, K] x [E, K, N]`, `[E, M, K] x [K, R]`, or `[M, R] x [R, N]` in groups: each row meets one group."""
    if a.dim() == 2 and b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    if a.dim() == 3 and b.dim() == 2:
        return 2 * a.shape[1] * a.shape[2] * b.shape[1]
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
