"""Training Wan: our step against a loop over diffusers' class and DiffSynth-Studio's step, and what our levers bring.

1. `same`: the same weights, batches, encoders and switches: fused AdamW, clipping at 1.0, nothing recomputed. The runs take turns
   step by step in one process. Before that each computes one loss and its gradients from the same noise and timesteps;
   the benchmark ends with an error if they differ. Target: a ratio to diffusers of at most 1.03. DiffSynth-Studio takes part
   where its package is installed.
2. `levers`: our step without any of them, then with each one, then with all.
3. `blocks` (an accelerator): blocks of the A14B's shape at 32,760 tokens, bf16 over fp32 weights, forward, backward and AdamW,
   activations kept. The slope from 1 to 3 layers is a layer's time, told as TFLOP/s: an upper bound of a sharded run. Ours, ours
   compiled, and diffusers, one after the other.
4. `whole` (an accelerator): a step of the 5B model at 704 x 1280 x 121 from stored latents and prompts, ours and diffusers.
   Give --recompute, for all activations would be 180 GiB. fp32 weights and optimizer states are 75 GiB: where they do not
   fit, give --layers or --offload.

    python benchmarks/wan_step.py [--only same levers blocks whole] [--steps 20] [--bf16] [--json FILE]

MM_DEVICE chooses the device. `--shape toy` runs the last two where there is no accelerator; --peak tells shares of its peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from wan_cases import (
    ROOT,
    SHAPES,
    SIZES,
    TINY,
    UNFUSED,
    Plain,
    Synth,
    flops_of_block,
    give_latents,
    loss_of_ours,
    our_step,
    our_trainer,
    own_batches,
    plain_twin,
    stored_features,
    tokens_of,
    upstream,
)

from mm_core.accelerator import Accelerator, destroy_process_group
from mm_core.config import read_document
from mm_core.training.trainer import Trainer

WARM_UP = 4
BF16 = "param_dtype: bf16\nreduce_dtype: fp32\n"
KEEP = "recompute_modules: []\n"
COMPILED = "compile_modules: ['predictor.blocks.{*}']\n"
Step = Callable[[], object]
Seconds = tuple[float, float]
"""By the clock, and of this process's CPUs: with other jobs on the machine the second says more."""


def by_turns(runs: Mapping[str, Step], steps: int) -> dict[str, list[Seconds]]:
    """Times of each step after the warm-up, a step of each run after the other, so that each run's loader has as long."""
    accelerator = Accelerator.current()
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for number in range(steps + WARM_UP):
        for name, step in runs.items():
            accelerator.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            accelerator.synchronize()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def median(times: list[Seconds], which: int = 0) -> float:
    """Of seconds by the clock; of the CPUs' with 1."""
    return statistics.median(one[which] for one in times)


# -- the same switches --------------------------------------------------------------------------------------------------


