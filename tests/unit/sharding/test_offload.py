"""Activations that wait in host memory: what is copied, how often, in which order, and when memory goes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm_core.accelerator import Accelerator
from mm_core.planning.live_bytes import LiveBytes
from mm_core.sharding.offload import MIN_BYTES, Offloader, OffloadWrapper

ROWS, WIDTH = 8, 16


def forced(min_bytes: int = 1) -> Offloader:
    """On the CPU, whose memory plays both parts."""
    return Offloader(Accelerator("cpu"), min_bytes=min_bytes, force=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * self.table + self.down(torch.nn.functional.gelu(self.up(x))) * scale


class Stack(nn.Module):
    def __init__(
        self, offloader: Offloader | None = None, depth: int = 4, block: type[nn.Module] = Block
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [block() for _ in range(depth)]
        self.blocks = nn.ModuleList([OffloadWrapper(b, offloader) for b in blocks] if offloader else blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.mean(1, keepdim=True).sigmoid()  # every block saves it
        for block in self.blocks:
            x = block(x, scale)
        return x


def device_bytes(model: nn.Module) -> LiveBytes:
    """Counts what a device would hold of activations: neither the model, nor copies on the host, which only
    `Accelerator.pinned_like` makes (by `empty_like`).
    """
    own = (*model.parameters(), *model.buffers())
    return LiveBytes(own, ignored_results={torch.ops.aten.empty_like.default})


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_are_equal_and_nothing_is_kept_afterwards():
    offloader = forced()
    model = Stack(offloader)
    for seed in range(3):
        assert same(gradients(model, batch(seed)), gradients(Stack(), batch(seed)))
    assert offloader.copies > 0
    assert not list(offloader._entries)
    assert not offloader._leaving
    assert not offloader._coming


@pytest.mark.parametrize("depth", [3, 8])
def test_after_the_forward_pass_the_device_holds_one_module_whatever_the_depth(depth):
    def alive(offloader: Offloader | None) -> int:
        model = Stack(offloader, depth)
        with device_bytes(model) as bytes_:
            loss = model(batch()).sum()
            found = bytes_.now
        loss.backward()
        return found

    # Of each block: its input, gelu's input and result, down's result; the scale is everybody's.
    block, rest = 4 * ROWS * (WIDTH + 2 * WIDTH + 2 * WIDTH + WIDTH), 4 * (ROWS + 1)
    assert alive(None) == depth * block + rest
    first_input = 4 * ROWS * WIDTH  # the graph keeps a leaf that wants a gradient
    assert alive(forced()) == block + rest + first_input


def test_every_tensor_is_copied_once_and_parameters_and_buffers_are_not():
    offloader = forced()
    model = Stack(offloader, depth=3)
    x = batch()
    loss = model(x).sum()
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    copied = list(offloader._entries.values())
    storages = {entry.storage.cdata for entry in copied}
    assert len(storages) == len(copied) == offloader.copies
    assert not any(e.on_device is not None and e.on_device.data_ptr() in parameters for e in copied)
    # Of each block: its input, gelu's input and result, down's result; the scale once for all.
    assert offloader.copied_bytes == 4 * (3 * ROWS * (WIDTH + 2 * WIDTH + 2 * WIDTH + WIDTH) + ROWS)
    loss.backward()


def test_backward_fetches_the_module_before_while_it_computes_this_one():
    class Told(Offloader):
        def _fetch(self, entries: Any) -> int:
            fetched = super()._fetch(entries)
            if fetched:
                order.append(f"fetch {fetched}")
            return fetched

    order: list[str] = []
    offloader = Told(Accelerator("cpu"), min_bytes=1, force=True)
    model = Stack(offloader, depth=4)
    x = batch()
    hidden = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, a, out, i=i: hidden.append((i, out)))
    loss = model(x).sum()
    for i, out in hidden:
        out.register_hook(lambda _, i=i: order.append(f"backward {i}"))
    hidden.clear()
    loss.backward()
    # The last block's tensors never left; block 2's come while block 3 computes, and so on.
    assert order == ["backward 3", "fetch 4", "backward 2", "fetch 4", "backward 1", "fetch 4", "backward 0"]
    assert offloader.fetched_ahead == offloader.fetches == 12


def test_views_of_one_storage_are_copied_once_with_their_strides():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

        def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # not contiguous
            seen.append([t.stride() for t in (q, k, v)])
            return Watch.apply(q.t(), k.expand(2, ROWS, WIDTH), v)

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(q, k, v)
            return q.t() * k[0] * v

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            q, k, v = ctx.saved_tensors
            back.append([t.stride() for t in (q, k, v)])
            return (grad * k[0] * v).t(), (grad * q.t() * v).expand(2, ROWS, WIDTH) / 2, grad * q.t() * k[0]

    seen: list[Any] = []
    back: list[Any] = []
    offloader = forced()
    found = gradients(Stack(offloader, 2, Attention), batch())
    assert back[0] == [(1, 3 * WIDTH), (0, 3 * WIDTH, 1), (3 * WIDTH, 1)]
    assert back[0] == back[1]
    assert offloader.copies == 2 * 2  # of each block: its input, and q, k and v together
    assert same(found, gradients(Stack(None, 2, Attention), batch()))


def test_a_small_part_of_a_large_tensor_is_copied_alone():
    class Slice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return x + (x.exp()[1, 2:4] * self.weight).sum()

    offloader = forced()
    found = gradients(Stack(offloader, 2, Slice), batch())
    assert same(found, gradients(Stack(None, 2, Slice), batch()))
    # The whole result of exp is saved by exp, and its slice is found in that copy.
    assert offloader.copied_bytes == 2 * 4 * ROWS * WIDTH

    class Detached(Slice):
        def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return x + (x.detach().exp()[1, 2:4] * self.weight).sum()

    offloader = forced()
    found = gradients(Stack(offloader, 2, Detached), batch())
    assert same(found, gradients(Stack(None, 2, Detached), batch()))
    assert offloader.copied_bytes == 2 * 4 * 2


def test_small_tensors_stay():
    offloader = Offloader(Accelerator("cpu"), force=True)
    assert ROWS * 2 * WIDTH * 4 < MIN_BYTES
    assert same(gradients(Stack(offloader), batch()), gradients(Stack(), batch()))
    assert offloader.copies == 0
    limit = forced(min_bytes=ROWS * 2 * WIDTH * 4)
    gradients(Stack(limit, 3), batch())
    assert limit.copies == 3 * 2  # of each block: gelu's input and result


def test_on_a_cpu_nothing_is_offloaded_without_force():
    offloader = Offloader(Accelerator("cpu"), min_bytes=1)
    assert same(gradients(Stack(offloader), batch()), gradients(Stack(), batch()))
    assert offloader.copies == 0


@pytest.mark.parametrize("min_bytes", [1, 10**9], ids=["offloaded", "kept"])
@pytest.mark.parametrize("saved_as", ["input", "result"])
def test_changing_a_saved_tensor_in_place_is_an_error_as_ever(min_bytes, saved_as):
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            hidden = x * 2
            result = (hidden * self.weight) if saved_as == "input" else (hidden * self.weight).sigmoid()
            (hidden if saved_as == "input" else result).add_(1)
            return result * 1

    for offloader in (None, forced(min_bytes)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(Stack(offloader, 3, Wrong), batch())


def test_a_tensor_saved_before_and_after_a_legal_change_is_copied_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            buffer = x.detach().clone()
            first = buffer * self.weight
            buffer = buffer.clone()
            buffer.add_(1)
            return first + buffer * self.weight + x

    assert same(gradients(Stack(forced(), 3, Twice), batch()), gradients(Stack(None, 3, Twice), batch()))


def test_the_graph_can_be_used_twice():
    offloader = forced()
    model = Stack(offloader)
    x = batch()
    loss = model(x).square().sum()
    wanted = [x, *model.parameters()]
    first = list(torch.autograd.grad(loss, wanted, retain_graph=True))
    assert same(first, list(torch.autograd.grad(loss, wanted)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_before_the_backward_passes(order):
    model = Stack(forced())
    inputs = [batch(seed) for seed in (1, 2)]
    losses = [model(x).square().sum() for x in inputs]
    found = {i: list(torch.autograd.grad(losses[i], [inputs[i], *model.parameters()])) for i in order}
    for i in order:
        assert same(found[i], gradients(Stack(), batch(i + 1)))


@pytest.mark.parametrize("min_bytes", [1, 10**9], ids=["offloaded", "kept"])
def test_a_graph_that_is_dropped_goes_without_the_garbage_collector(min_bytes):
    offloader = forced(min_bytes)
    model = Stack(offloader)
    gc.disable()
    try:
        with device_bytes(model) as bytes_:
            loss = model(batch()).sum()
            assert bytes_.now > 0
            del loss
            next_loss = Stack(offloader)(batch())
            del next_loss
            offloader._leaving.clear()  # of the last block, until the next forward pass
            assert bytes_.now == 0
    finally:
        gc.enable()
    assert not list(offloader._entries)


def test_an_error_in_the_forward_pass_leaves_it_usable():
    class Broken(Block):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            out = super().forward(x, scale)
            if fail:
                raise ValueError("a bug")
            return out

    fail = True
    model = Stack(forced(), 3, Broken)
    with pytest.raises(ValueError, match="a bug"):
        model(batch())
    fail = False
    assert same(gradients(model, batch()), gradients(Stack(None, 3), batch()))


def test_without_gradients_nothing_is_copied():
    offloader = forced()
    model = Stack(offloader)
    with torch.no_grad():
        model(batch())
    model.requires_grad_(False)(batch().detach())
    assert offloader.copies == 0


def test_an_offloaded_module_inside_another_is_copied_once():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = OffloadWrapper(Block(), shared)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.inner(x, scale)

    shared = forced()
    found = gradients(Stack(shared, 3, Nested), batch())
    alone = forced()
    assert same(found, gradients(Stack(alone, 3), batch()))
    assert shared.copies == alone.copies


def test_a_copy_of_the_model_shares_the_offloader_and_the_state_dict_has_the_names_of_the_modules():
    model = Stack(forced())
    twin = copy.deepcopy(model)
    assert same(gradients(twin, batch()), gradients(model, batch()))
    assert model.state_dict().keys() == Stack().state_dict().keys()
    Stack().load_state_dict(model.state_dict())
    model.load_state_dict(Stack().state_dict())


class LateAccelerator(Accelerator):
    """The CPU as a device whose streams run copies as late as they may: when somebody waits for them.

    A copy whose source or target is gone by then fails, as it would read or write another's memory.
    """

    def new_stream(self) -> Any:
        return LateStream()

    def current_stream(self) -> Any:
        return LateStream.current

    def new_event(self) -> Any:
        return LateEvent()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        previous, LateStream.current = LateStream.current, stream
        try:
            with Queueing(stream):
                yield
        finally:
            stream.after_main = False
            LateStream.current = previous


class LateStream:
    current: Any = None

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.after_main = False  # whether the next copy waits for what the computation was given before

    def wait_event(self, event: LateEvent) -> None:
        self.after_main = event.stream is main_stream
        if self is main_stream:
            event.stream.run(event.position)
        else:
            self.queue.append(lambda: event.stream.run(event.position))

    def run(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()


class LateEvent:
    def record(self, stream: LateStream) -> None:
        self.stream, self.position = stream, len(stream.queue)

    def query(self) -> bool:
        return self.stream.done >= self.position


class Queueing(TorchDispatchMode):
    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.late = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.copy_.default  # nothing else belongs on such a stream
        assert args[2] is True  # non_blocking
        assert self.late.after_main, "a copy does not wait for the computation"
        target, source = weakref.ref(args[0]), weakref.ref(args[1])

        def copy() -> None:
            to, from_ = target(), source()
            assert to is not None, "freed before the copy to it was done"
            assert from_ is not None, "freed before it was copied"
            to.copy_(from_)

        self.late.queue.append(copy)
        return args[0]


main_stream = LateStream()


def test_memory_is_used_and_freed_only_after_the_copies():
    LateStream.current = main_stream
    offloader = Offloader(LateAccelerator("cpu"), min_bytes=1, force=True)
    model = Stack(offloader, depth=5)
    for seed in range(3):
        assert same(gradients(model, batch(seed)), gradients(Stack(None, 5), batch(seed)))
    abandoned = model(batch()).sum()
    middle = list(model.blocks[3].parameters())
    torch.autograd.grad(abandoned, middle)  # block 2 is fetched, and not needed
    del abandoned
    assert same(gradients(model, batch()), gradients(Stack(None, 5), batch()))
    assert offloader.fetched_ahead > 0
    streams = (offloader._leaving_stream, offloader._coming_stream)
    assert all(len(stream.queue) > 0 for stream in streams)
