"""What the tests do on the pretend NPU, each in a process of its own:

    python -m tests.pretend_npu.cases NAME '[arguments]'

prints what the function NAME returns, as JSON. MM_DEVICE says on which device.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mm_core import PREDICTOR_MODEL_MAPPINGS
from mm_core.accelerator import Accelerator
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.models.sora import SoRAModel
from mm_core.sharding import ShardingPolicy
from mm_core.weights import materialize
from tests.distributed.harness import RankError, run_ranks

STEPS = 3
POLICY = ShardingPolicy(units=("blocks.{*}", "proj_out"))
SIZES: dict[str, Any] = {
    "model_type": "t2v", "patch_size": [1, 2, 2], "text_len": 6, "in_dim": 4, "out_dim": 4, "hidden_size": 48,
    "ffn_dim": 96, "num_heads": 2, "num_layers": 3, "freq_dim": 32, "text_dim": 32, "cross_attn_norm": True,
    "max_seq_len": 16,
}  # fmt: skip


def on_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, backend: str | None = None
) -> list[Any]:
    """Run a function on forked ranks that have this process's device, and the group that `mm train` would make."""
    device = os.environ["MM_DEVICE"]

    def rank() -> Any:
        dist.destroy_process_group()  # the harness's own, on the CPU
        # The address is not used, as the ranks have a store; a launcher sets it all the same.
        os.environ.update(MM_DEVICE=device, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        store = dist.FileStore(str(Path(folder) / "store"), world)
        Accelerator.current().init_process_group(backend, timeout_minutes=2, store=store)
        return function(*arguments)

    for left in (2, 1, 0):
        with tempfile.TemporaryDirectory() as folder:
            try:
                return run_ranks(rank, world, timeout=240)
            except RankError as error:
                # Ranks that gloo could not connect with each other on a busy machine meet again, as in the harness.
                if not left or "Accelerator.current().init_process_group" not in str(error):
                    raise
    raise AssertionError


# -- the device itself


def the_device() -> dict[str, Any]:
    """Memory, streams, events, pinned memory and generators, as `Accelerator` offers them."""
    accelerator = Accelerator.current()
    accelerator.use()
    before = torch.npu.memory_allocated()
    x = torch.ones(1000, device=accelerator.device)
    held = torch.npu.memory_allocated() - before
    y = x * 2
    del y
    memory = [held, torch.npu.memory_allocated() - before, accelerator.max_memory_bytes() - before]

    stream, event = accelerator.new_stream(), accelerator.new_event()
    with accelerator.stream(stream):
        inside = accelerator.current_stream() == stream
        host = accelerator.pinned_like(x[:500].view(20, 25).t())
        host.copy_(x[:500].view(20, 25).t(), non_blocking=True)
        event.record()
    x.record_stream(stream)
    accelerator.current_stream().wait_event(event)

    accelerator.seed_all(5)
    states = accelerator.rng_state()
    drawn = torch.randn(3, device=accelerator.device)
    torch.randn(3)  # the CPU's generator is another one
    accelerator.set_rng_state(states)
    from torch_npu.report import report

    return {
        "accelerator": [accelerator.type, str(accelerator.device), accelerator.backend],
        "memory": memory,
        "streams": [inside, accelerator.current_stream() != stream],
        "pinned": [host.is_pinned(), list(host.stride()), float(host.sum())],
        "drawn_again": torch.equal(drawn.cpu(), torch.randn(3, device=accelerator.device).cpu()),
        "supports": [accelerator.supports(t) for t in (torch.bfloat16, torch.float32, torch.float64)],
        "float64": error_of(lambda: torch.ones(2, device=accelerator.device, dtype=torch.float64)),
        **report(),
    }


def second_device() -> list[str]:
    """The device of each rank, and that of a process that may see only one."""

    def look() -> str:
        return str(torch.ones(1, device=Accelerator.current().device).device)

    return on_ranks(2, look)


def error_of(function: Callable[[], Any]) -> str:
    """The message of the error that a call raises; empty if it raises none."""
    try:
        function()
    except RankError as error:
        return str(error)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


# -- communication


def collectives(backend: str | None) -> list[Any]:
    """What the group does with tensors of the device and of the host, and which reductions it refuses."""

    def look() -> list[Any]:
        device = Accelerator.current().device
        rank = dist.get_rank()
        mine = torch.full((2,), rank + 1.0, device=device)
        host = torch.ones(1)
        dist.all_reduce(mine)
        dist.all_reduce(host)
        gathered = torch.empty(2, device=device)
        dist.all_gather_into_tensor(gathered, torch.full((1,), float(rank), device=device))
        part = torch.empty(1, device=device)
        dist.reduce_scatter_tensor(part, torch.tensor([10.0, 20.0], device=device) + rank)
        swapped = torch.empty(2, device=device)
        dist.all_to_all_single(swapped, torch.tensor([rank * 2.0, rank * 2 + 1.0], device=device))
        objects: list[Any] = [None, None]
        dist.all_gather_object(objects, rank)
        refused = [
            error_of(lambda op=op: dist.all_reduce(mine, op=op))
            for op in (dist.ReduceOp.AVG, dist._make_nccl_premul_sum(0.5))
        ]
        return [
            mine[0].item(),
            host.item(),
            gathered.tolist(),
            part.item(),
            swapped.tolist(),
            objects,
            refused,
        ]

    return on_ranks(2, look, backend=backend)


def group_of(world: int) -> str:
    """The error of ranks that form a group; empty if they can."""
    return error_of(lambda: on_ranks(world, dist.get_rank))


# -- training


def _predictor() -> nn.Module:
    with torch.device("meta"):
        return PREDICTOR_MODEL_MAPPINGS["wandit"](**SIZES)


def _loss(predictor: nn.Module, step: int, side: int) -> torch.Tensor:
    """Flow matching of tiny Wan on this rank's share of a batch of 4 videos of `side` × `side` latents."""
    device = Accelerator.current().device
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    video, noise = torch.randn(2, 4, 4, 2, side, side, generator=generator)[:, share].to(device).unbind(0)
    sigma = torch.rand(4, generator=generator)[share].to(device)
    text = torch.randn(4, 6, 32, generator=generator)[share].to(device)
    s = sigma.view(-1, 1, 1, 1, 1)
    prediction = predictor((1 - s) * video + s * noise, sigma * 1000, text)
    return (prediction.float() - (noise - video)).square().mean()


def _train(fsdp2: dict[str, Any], side: int) -> dict[str, Any]:
    accelerator = Accelerator.current()
    model = SoRAModel(predictor=_predictor(), sharding_policies={"predictor": POLICY})
    model.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(model.predictor, accelerator.device, 0)
    parameters = list(model.predictor.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        loss = _loss(model.predictor, step, side)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item() / dist.get_world_size())
    told: dict[str, Any] = {"losses": losses, "norms": norms}
    if accelerator.type == "npu":
        from torch_npu.report import report

        told |= report()
    return told


def train(world: int, fsdp2: dict[str, Any], side: int = 8) -> list[Any]:
    """Losses and norms of some steps of tiny Wan, sharded by our own engine; on an NPU, what it was asked."""
    return on_ranks(world, _train, fsdp2, side)


def plain_fully_shard(forced: bool, factor: float | None) -> list[str]:
    """The error of FSDP2's own backward pass, without our settings and with them."""

    def step() -> str:
        device = Accelerator.current().device
        module = nn.Linear(8, 8).to(device)
        mesh = dist.init_device_mesh(device.type, (2,))
        fully_shard(module, mesh=mesh)
        if factor is not None:
            module.set_gradient_divide_factor(factor)
        module.set_force_sum_reduction_for_comms(forced)
        return error_of(lambda: module(torch.ones(2, 8, device=device)).sum().backward())

    return on_ranks(2, step)


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(result) + "\n")
