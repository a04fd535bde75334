"""What each way to share a model costs: the same global batch on the same ranks, against FSDP2 alone and against scripts that
one would write by hand (`plain_parallel.py`).

Wan is shared by its sequence (Ulysses, ring) and by pipeline stages (1F1B), a dense Qwen3 by its tensors, one of experts by
its experts. Ours is the trainer's step: task, passes, the exchange of sums, scaling and clipping, AdamW. Ours and the script
start from the same weights and train on the same batches, alternating step by step; that their losses agree is checked.
On one machine's cores no way is faster than FSDP2: what is measured is what each one adds.

    python benchmarks/parallel.py [--ranks 2 4] [--steps 10] [--json FILE]

It starts its ranks itself, by gloo on the CPU, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import plain_parallel as plain
import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_core.accelerator import Accelerator, destroy_process_group
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.models.sora import SoRAModel
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding import ShardingPolicy
from mm_core.training.gradients import scale_and_clip
from mm_core.training.optimizer import ShardedAdamW
from mm_core.training.pipeline import PipelineStep
from mm_core.training.step import GradientExchange, Passes, SumsExchange, UnusedParameters
from mm_core.training.sums import StepSums
from mm_core.training.tasks.language import LanguageTask, next_tokens, token_losses
from mm_core.weights import materialize
from mm_plugin_wan22.policy import WANDIT
from mm_plugin_wan22.predictor import WanDiT

BATCH, LENGTH, VOCABULARY, CLIP, LR = 4, 256, 2048, 1.0, 1e-4
LATENTS, TEXT_LENGTH, TEXT_DIM = (16, 3, 16, 16), 64, 256
Batch = dict[str, torch.Tensor]
Step = Callable[[int], float]
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "pad_token_id": None,
}  # fmt: skip


def network(model: str) -> nn.Module:
    """A network on the current default device."""
    if model == "wan":
        return WanDiT(
            in_dim=16, out_dim=16, hidden_size=256, num_heads=4, ffn_dim=1024, freq_dim=256, text_dim=TEXT_DIM,
            text_len=TEXT_LENGTH, num_layers=4, max_seq_len=64,
        )  # fmt: skip
    if model == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**_TEXT, intermediate_size=1024))
    config = Qwen3MoeConfig(
        **_TEXT, intermediate_size=512, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=384,
        norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def batch_of(model: str, step: int) -> Batch:
    """The global batch of a step, which every rank can make."""
    generator = torch.Generator().manual_seed(step)
    if model != "wan":
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        return {"input_ids": ids, "labels": ids}
    sigma = torch.rand(BATCH, generator=generator)
    video, noise = torch.randn(2, BATCH, *LATENTS, generator=generator)
    s = sigma.view(-1, 1, 1, 1, 1)
    return {
        "noised": (1 - s) * video + s * noise,
        "timestep": sigma * 1000,
        "prompt": torch.randn(BATCH, TEXT_LENGTH, TEXT_DIM, generator=generator),
        "target": noise - video,
    }


class FlowTask:
    """Flow matching, as `DiffusionTask` does it after its encoders."""

    def prepare(self, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from micro_batches

    def forward(self, model: Any, inputs: Batch) -> torch.Tensor:
        return model.predictor(inputs["noised"], inputs["timestep"], inputs["prompt"])

    def loss(self, outputs: torch.Tensor, inputs: Batch) -> Any:
        losses = (outputs.float() - inputs["target"]).square().flatten(1).mean(1)
        return losses, torch.ones_like(losses), {}

    def tokens(self, inputs: Batch) -> int:
        return len(inputs["noised"])


def ours(model: str, sizes: ParallelSizes, micro: int) -> Step:
    """The trainer's step.

    Args:
        micro: samples of a micro batch.
    """
    policy = ShardingPolicy(units=("model.layers.{*}",), experts=("model.layers.{*}.mlp.experts",))
    if model == "dense":
        policy = ShardingPolicy(units=("model.layers.{*}",))
    with torch.device("meta"):
        bare = network(model)
    made: Any = (
        SoRAModel(predictor=bare, sharding_policies={"predictor": WANDIT})
        if model == "wan"
        else TransformersModel(bare, sharding_policy=policy)
    )
    made.fully_shard(None, Fsdp2Config(expert_parallel_size=sizes.ep), sizes)
    ((_, trained),) = made.trained.items()
    cpu = torch.device("cpu")
    materialize(trained, cpu, 0)
    made.train()
    mesh = made.parallel_mesh
    accumulation = BATCH // (micro * mesh.dp_size)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = ShardedAdamW(parameters, lr=LR, weight_decay=0.01, fused=True)
    task: Any = FlowTask() if model == "wan" else LanguageTask(made, seed=0, device=cpu)
    exchange = GradientExchange([trained], made.device_mesh, accumulation)
    sums_exchange = SumsExchange(UnusedParameters([trained], cpu, sizes.pp), mesh)
    passes: Any = (
        Passes(made, task, exchange, accumulation)
        if sizes.pp == 1
        else PipelineStep(made, task, mesh, accumulation, cpu, exchange)
    )

    def micro_batches(batch: Batch) -> Iterator[Batch]:
        first = mesh.dp_rank * micro * accumulation
        for start in range(first, first + micro * accumulation, micro):
            yield {name: t[start : start + micro] for name, t in batch.items()}

    def step(number: int) -> float:
        sums = StepSums(cpu)
        passes.run(task.prepare(micro_batches(batch_of(model, number))), sums)
        reduced, _ = sums_exchange.reduce(sums, False)
        scale = made.device_mesh.size() * sizes.tp / reduced.weight
        scale_and_clip(parameters, scale, CLIP, mesh.pp_group).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (reduced.loss / reduced.weight).item()

    return step


def by_hand(model: str, script: str) -> Step:
    """The script's step, from the same weights."""
    with torch.device("meta"):
        values = network(model)
    materialize(values, "cpu", 0)
    made: Any = network(model)
    made.load_state_dict(values.state_dict())

    def losses(module: Any, batch: Batch) -> torch.Tensor:
        if model == "wan":
            output = module(batch["noised"], batch["timestep"], batch["prompt"])
            return (output.float() - batch["target"]).square().flatten(1).mean(1).sum() / BATCH
        logits = module(input_ids=batch["input_ids"], use_cache=False).logits
        return token_losses(logits, next_tokens(batch["labels"])).sum() / (BATCH * (LENGTH - 1))

    if script == "pipeline":
        step = plain.pipeline(made, _pipeline_inputs, LR, CLIP, BATCH)
    else:
        step = getattr(plain, script)(made, losses, LR, CLIP)
    return lambda number: step(batch_of(model, number))


