"""A tiny Wan inside a composite, one rank's share of a batch, and a training loop: what the tests here
train.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.weights import materialize
from mm_core.weights.tensors import state_tensors

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
    "in_channels": 4,
    "out_channels": 4,
    "rope_max_seq_len": 16,
}
POLICY = ShardingPolicy(units=("blocks.{*}", "proj_out"), aliases={"head": "proj_out"})


class TinyWan(WanTransformer3DModel):
    """diffusers' Wan with what a component needs to be built on the meta device."""

    def init_module(self, module: nn.Module) -> bool:
        table = getattr(module, "scale_shift_table", None)
        if table is None:
            return False
        nn.init.normal_(table, std=table.shape[-1] ** -0.5)
        return True

    def reset_buffers(self, device: torch.device) -> None:
        rope = WanRotaryPosEmbed(
            self.config.attention_head_dim, self.config.patch_size, self.config.rope_max_seq_len
        )
        for name, table in rope.named_buffers():
            setattr(self.rope, name, table.to(device))


class Composite(nn.Module, FSDP2Mixin):
    """A trained predictor beside a frozen encoder, as in a real model."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        with torch.device(device):
            self.predictor: Any = TinyWan(**SIZES)
        self.ae = nn.Linear(2, 2).requires_grad_(False)

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": POLICY}


def sharded(seed: int = 0, **fsdp2: Any) -> Composite:
    """A composite built on meta, sharded and filled."""
    model = Composite()
    assert model.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(model.predictor, "cpu", seed)
    return model


def optimizer_of(model: Composite, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.predictor.parameters(), lr=1e-3, weight_decay=0.01, **{"fused": True, **kwargs}
    )


def loss_of(predictor: nn.Module, step: int, batch_size: int = 4) -> torch.Tensor:
    """Flow matching on this rank's share of a global batch that every rank can make for itself."""
    generator = torch.Generator().manual_seed(step)
    video, noise = torch.randn(2, batch_size, 4, 2, 8, 8, generator=generator).unbind(0)
    sigma = torch.rand(batch_size, generator=generator)
    text = torch.randn(batch_size, 6, 32, generator=generator)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    s = sigma[mine].view(-1, 1, 1, 1, 1)
    noised = (1 - s) * video[mine] + s * noise[mine]
    prediction = predictor(noised, sigma[mine] * 1000, text[mine], return_dict=False)[0]
    return (prediction.float() - (noise - video)[mine]).square().mean()


def train(model: Composite, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Steps `first` to `last` (exclusive); the global batch's losses."""
    losses = []
    for step in range(first, last):
        loss = loss_of(model.predictor, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item() / dist.get_world_size())
    return losses


def whole_tensors(model: Composite) -> dict[str, torch.Tensor]:
    """The predictor's whole tensors, on every rank (a collective)."""
    return {name: _whole(t).clone() for name, t in state_tensors(model.predictor).items()}


def train_from_scratch(steps: int, **fsdp2: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses, and the final weights as NumPy arrays (cheap to send between processes)."""
    model = sharded(**fsdp2)
    losses = train(model, optimizer_of(model), 0, steps)
    return losses, {name: t.numpy() for name, t in whole_tensors(model).items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
