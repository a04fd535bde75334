"""Tensors that wait in host memory are the same objects afterwards, bit by bit; views and shared storages included."""

from __future__ import annotations

import torch
from torch import nn

from mm_core.training.host_storage import HostStorage


def test_what_was_sent_comes_back_as_it_was() -> None:
    flat = torch.arange(12.0)
    first, second = flat[:4], flat[4:].view(2, 4)  # as FSDP2's gradients lie in one buffer
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    momenta = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    tensors = [first, second, *(p.detach() for p in layer.parameters()), *momenta]
    before = [tensor.clone() for tensor in tensors]
    waiting = HostStorage()
    assert not waiting.away
    waiting.back()  # nothing is away
    for _ in range(2):
        waiting.send(iter(tensors))
        assert waiting.away
        assert waiting.nbytes == 4 * (12 + 8 + 2 * 8)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in [flat, *tensors, layer.weight])
        waiting.back()
        assert not waiting.away
        assert all(map(torch.equal, tensors, before))
    assert torch.equal(flat, torch.arange(12.0))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight.detach(), before[2])