def _pipeline_inputs(batch: Batch) -> tuple[Any, ...]:
    """Patches are compared as patches: the last stage's output is not put back into videos."""
    target = batch["target"].unfold(3, 2, 2).unfold(4, 2, 2)  # [B, C, T, h, w, 2, 2]
    target = target.permute(0, 2, 3, 4, 5, 6, 1).flatten(4).flatten(1, 3)

    def loss(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (output.float() - wanted).square().flatten(1).mean(1).sum() / BATCH

    return (batch["noised"], batch["timestep"], batch["prompt"]), loss, target


def ways(ranks: int) -> list[tuple[str, str, ParallelSizes, int, str | None]]:
    """Name, model, sizes, samples of a micro batch, script."""
    alone = BATCH // ranks
    one = ParallelSizes()
    return [
        ("FSDP2", "wan", one, alone, "fsdp"),
        ("context, Ulysses", "wan", ParallelSizes(cp=ranks), BATCH, "ulysses"),
        ("context, ring", "wan", ParallelSizes(cp=ranks, cp_algo="ring"), BATCH, None),
        ("pipeline, 1F1B", "wan", ParallelSizes(pp=ranks), 1, "pipeline"),
        ("FSDP2", "dense", one, alone, "fsdp"),
        ("tensor", "dense", ParallelSizes(tp=ranks), BATCH, "tensor"),
        ("FSDP2", "moe", one, alone, "fsdp"),
        ("experts", "moe", ParallelSizes(ep=ranks), alone, "experts"),
    ]


def measured(
    name: str, model: str, sizes: ParallelSizes, micro: int, script: str | None, steps: int
) -> dict[str, Any]:
    """Alternate ours and the script, after a warm-up of both."""
    runs = {"ours": ours(model, sizes, micro)} | ({"plain": by_hand(model, script)} if script else {})
    times: dict[str, list[float]] = {run: [] for run in runs}
    losses: dict[str, float] = {}
    warm_up = 3
    for number in range(steps + warm_up):
        for run in list(runs) if number % 2 else list(runs)[::-1]:
            dist.barrier()
            started = time.perf_counter()
            losses[run] = runs[run](number)
            dist.barrier()
            if number >= warm_up:
                times[run].append(time.perf_counter() - started)
    if script and abs(losses["ours"] / losses["plain"] - 1) > 1e-5:
        raise RuntimeError(f"{model}, {name}: the two do not train alike: losses {losses}")
    medians = {run: statistics.median(values) * 1e3 for run, values in times.items()}
    row: dict[str, Any] = {"way": name, "model": model, "ours_ms": medians["ours"], "loss": losses["ours"]}
    if script:
        pairs = zip(times["ours"], times["plain"], strict=True)
        row |= {
            "plain_ms": medians["plain"],
            "ratio": medians["ours"] / medians["plain"],
            "median_of_ratios": statistics.median(a / b for a, b in pairs),
        }
    return row


def worker(options: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    accelerator = Accelerator.current()
    accelerator.init_process_group()
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.nn.functional"
    )  # public, and to be replaced
    ranks = dist.get_world_size()
    rows = []
    for way in ways(ranks):
        rows.append(measured(*way, options.steps))
        if dist.get_rank() == 0:  # a whole run takes minutes
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    alone = {row["model"]: row["ours_ms"] for row in rows if row["way"] == "FSDP2"}
    for row in rows:
        row["against_fsdp"] = row["ours_ms"] / alone[row["model"]]
    result = {
        "machine": f"{accelerator.type}, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "ranks": ranks,
        "steps": options.steps,
        "rows": rows,
    }
    if dist.get_rank() == 0:
        _print(result)
        if options.json:
            options.json.with_stem(f"{options.json.stem}-{ranks}").write_text(
                json.dumps(result, indent=2) + "\n"
            )
    destroy_process_group()


def _print(result: dict[str, Any]) -> None:
    lines = [
        "{machine}, torch {torch}, {ranks} ranks, fp32, {steps} steps".format(**result),
        "",
        "| model | way | ours | by hand | ratio of medians | median of ratios | against FSDP2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        hand = (
            f"{row['plain_ms']:.0f} ms | {row['ratio']:.3f} | {row['median_of_ratios']:.3f}"
            if "plain_ms" in row
            else "– | – | –"
        )
        lines.append(
            f"| {row['model']} | {row['way']} | {row['ours_ms']:.0f} ms | {hand} | {row['against_fsdp']:.2f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the numbers to FILE-<ranks>")
    options = parser.parse_args()
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        worker(options)
        return
    environment = {"OMP_NUM_THREADS": "1", "MM_DEVICE": "cpu", **os.environ}
    for ranks in options.ranks:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        code = subprocess.run([*command, __file__, *sys.argv[1:]], env=environment).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