def same(size: str, options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """The ratios of our step to the others'."""
    trainer = our_trainer(SIZES[size], fsdp2=KEEP + (BF16 if options.bf16 else ""))
    others: dict[str, Plain] = {"diffusers": plain_twin(trainer, options.bf16)}
    missing = ""
    try:
        if not options.bf16:
            others["diffsynth"] = Synth(trainer)
    except ImportError as error:
        missing = str(error)
    differ = {name: _difference(trainer, other) for name, other in others.items()}
    limit = 0.05 if options.bf16 else 1e-3
    if max(differ.values()) > limit:
        sys.exit(f"{size}: losses or gradients differ from ours, so the runs do not do the same: {differ}")
    times = by_turns({"ours": our_step(trainer), **others}, options.steps * (4 if size == "tiny" else 1))
    mine = times["ours"]
    ratios = {name: median(mine) / median(times[name]) for name in others}
    of_cpus = {name: median(mine, 1) / median(times[name], 1) for name in others}
    neighbours = {
        name: statistics.median(o / t for (o, _), (t, _) in zip(mine, times[name], strict=True))
        for name in others
    }
    return {
        "case": "same", "size": size, "parameters": sum(p.numel() for p in trainer.parameters), "steps": len(times["ours"]),
        "ms": {name: 1e3 * median(values) for name, values in times.items()}, "ratio": ratios,
        "ratio_of_neighbours": neighbours, "cpu_ratio": of_cpus, "differ": differ, "missing": missing,
    }  # fmt: skip


def _difference(trainer: Trainer, other: Plain) -> float:
    """The larger of the relative differences of loss and gradient norm, of one sample with the same noise and timestep."""
    batch = next(own_batches(trainer))
    one = {
        name: value[:1] if isinstance(value, torch.Tensor | list) else value for name, value in batch.items()
    }
    inputs: Any = next(iter(trainer.task.prepare([one])))
    diffusion = trainer.model.diffusion
    steps = torch.as_tensor(diffusion.timesteps, device=inputs.timesteps.device)
    index = (steps[None] - inputs.timesteps[:, None]).abs().argmin(1)
    prompt = other.padded(inputs.conditions["prompt"], inputs.conditions["prompt_mask"])
    found = []
    for parameters, loss in (
        (trainer.parameters, loss_of_ours(trainer, inputs)),
        (list(other.model.parameters()), other.loss(inputs.latents, prompt, inputs.noise, index)),
    ):
        loss.backward()
        squares = [p.grad.to(torch.float64).square().sum() for p in parameters if p.grad is not None]
        norm = sum(float(s.full_tensor() if hasattr(s, "full_tensor") else s) for s in squares) ** 0.5
        found.append((loss.item(), norm))
        for p in parameters:
            p.grad = None
    return max(abs(mine - its) / abs(its) for mine, its in zip(*found, strict=True))


# -- what each lever brings ---------------------------------------------------------------------------------------------


def levers(size: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Samples a second with each lever, all of them taking turns."""
    base = KEEP + (BF16 if options.bf16 else "")
    none: dict[str, Any] = {"fsdp2": base, "flags": UNFUSED}
    features = stored_features(folder / "features")
    variants: dict[str, dict[str, Any]] = {
        "none": none,
        "fused optimizer": {**none, "flags": ()},
        "compiled blocks": {**none, "fsdp2": base + COMPILED},
        "encoded ahead": {**none, "flags": (*UNFUSED, "--encode-ahead")},
        "stored features": {**none, **features},
        "all": {"fsdp2": base + COMPILED, "flags": (), **features},
    }
    if options.only_levers:
        variants = {name: v for name, v in variants.items() if name == "none" or name in options.only_levers}
    runs = {name: our_step(our_trainer(SIZES[size], **variant)) for name, variant in variants.items()}
    times = {name: median(values) for name, values in by_turns(runs, options.steps).items()}
    return [
        {
            "case": "lever",
            "size": size,
            "lever": name,
            "ms": 1e3 * seconds,
            "gain": times["none"] / seconds,
        }
        for name, seconds in times.items()
    ]


# -- published shapes ---------------------------------------------------------------------------------------------------


def ways(options: argparse.Namespace) -> dict[str, str | None]:
    """What is timed one after the other: our fsdp2.yaml, or None for diffusers' loop."""
    base = BF16 if options.bf16 else ""
    base += "recompute_modules: ['predictor.blocks.{*}']\n" if options.recompute else KEEP
    base += "offload_to_cpu: true\n" if options.offload else ""
    found: dict[str, str | None] = {"ours": base, "ours, compiled": base + COMPILED, "diffusers": None}
    return {name: text for name, text in found.items() if not options.way or name in options.way}


def step_of(
    shape: dict[str, Any], layers: int, fsdp2: str | None, options: argparse.Namespace
) -> tuple[Step, Trainer]:
    """A step on latents of a published shape."""
    channels = shape["latents"][0]
    fields = {name: value for name, value in shape.items() if name != "latents"}
    fields |= {
        "num_layers": layers if fsdp2 is not None else 1,
        "in_dim": channels,
        "out_dim": channels,
    }
    if options.attention:
        fields["attention_backend"] = options.attention
    encoder = {
        "model_id": "UMT5", "init": "random", "dtype": "fp32",
        "config": {"vocab_size": 682, "d_model": shape["text_dim"], "d_kv": 16, "d_ff": 16, "num_layers": 1, "num_heads": 1},
    }  # fmt: skip
    ae = {
        "model_id": "wan_video_vae", "init": "random", "base_dim": 8, "z_dim": channels, "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, "do_sample": False,
    }  # fmt: skip
    # No clip is read; the sections only have to go together.
    data = read_document(TINY / "data.json").data
    data["dataset_param"]["preprocess_parameters"] |= {"num_frames": 5, "max_height": 32, "max_width": 48}
    data["dataset_param"]["tokenizer_config"]["model_max_length"] = shape["text_len"]
    trainer = our_trainer(
        fields, model={"text_encoder": encoder, "ae": ae}, data=data, fsdp2=fsdp2 or KEEP, micro_batch=1,
        flags=("--num-workers", "0"),
    )  # fmt: skip
    given = give_latents(trainer, shape)
    if fsdp2 is not None:
        return our_step(trainer), trainer
    plain = Plain(
        upstream(trainer, num_layers=layers),
        trainer,
        None,
        given=given,
        bf16=options.bf16,
        recompute=options.recompute,
        offload=options.offload,
    )
    return plain, trainer


def timed(
    name: str, shape: dict[str, Any], layers: int, fsdp2: str | None, options: argparse.Namespace
) -> tuple[float, int]:
    """Median seconds of a step by itself, and the allocator's peak in bytes; `name` is that of the way, for files."""
    accelerator = Accelerator.current()
    step, trainer = step_of(shape, layers, fsdp2, options)
    if accelerator.type != "cpu":
        torch.get_device_module(accelerator.device).reset_peak_memory_stats()
    times = by_turns({"": step}, options.steps)[""]
    if options.profile:
        _profile(step, options.profile / f"{name}-{layers}.txt")
    peak = accelerator.max_memory_bytes()
    del step, trainer
    torch.compiler.reset()  # compiled code is of no more use
    gc.collect()
    if accelerator.type != "cpu":
        torch.get_device_module(accelerator.device).empty_cache()
    return median(times), peak


def _profile(step: Step, path: Path) -> None:
    """Write which kernels one step spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = Accelerator.current().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with profile(activities=activities) as profiler:
        step()
        Accelerator.current().synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def blocks(name: str, options: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """The time of a layer, from steps of models with few and with more."""
    shape, rows = SHAPES[name], []
    few, more = options.layers or (1, 3)
    for way, fsdp2 in ways(options).items():
        (short, _), (long, peak) = (timed(way, shape, n, fsdp2, options) for n in (few, more))
        layer = (long - short) / (more - few)
        tflops = flops_of_block(shape) / layer / 1e12
        rows.append({
            "case": "blocks", "shape": name, "way": way, "layers": [few, more], "tokens": tokens_of(shape),
            "step_ms": [1e3 * short, 1e3 * long], "layer_ms": 1e3 * layer, "tflops": tflops, "peak_bytes": peak,
            **({"share_of_peak": tflops / options.peak} if options.peak else {}),
        })  # fmt: skip
    return rows


def whole(name: str, options: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """Steps of a whole model."""
    shape, rows = SHAPES[name], []
    layers = options.layers[-1] if options.layers else shape["num_layers"]
    for way, fsdp2 in ways(options).items():
        seconds, peak = timed(way, shape, layers, fsdp2, options)
        # The blocks alone; what is recomputed is not counted twice.
        tflops = layers * flops_of_block(shape) / seconds / 1e12
        rows.append({
            "case": "whole", "shape": name, "way": way, "layers": layers, "tokens": tokens_of(shape), "ms": 1e3 * seconds,
            "tflops": tflops, "peak_bytes": peak, **({"share_of_peak": tflops / options.peak} if options.peak else {}),
        })  # fmt: skip
    return rows


# -- telling ------------------------------------------------------------------------------------------------------------


def tell(row: Mapping[str, Any]) -> str:
    """A result in one line."""
    share = f", {row['share_of_peak']:.1%} of peak" if "share_of_peak" in row else ""
    match row["case"]:
        case "same":
            others = "; ".join(
                f"{name} {row['ms'][name]:.1f} ms, ratio {ratio:.3f} (of neighbouring steps "
                f"{row['ratio_of_neighbours'][name]:.3f}, of CPU time {row['cpu_ratio'][name]:.3f}; loss and gradients differ "
                f"by {row['differ'][name]:.1e})"
                for name, ratio in row["ratio"].items()
            )
            absent = f"; DiffSynth-Studio is not installed ({row['missing']})" if row["missing"] else ""
            return (
                f"same switches, {row['size']} ({row['parameters'] / 1e6:.1f} M): ours {row['ms']['ours']:.1f} ms, {others} "
                f"(target <= 1.03 to diffusers){absent}"
            )
        case "lever":
            return f"{row['size']}, {row['lever']}: {row['ms']:.1f} ms, gain {row['gain']:.3f}"
        case "blocks":
            few, more = row["layers"]
            return (
                f"blocks of {row['shape']}, {row['tokens']} tokens, {row['way']}: {few} and {more} layers "
                f"{row['step_ms'][0]:.1f} and {row['step_ms'][1]:.1f} ms, a layer {row['layer_ms']:.1f} ms, "
                f"{row['tflops']:.2f} TFLOP/s{share}; peak {row['peak_bytes'] / 2**30:.1f} GiB"
            )
    return (
        f"step of {row['shape']} with {row['layers']} layers, {row['tokens']} tokens, {row['way']}: {row['ms']:.1f} ms, "
        f"{row['tflops']:.2f} TFLOP/s{share}; peak {row['peak_bytes'] / 2**30:.1f} GiB"
    )


CASES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "same": (("tiny", "small"), same),
    "levers": (("small",), levers),
    "blocks": (("A14B",), blocks),
    "whole": (("5B",), whole),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=["same", "levers"])
    parser.add_argument("--size", nargs="+", choices=SIZES, help="same, levers: instead of each case's own")
    parser.add_argument("--shape", choices=SHAPES, help="blocks, whole: instead of each case's own")
    parser.add_argument("--only-levers", nargs="+", help="levers: these, and none")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="blocks: fewer and more, 1 3; whole: as many as this"
    )
    parser.add_argument(
        "--way", nargs="+", help="blocks, whole: some of 'ours', 'ours, compiled', 'diffusers'"
    )
    parser.add_argument("--attention", help="blocks, whole: attention_backend of our predictor")
    parser.add_argument("--recompute", action="store_true", help="whole: blocks are recomputed in backward")
    parser.add_argument("--offload", action="store_true", help="whole: weights and optimizer in host memory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, to tell the share of it")
    parser.add_argument(
        "--profile", type=Path, help="blocks, whole: folder for tables of where a step's time goes"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    os.chdir(ROOT)  # the example's paths are meant from here
    accelerator = Accelerator.current()
    accelerator.init_process_group()
    sys.stdout.write(
        f"torch {torch.__version__}, {accelerator.type}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}{', bf16' if options.bf16 else ''}\n"
    )
    rows: list[dict[str, Any]] = []
    for case in options.only:
        names, measure = CASES[case]
        chosen = [options.shape] if options.shape else names
        for name in (options.size or names) if case in ("same", "levers") else chosen:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(name, options, Path(folder))
            found = found if isinstance(found, list) else [found]
            for row in found:
                sys.stdout.write(tell(row) + "\n")
                sys.stdout.flush()
            rows += found
            gc.collect()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    destroy_process_group()


if __name__ == "__main__":
    main()
