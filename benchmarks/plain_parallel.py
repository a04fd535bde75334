"""What one would write by hand for each kind of parallelism, with torch's own parts: what `benchmarks/parallel.py` compares
our engine with. Each script fits one model, one number of ranks and one schedule, checks nothing and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather, all_to_all_single
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

Step = Callable[[dict[str, torch.Tensor]], float]
Losses = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""Of a model and a batch: the summed loss of each sample divided by what the loss is to be divided by, added up."""


class Optimizer:
    """AdamW and clipping over DTensors and plain tensors, which torch's kernels over lists do not mix."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, clip: float) -> None:
        own = list(parameters)
        lists: dict[Any, list[nn.Parameter]] = {}
        for p in own:
            lists.setdefault((p.device_mesh, p.placements) if isinstance(p, DTensor) else None, []).append(p)
        self.lists, self.clip = list(lists.values()), clip
        self.optimizers = [torch.optim.AdamW(one, lr=lr, weight_decay=0.01, fused=True) for one in self.lists]

    def step(self, across: Any = None) -> None:
        """Args: across: of parameters that only this rank has, the group to add their norms up over."""
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in one if p.grad is not None]) for one in self.lists
        ]
        whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
        square = sum((n.square() for n in whole), torch.zeros(()))
        if across is not None:
            dist.all_reduce(square, group=across)
        for one in self.lists:
            torch.nn.utils.clip_grads_with_norm_(one, self.clip, square.sqrt())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _mean(loss: torch.Tensor) -> float:
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def _own(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return {name: t.chunk(world)[rank] for name, t in batch.items()}


def _layers(model: nn.Module) -> nn.ModuleList:
    layers: nn.ModuleList = model.blocks if hasattr(model, "blocks") else model.model.layers
    return layers


def fsdp(model: nn.Module, losses: Losses, lr: float, clip: float) -> Step:
    """`fully_shard` on each layer and the root."""
    for layer in _layers(model):
        fully_shard(layer)
    fully_shard(model)
    optimizer = Optimizer(model.parameters(), lr, clip)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = losses(model, _own(batch)) * dist.get_world_size()
        loss.backward()
        optimizer.step()
        return _mean(loss)

    return step


def tensor(model: nn.Module, losses: Losses, lr: float, clip: float) -> Step:
    """`parallelize_module` on each layer of a Qwen3; the rest is on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in _layers(model):
        parallelize_module(layer, mesh, plan)
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):  # each rank has some of the heads
            norm.weight.register_hook(
                lambda gradient: (dist.all_reduce(gradient := gradient.clone()), gradient)[1]
            )
    optimizer = Optimizer(model.parameters(), lr, clip)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = losses(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def ulysses(model: nn.Module, losses: Losses, lr: float, clip: float) -> Step:
    """FSDP, and Wan's self-attention between two all-to-alls; the loss is that of the gathered output, on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def exchange(x: torch.Tensor, split: int, join: int) -> torch.Tensor:
        parts = torch.stack(x.chunk(world, split)).contiguous()
        return torch.cat(all_to_all_single(torch.empty_like(parts), parts).unbind(), join)

    def attend(
        attn: Any, x: torch.Tensor, text: Any = None, _: Any = None, rotary: Any = None
    ) -> torch.Tensor:
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))  # [B, S / N, heads, D]
        cos, sin = (table[..., start::2] for table, start in zip(rotary, (0, 1), strict=True))

        def rotated(t: torch.Tensor) -> torch.Tensor:
            a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        q, k, v = (exchange(t, 2, 1).transpose(1, 2) for t in (rotated(q), rotated(k), v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return attn.to_out[0](exchange(out, 1, 2).flatten(2))

    def split(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, time, rotary = arguments
        part = tuple(t.chunk(world, 1)[rank] for t in rotary)
        return (hidden.chunk(world, 1)[rank] if block is model.blocks[0] else hidden, text, time, part)

    for block in model.blocks:
        block.attn1.forward = lambda *args, attn=block.attn1: attend(attn, *args)
        block.register_forward_pre_hook(split)
        fully_shard(block)
    fully_shard(model)
    model.norm_out.register_forward_pre_hook(lambda _, args: torch.cat(all_gather(args[0].contiguous()), 1))
    optimizer = Optimizer(model.parameters(), lr, clip)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = losses(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


class _Stage(nn.Module):
    """Some blocks of a Wan; what comes before on the first stage, what comes after on the last."""

    def __init__(self, model: Any, index: int, count: int) -> None:
        super().__init__()
        size = len(model.blocks) // count
        self.blocks = model.blocks[index * size : (index + 1) * size]
        self.rope, self.config, self.first, self.last = (
            model.rope,
            model.config,
            index == 0,
            index == count - 1,
        )
        if self.first:
            self.patch_embedding, self.condition_embedder = model.patch_embedding, model.condition_embedder
        if self.last:
            self.norm_out, self.proj_out = model.norm_out, model.proj_out
            self.scale_shift_table = model.scale_shift_table

    def forward(self, hidden: torch.Tensor, *conditions: torch.Tensor) -> Any:
        if self.first:
            time, text = conditions
            hidden = self.patch_embedding(hidden)
            hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 5 else hidden
            temb, proj, text, _ = self.condition_embedder(time, text, None, timestep_seq_len=None)
            conditions = (text, proj.unflatten(1, (6, -1)), temb)
        text, proj, temb = conditions
        for block in self.blocks:
            hidden = block(hidden, text, proj, self.tables)
        if not self.last:
            return hidden, text, proj, temb
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
        return self.proj_out(self.norm_out(hidden) * (1 + scale) + shift)

    tables: Any = ()


def pipeline(
    model: nn.Module,
    inputs: Callable[[dict[str, torch.Tensor]], tuple[Any, ...]],
    lr: float,
    clip: float,
    micro: int,
) -> Step:
    """1F1B over a Wan that is cut by hand.

    Args:
        inputs: of a batch: the arguments of the model, and the function of patches `[B, S, P]` and a micro batch's target,
            and that target.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = _Stage(model, rank, world)
    schedule: Any = None
    optimizer = Optimizer(stage.parameters(), lr, clip)

    def step(batch: dict[str, torch.Tensor]) -> float:
        nonlocal schedule
        arguments, loss_of, target = inputs(batch)
        if schedule is None:
            stage.tables = stage.rope(arguments[0])
            schedule = Schedule1F1B(
                PipelineStage(stage, rank, world, torch.device("cpu")),
                micro,
                loss_fn=loss_of,
                scale_grads=False,
            )
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(*arguments)
        else:
            schedule.step(target=target, losses=losses) if rank == world - 1 else schedule.step()
        optimizer.step(dist.group.WORLD)
        total = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        return _mean(total) * world

    return step


def experts(model: nn.Module, losses: Losses, lr: float, clip: float) -> Step:
    """FSDP for what is not an expert; each rank has some of each layer's experts, and tokens travel to them."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def sent(rows: torch.Tensor, to: list[int], from_: list[int]) -> torch.Tensor:
        return all_to_all_single(rows.new_empty(sum(from_), *rows.shape[1:]), rows.contiguous(), from_, to)

    def forward(
        module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        number, k = len(module.gate_up_proj), index.shape[1]
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=number * world)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        to, from_ = counts.view(world, -1).sum(1).tolist(), theirs.view(world, -1).sum(1).tolist()
        rows = sent(hidden[order // k], to, from_)
        expert = torch.arange(number).repeat(world).repeat_interleave(theirs)
        by_expert = expert.argsort(stable=True)
        ends = expert.bincount(minlength=number).cumsum(0).int()
        gate, up = F.grouped_mm(rows[by_expert], module.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, module.down_proj.transpose(1, 2), offs=ends)
        rows = sent(out[by_expert.argsort()], from_, to)[order.argsort()]
        return (rows.view(-1, k, hidden.shape[1]) * weights.unsqueeze(-1)).sum(1)

    own: list[nn.Parameter] = []
    for layer in _layers(model):
        module = layer.mlp.experts
        for name, p in list(module.named_parameters()):
            part = nn.Parameter(p.detach().chunk(world)[rank].clone())
            part.register_hook(lambda gradient: gradient / world)
            setattr(module, name, part)
            own.append(part)
        module.forward = lambda *args, module=module: forward(module, *args)
        fully_shard(layer, ignored_params=set(own))
    fully_shard(model, ignored_params=set(own))
    mine = set(own)
    rest = Optimizer([p for p in model.parameters() if p not in mine], lr, clip)
    local = torch.optim.AdamW(own, lr=lr, weight_decay=0.01, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = losses(model, _own(batch)) * world
        loss.backward()
        square = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
        dist.all_reduce(square)
        others = [p.grad for one in rest.lists for p in one if p.grad is not None]
        norm = (square + torch.nn.utils.get_total_norm(others).full_tensor().square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(own, clip, norm)
        for one in rest.lists:
            torch.nn.utils.clip_grads_with_norm_(one, clip, norm)
        for optimizer in (*rest.optimizers, local):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return _mean(loss)

    return step
