"""Weights: how long it takes until a sharded model has those of a Hugging Face folder, and what a rank needs for it.

At least 2 GB of weights are generated under /tmp (and removed at the end). Ranks of this machine then load them into fp32 in
two ways, in turns, each time in fresh processes:

- ours: built on the meta device, sharded, then each rank reads the byte ranges of its shards;
- plain: `from_pretrained` on every rank, then `fully_shard`.

Time runs from before the model is built until all ranks have their shards. Memory is what a rank's resident set grew by
at its peak (mapped files are part of it), beside what its shards take. Targets at 2 ranks: at most 0.6 of the time, at
most 1.10 of the shards.

Then a sharded Wan whose weights and optimizer states take 2 GB together trains, and saves them three times in each way, to
/tmp: while training waits, and beside it. The stall is how long `save` takes in the training's thread; target: at most 0.15 of
what it takes when training waits. Beside it stands how much longer the steps take while the thread writes, which on a CPU
needs the same cores, and the first save, which also makes the host memory.

    python benchmarks/weights.py [--ranks 2] [--rounds 3] [--gb 2] [--cold] [--json FILE]

With --cold the files are dropped from the page cache before each load. OMP_NUM_THREADS is 1 unless it is set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_core.accelerator import destroy_process_group
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.observe.transfer import byte_progress
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.training.saving import CheckpointSaver
from mm_core.weights import load_hf_folder, materialize
from mm_core.weights.mapping import folder_recipes, shapes_of
from mm_core.weights.recipe import result_shape
from mm_core.weights.retention import Retention
from mm_core.weights.tensors import local_part, state_tensors
from mm_core.weights.writing import Contents
from mm_plugin_wan22.predictor import WanDiT

#: Model, and dtype of the folder. transformers' loader is the faster one of the two libraries'.
CASES = {
    "Qwen3, bf16": ("qwen3", torch.bfloat16),
    "Qwen3, fp32": ("qwen3", torch.float32),
    "Qwen3 of experts, each by itself, bf16": ("qwen3_moe", torch.bfloat16),
    "Wan, bf16": ("wan", torch.bfloat16),
}
_TEXT: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


class Composite(nn.Module, FSDP2Mixin):
    """The model under the name of a predictor."""

    def __init__(self, predictor: nn.Module, units: str) -> None:
        super().__init__()
        self.predictor: Any = predictor
        self._policy = ShardingPolicy(units=(units,))

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": self._policy}


def units_of(kind: str) -> str:
    """Pattern of the blocks that are sharded each by itself."""
    return "blocks.{*}" if kind == "wan" else "model.layers.{*}"


def build(kind: str, layers: int) -> nn.Module:
    """A model of so many layers, on the meta device."""
    with torch.device("meta"):
        if kind == "wan":
            return WanDiT(hidden_size=1536, num_heads=12, ffn_dim=8960, num_layers=layers, max_seq_len=64)
        if kind == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**_TEXT, intermediate_size=6144, num_hidden_layers=layers))
        experts = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768}
        config = Qwen3MoeConfig(**_TEXT, **experts, intermediate_size=6144, num_hidden_layers=layers)
        return Qwen3MoeForCausalLM(config)


def layers_for(kind: str, parameters: float) -> int:
    """The fewest layers with at least so many parameters."""
    one, two = (sum(p.numel() for p in build(kind, layers).parameters()) for layers in (1, 2))
    return 1 + max(0, -int((one - parameters) // (two - one)))


def generate(kind: str, dtype: torch.dtype, folder: Path, gb: float) -> int:
    """Write a folder as the libraries do, in files of about 1 GB; returns its bytes."""
    model: Any = build(kind, layers_for(kind, gb * 1e9 / dtype.itemsize))
    shapes = shapes_of(model)
    layout = folder_recipes(model, None, shapes)
    if kind == "wan":  # our component computes what diffusers' class does
        config = {**model.config, "_class_name": "WanTransformer3DModel"}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    else:
        model.config.save_pretrained(folder)
    stem = "diffusion_pytorch_model" if kind == "wan" else "model"
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    total = 0
    file: dict[str, torch.Tensor] = {}
    for index, (key, recipe) in enumerate(layout.items()):
        file[key] = torch.empty(result_shape(recipe, shapes), dtype=dtype)
        file[key].uniform_(-0.05, 0.05, generator=generator)
        total += file[key].nbytes
        if sum(tensor.nbytes for tensor in file.values()) > 1e9 or index == len(layout) - 1:
            name = f"{stem}-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(file, folder / name, metadata={"format": "pt"})
            where.update(dict.fromkeys(file, name))
            file = {}
    content = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    os.sync()
    return total


def ours(kind: str, folder: Path) -> nn.Module:
    """From meta to ready by our loader."""
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_layers" if kind == "wan" else "num_hidden_layers"]
    composite = Composite(build(kind, layers), units_of(kind))
    composite.fully_shard(None, Fsdp2Config())
    materialize(composite.predictor, "cpu", 0, random_init=False)
    load_hf_folder(composite.predictor, folder)
    module: nn.Module = composite.predictor
    return module


def plain(kind: str, folder: Path) -> nn.Module:
    """The whole model on every rank, then its shards."""
    if kind == "wan":
        model: Any = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
        blocks = model.blocks
    else:
        cls = Qwen3ForCausalLM if kind == "qwen3" else Qwen3MoeForCausalLM
        model = cls.from_pretrained(folder, dtype=torch.float32)
        blocks = model.model.layers
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    module: nn.Module = model
    return module


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) * 1024


def worker(options: argparse.Namespace) -> None:
    """One rank of one load."""
    dist.init_process_group("gloo")
    kind, _ = CASES[options.case]
    # What a process imports and allocates when it first builds, shards or shows progress is neither way's.
    build(kind, 1)
    fully_shard(nn.Linear(2, 2))
    with byte_progress("warm", 1, shown=True):
        pass
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before, start = resident("VmRSS"), time.perf_counter()
    module = (ours if options.way == "ours" else plain)(kind, options.folder)
    dist.barrier()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    tensors = state_tensors(module).values()
    shards = sum(part.nbytes for part in (local_part(tensor)[0] for tensor in tensors))
    # The same numbers both ways; a sum in float64 of every shard tells whether they are.
    checks = sum(local_part(tensor)[0].double().sum().item() for tensor in tensors)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (seconds, peak, shards, checks))
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps(found))
    destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the libraries' loading threads sometimes abort the interpreter's own end


def saving_worker(options: argparse.Namespace) -> None:
    """One rank of the training that saves; seconds of each `save`, of steps, and of steps beside a save."""
    dist.init_process_group("gloo")
    layers = layers_for("wan", options.gb * 1e9 / 12)  # fp32: a weight and two moments
    composite = Composite(build("wan", layers), units_of("wan"))
    composite.fully_shard(None, Fsdp2Config())
    materialize(composite.predictor, "cpu", 0)
    adam = torch.optim.AdamW(composite.predictor.parameters(), fused=True)
    video, text, sigma = torch.ones(1, 16, 1, 8, 8), torch.ones(1, 4, 4096), torch.ones(1)

    def step() -> float:
        started = time.perf_counter()
        composite.predictor(video, sigma, text).square().mean().backward()
        adam.step()
        adam.zero_grad()
        return time.perf_counter() - started

    found: dict[str, list[float]] = {"plain": [step() for _ in range(8)][2:]}
    number = 0
    for way in ("waiting", "beside"):
        found[way], found[f"steps {way}"] = [], []
        with CheckpointSaver(
            options.folder / way, asynchronous=way == "beside", retention=Retention(1)
        ) as saver:
            for _ in range(3):
                number += 1
                state = {"step": number, "consumed_samples": number, "seed": 0}
                dist.barrier()
                started = time.perf_counter()
                saver.save(number, Contents({"predictor": composite.predictor}, adam, state))
                found[way].append(time.perf_counter() - started)
                busy = True
                while busy:  # all ranks take the same steps
                    beside = torch.tensor(float(saver.writing))
                    dist.all_reduce(beside)
                    busy = beside.item() > 0
                    seconds = step()
                    if busy:
                        found[f"steps {way}"].append(seconds)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps(everyones))
    destroy_process_group()


def measure_saving(options: argparse.Namespace) -> dict[str, Any]:
    """How long training stands still for a checkpoint, in both ways."""
    root = Path(tempfile.mkdtemp(prefix="mm-weights-", dir="/tmp"))
    try:
        found: Any = run("saving", "saving", root / "run", options)
    finally:
        shutil.rmtree(root)
    waiting = max(statistics.median(of_rank["waiting"]) for of_rank in found)
    beside = max(statistics.median(of_rank["beside"][1:]) for of_rank in found)
    slower = statistics.median(found[0]["steps beside"]) / statistics.median(found[0]["plain"])
    first = max(of_rank["beside"][0] for of_rank in found)
    return {
        "waiting": waiting, "beside": beside, "first": first, "stall": beside / waiting, "steps": slower, "ranks": found,
    }  # fmt: skip


def run(case: str, way: str, folder: Path, options: argparse.Namespace) -> list[list[float]]:
    """One load in fresh processes; seconds, peak, bytes of shards and a check sum of each rank."""
    if options.cold:
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = folder.parent / "result.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks), __file__,
        "--case", case, "--way", way, "--folder", str(folder), "--result", str(result), "--gb", str(options.gb),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    found: list[list[float]] = json.loads(result.read_text())
    return found


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns."""
    kind, dtype = CASES[case]
    root = Path(tempfile.mkdtemp(prefix="mm-weights-", dir="/tmp"))
    try:
        folder = root / "folder"
        nbytes = generate(kind, dtype, folder, options.gb)
        runs: dict[str, list[list[list[float]]]] = {"ours": [], "plain": []}
        for _ in range(options.rounds):
            for way, found in runs.items():
                found.append(run(case, way, folder, options))
    finally:
        shutil.rmtree(root)
    seconds = {
        way: statistics.median(max(r[0] for r in ranks) for ranks in found) for way, found in runs.items()
    }
    peak = {way: max(r[1] for ranks in found for r in ranks) for way, found in runs.items()}
    checks = {way: [r[3] for r in found[0]] for way, found in runs.items()}
    if any(abs(a - b) > 1e-6 * abs(a) for a, b in zip(checks["ours"], checks["plain"], strict=True)):
        sys.exit(f"{case}: the two ways load different numbers: {checks}")
    shards = max(r[2] for r in runs["ours"][0])
    return {
        "case": case, "folder_bytes": nbytes, "shard_bytes": shards, "seconds": seconds, "peak_bytes": peak,
        "time_ratio": seconds["ours"] / seconds["plain"], "peak_over_shards": peak["ours"] / shards,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each way; the median counts")
    parser.add_argument("--gb", type=float, default=2.0, help="of the generated folder, at least")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--no-saving", action="store_true", help="measure loading only")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    for name in ("--case", "--way", "--folder", "--result"):  # what it gives its ranks
        parser.add_argument(
            name, type=Path if name in ("--folder", "--result") else str, help=argparse.SUPPRESS
        )
    options = parser.parse_args()
    if options.way:
        (saving_worker if options.way == "saving" else worker)(options)
        return
    sys.stdout.write(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, torch {torch.__version__}, "
        f"{options.ranks} ranks, {'cold' if options.cold else 'warm'} files\n\n"
        "| folder | size | ours | plain | ratio (target at most 0.60) | shards of a rank | our peak "
        "| over shards (target at most 1.10) | plain's peak |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    results = []
    for case in options.cases:
        row = measure(case, options)
        results.append(row)
        sys.stdout.write(
            f"| {case} | {row['folder_bytes'] / 1e9:.2f} GB | {row['seconds']['ours']:.2f} s "
            f"| {row['seconds']['plain']:.2f} s | {row['time_ratio']:.2f} | {row['shard_bytes'] / 1e9:.2f} GB "
            f"| {row['peak_bytes']['ours'] / 1e9:.2f} GB | {row['peak_over_shards']:.2f} "
            f"| {row['peak_bytes']['plain'] / 1e9:.2f} GB |\n"
        )
        sys.stdout.flush()
    if not options.no_saving:
        row = measure_saving(options)
        results.append(row)
        sys.stdout.write(
            f"\nsaving {options.gb:.1f} GB: training waits {row['waiting']:.2f} s, or stalls {row['beside']:.2f} s (the first "
            f"time {row['first']:.2f} s) when it goes on: {row['stall']:.2f} (target at most 0.15); steps beside it take "
            f"{row['steps']:.2f} times as long\n"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
