"""Sharded training: our step against a hand-written `fully_shard` script, and what the choices for activations cost.

1. Our FSDP2 step (policy, engine and the trainer's scaling and clipping) and a minimal script over diffusers' Wan
   (`fully_shard` on each block and the root, `clip_grad_norm_`, fused AdamW) train the same weights on the same
   batches, alternating step by step on the same ranks. Target: a ratio of at most 1.03.
2. Time and memory of a step for each choice of recomputation and offload. On a CPU the bytes of all tensors that
   are alive are counted (what kernels hold inside one operation is not seen); on an accelerator the allocator's peak.
   Beside it stands what the plan predicts for parameters, gradients and optimizer states. Activations are
   offloaded on an accelerator only; on a CPU those choices would be the others again.

    python benchmarks/sharding.py [--ranks 2] [--steps 20] [--size small] [--json FILE]

It starts its ranks itself. MM_DEVICE chooses the device. On one rank give --bf16: in fp32 our engine does not wrap
the model at all, and its ratio would be that of FSDP2 against none.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mm_core.accelerator import Accelerator, destroy_process_group
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.planning.live_bytes import LiveBytes
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.sharding.rows import peak_memory
from mm_core.training.gradients import scale_and_clip
from mm_core.training.step import GradientExchange, UnusedParameters
from mm_core.weights import materialize

# Latents are [16, frames, height, width]; a token is 2 x 2 of them.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 4, "head_dim": 32, "ffn": 256, "layers": 4, "latents": (3, 8, 8), "batch": 2},
    "small": {"heads": 4, "head_dim": 64, "ffn": 1024, "layers": 6, "latents": (3, 16, 16), "batch": 2},
    "large": {"heads": 16, "head_dim": 128, "ffn": 8192, "layers": 16, "latents": (9, 32, 48), "batch": 1},
}
TEXT_DIM, TEXT_LENGTH, CLIP, LR = 256, 64, 1.0, 1e-4
BLOCKS = "predictor.blocks.{*}"
CHOICES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "gathered weights kept": {"reshard_after_forward": False},
    "recompute: blocks": {"recompute_modules": (BLOCKS,)},
    "recompute: selective": {"recompute_modules": (BLOCKS,), "recompute_granularity": "selective"},
    "recompute: feed-forwards": {"recompute_modules": (f"{BLOCKS}.ffn",)},
    "recompute: first half of the blocks": {"recompute_modules": (BLOCKS,), "recompute_num_layers": 0},
    "offload: attention": {"offload_activations": (f"{BLOCKS}.attn1", f"{BLOCKS}.attn2")},
    "offload: blocks": {"offload_activations": (BLOCKS,)},
    "recompute and offload: blocks": {"recompute_modules": (BLOCKS,), "offload_activations": (BLOCKS,)},
    "offload_to_cpu": {"offload_to_cpu": True},
}
Step = Callable[[int], float]


class Composite(nn.Module, FSDP2Mixin):
    """The predictor under its name."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor: Any = predictor

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": ShardingPolicy(units=("blocks.{*}",))}


def wan(size: str) -> WanTransformer3DModel:
    """A Wan of this size on the current default device."""
    s = SIZES[size]
    return WanTransformer3DModel(
        num_attention_heads=s["heads"], attention_head_dim=s["head_dim"], ffn_dim=s["ffn"], num_layers=s["layers"],
        text_dim=TEXT_DIM, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip


def loss_of(model: nn.Module, size: str, step: int, device: torch.device) -> torch.Tensor:
    """Flow matching; the sum over this rank's samples."""
    generator = torch.Generator().manual_seed(step * 1000 + dist.get_rank())
    batch = SIZES[size]["batch"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device)

    video, noise, text = (
        draw(16, *SIZES[size]["latents"]),
        draw(16, *SIZES[size]["latents"]),
        draw(TEXT_LENGTH, TEXT_DIM),
    )
    sigma = torch.rand(batch, generator=generator).to(device)
    s = sigma.view(-1, 1, 1, 1, 1)
    output = model((1 - s) * video + s * noise, sigma * 1000, text, return_dict=False)[0]
    return (output.float() - (noise - video)).square().flatten(1).mean(1).sum()


def our_step(size: str, device: torch.device, bf16: bool, **fsdp2: Any) -> tuple[Step, Composite]:
    """A sharded model with the trainer's step."""
    with torch.device("meta"):
        composite = Composite(wan(size))
    if bf16:
        fsdp2 |= {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(composite.predictor, device, 0)
    model = composite.predictor
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, fused=True)
    exchange, unused = GradientExchange([model], composite.device_mesh, 1), UnusedParameters([model], device)

    def step(number: int) -> float:
        exchange.begin(0)
        loss = loss_of(model, size, number, device)
        loss.backward()
        weight = torch.full((), float(SIZES[size]["batch"]), device=device)
        numbers = torch.cat([torch.stack([loss.detach(), weight]), unused.numbers()])
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        unused.drop(numbers[2:])
        norm = scale_and_clip(parameters, dist.get_world_size() / numbers[1], CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norm.item()
        return (numbers[0] / numbers[1]).item()

    return step, composite


def plain_step(size: str, device: torch.device, bf16: bool, like: Composite) -> Step:
    """What one would write by hand, with the weights of ours."""
    model = wan(size)
    whole = {
        name.replace("_checkpoint_wrapped_module.", ""): t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in like.predictor.state_dict().items()
    }
    model.load_state_dict(whole)
    model.to(device)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)

    def step(number: int) -> float:
        loss = loss_of(model, size, number, device) / SIZES[size]["batch"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    return step


def timed(step: Step, number: int, accelerator: Accelerator) -> tuple[float, float]:
    """Seconds and loss of one step, from and to a moment when all ranks are idle."""
    accelerator.synchronize()
    dist.barrier()
    started = time.perf_counter()
    loss = step(number)
    accelerator.synchronize()
    return time.perf_counter() - started, loss


def against_plain(size: str, steps: int, accelerator: Accelerator, bf16: bool) -> dict[str, Any]:
    """Alternate the two, after a warm-up of both."""
    ours, composite = our_step(size, accelerator.device, bf16)
    runs = {"ours": ours, "plain": plain_step(size, accelerator.device, bf16, composite)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    warm_up = 5
    for number in range(steps + warm_up):
        order = list(runs) if number % 2 else list(runs)[::-1]
        for name in order:
            seconds, losses[name] = timed(runs[name], number, accelerator)
            if number >= warm_up:
                times[name].append(seconds)
    if abs(losses["ours"] / losses["plain"] - 1) > 2e-2:
        raise RuntimeError(f"the two do not train alike: losses {losses}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "size": size,
        "parameters": sum(p.numel() for p in composite.predictor.parameters()),
        "ours_ms": medians["ours"] * 1e3,
        "plain_ms": medians["plain"] * 1e3,
        "ratio": medians["ours"] / medians["plain"],
        "median_of_ratios": statistics.median(
            a / b for a, b in zip(times["ours"], times["plain"], strict=True)
        ),
    }


def choice(name: str, size: str, steps: int, accelerator: Accelerator, bf16: bool) -> dict[str, Any]:
    """Time and memory of one choice."""
    gc.collect()  # FSDP modules hold themselves; an accelerator's peak would count those of the choice before
    fields = dict(CHOICES[name])
    if "recompute_num_layers" in fields:
        fields["recompute_num_layers"] = SIZES[size]["layers"] // 2
    memory = _Memory(accelerator)
    with memory.counted():
        step, composite = our_step(size, accelerator.device, bf16, **fields)
        for number in range(2):  # optimizer states exist after the first
            memory.restart()
            step(number)
        peak = memory.peak()
    times = [timed(step, number, accelerator)[0] for number in range(2, steps + 2)]
    plan = composite.sharding_plans["predictor"]
    predicted = peak_memory(plan, composite.device_mesh.size(-1), wrapped=dist.get_world_size() > 1 or bf16)
    return {
        "choice": name,
        "ms": statistics.median(times) * 1e3,
        "peak_bytes": peak,
        "predicted_bytes": predicted.total
        + (predicted.stored if predicted.on_host and accelerator.type == "cpu" else 0),
    }


class _Memory:
    """The peak of a rank's memory during a step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._live = LiveBytes() if accelerator.type == "cpu" else None
        self._device: Any = None if self._live else torch.get_device_module(accelerator.device)

    def counted(self) -> Any:
        import contextlib

        return self._live or contextlib.nullcontext()

    def restart(self) -> None:
        if self._live is not None:
            self._live.reset_peak()
        else:
            self._device.reset_peak_memory_stats()

    def peak(self) -> int:
        return self._live.peak if self._live is not None else int(self._device.max_memory_allocated())


def worker(options: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    accelerator = Accelerator.current()
    accelerator.init_process_group()
    if accelerator.type == "cpu":
        torch.set_num_threads(1)
    result = {
        "machine": f"{accelerator.type}, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "steps": options.steps,
        "dtype": "bf16" if options.bf16 else "fp32",
        "step": [against_plain(size, options.steps, accelerator, options.bf16) for size in options.size],
        "choices": {
            size: [
                choice(name, size, max(3, options.steps // 4), accelerator, options.bf16)
                for name, fields in CHOICES.items()
                if accelerator.type != "cpu" or "offload_activations" not in fields
            ]
            for size in options.size[-1:]
        },
    }
    if dist.get_rank() == 0:
        _print(result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    destroy_process_group()


def _print(result: dict[str, Any]) -> None:
    lines = ["{machine}, torch {torch}, {ranks} ranks, {dtype}, {steps} steps".format(**result), ""]
    lines += [
        "| model | parameters | ours | plain | ratio of medians (target at most 1.03) | median of ratios |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["step"]:
        lines.append(
            f"| {row['size']} | {row['parameters'] / 1e6:.1f} M | {row['ours_ms']:.1f} ms | {row['plain_ms']:.1f} ms "
            f"| {row['ratio']:.3f} | {row['median_of_ratios']:.3f} |"
        )
    for size, rows in result["choices"].items():
        lines += [
            "",
            f"| {size}: choice | step | peak of a rank | predicted without activations |",
            "|---|---|---|---|",
        ]
        for row in rows:
            lines.append(
                f"| {row['choice']} | {row['ms']:.0f} ms | {row['peak_bytes'] / 1e6:.1f} MB "
                f"| {row['predicted_bytes'] / 1e6:.1f} MB |"
            )
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size",
        nargs="+",
        choices=SIZES,
        default=["tiny", "small"],
        help="the last one's choices are measured",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        worker(options)
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.ranks),
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run([*command, __file__, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
