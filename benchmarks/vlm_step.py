"""Training a vision-language model: our step against transformers' `Trainer` with accelerate, and what our levers bring.

1. Same switches: the same weights, batches and losses, padded, with all logits, fused AdamW, clipping at 1.0. The two
   take turns step by step in one process; everything between two steps counts. Target: a ratio of at most 1.03. The
   losses of both are compared, and the benchmark ends with an error if they are not the same.
2. Levers: the same without any of them, then with each one, then with all; tokens that are no padding a second.
3. Memory with a vocabulary of 151 936: the peak of a step, transformers' loss against chunks of the logits. Target: at
   most 0.6. On a CPU the bytes of all tensors that are alive are counted, on an accelerator the allocator's peak.
4. Packing: tokens a second, packed against padded, on a realistic mix of lengths. Target: at least 1.8.

    python benchmarks/vlm_step.py [--only same levers memory packing] [--steps 20] [--bf16] [--json FILE]

MM_DEVICE chooses the device. `--only same --size 8B --layers 4 --length 2048 --bf16 --peak 989` times the published
shape with fewer layers, random weights.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging
from vlm_cases import ROOT, SIZES, Ours, Samples, by_turns, lengths_of, our_trainer, write_weights

from mm_core.accelerator import Accelerator, destroy_process_group
from mm_core.planning.live_bytes import LiveBytes

WARM_UP = 4
UNFUSED = ("--optimizer-selection", "torch_adamw")
BF16 = "param_dtype: bf16\nreduce_dtype: fp32\n"
CHUNKED = {"compute_mode": "dynamic_chunk", "chunk_size": 1024}


def same(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The ratio of our step to transformers'."""
    write_weights(folder, size, options.layers)
    vocabulary, micro_batch = SIZES[size]["vocabulary"], options.micro_batch
    samples = Samples([options.length] * 64 if options.length else lengths_of(64, longest=512), vocabulary)
    experts = "eager" if "experts" in SIZES[size] else None
    text = {"experts_implementation": experts} if experts else {}
    ours = Ours(
        our_trainer(
            folder,
            samples,
            micro_batch,
            text=text,
            fsdp2=BF16 if options.bf16 else "",
        )
    )
    steps = options.steps + WARM_UP
    times, losses = by_turns(
        folder, samples, micro_batch, steps, {"ours": ours}, experts=experts, bf16=options.bf16
    )
    difference = max(abs(a - b) / b for a, b in zip(ours.losses, losses, strict=True))
    if difference > (0.02 if options.bf16 else 1e-3):
        sys.exit(f"{size}: the losses differ by {difference:.2%}, so the two do not do the same")
    return {
        "case": "same", "size": size, "parameters": sum(p.numel() for p in ours.trainer.parameters), "steps": options.steps,
        **_compared([t for t, _ in times["ours"]], [t for t, _ in times["transformers"]]),
        **{f"cpu_{k}": v for k, v in _compared([t for _, t in times["ours"]], [t for _, t in times["transformers"]]).items()},
        "losses_differ": difference,
        **({f"{name}_{k}": v for name in ("ours", "transformers") for k, v in _speed(ours, options, times[name]).items()}
           if options.length and not experts else {}),
    }  # fmt: skip


def _speed(run: Ours, options: argparse.Namespace, times: list[tuple[float, float]]) -> dict[str, float]:
    """Tokens and TFLOP a second of the text model, of sequences of one length: its layers' and its head's matrix products,
    forward and twice that backward, and half of all pairs of tokens in attention.
    """
    network: Any = run.trainer.model.model
    text = network.config.get_text_config()
    matrices = (
        sum(p.numel() for p in network.model.language_model.layers.parameters())
        + network.lm_head.weight.numel()
    )
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim * options.length
    tokens = options.micro_batch * options.length / statistics.median(t for t, _ in times[WARM_UP:])
    speed = {"tokens_per_second": tokens, "tflops": 6 * (matrices + attention) * tokens / 1e12}
    return {**speed, "share_of_peak": speed["tflops"] / options.peak} if options.peak else speed


def _compared(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
    one, other = statistics.median(ours), statistics.median(theirs)
    return {
        "ours_ms": 1e3 * one, "transformers_ms": 1e3 * other, "ratio": one / other,
        "ratio_of_neighbours": statistics.median(o / t for o, t in zip(ours, theirs, strict=True)),
    }  # fmt: skip


def levers(size: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Tokens a second with each lever, all of them taking turns."""
    write_weights(folder, size, options.layers)
    vocabulary, lengths = SIZES[size]["vocabulary"], lengths_of(256, longest=512)
    padded, packed = Samples(lengths, vocabulary), Samples(lengths, vocabulary, capacity=512)
    experts = "experts" in SIZES[size]
    slow = {"experts_implementation": "eager"} if experts else {}
    grouped = {"experts_implementation": "grouped_mm"} if experts else {}
    none = {"samples": padded, "micro_batch": 4, "text": slow, "flags": UNFUSED}
    # As many tokens of memory: four samples of up to 512, or four sequences of 512.
    variants: dict[str, dict[str, Any]] = {
        "none": none,
        "fused optimizer": {**none, "flags": ()},
        "chunked loss": {**none, "loss": CHUNKED},
        **({"grouped experts": {**none, "text": grouped}} if experts else {}),
        "packing": {**none, "samples": packed},
        "all": {"samples": packed, "micro_batch": 4, "text": grouped, "flags": (), "loss": CHUNKED},
    }
    speeds = taking_turns(
        {name: lambda v=v: our_trainer(folder, fsdp2=BF16 if options.bf16 else "", **v) for name, v in variants.items()},
        options.steps,
    )  # fmt: skip
    return [
        {
            "case": "lever",
            "size": size,
            "lever": name,
            "tokens_per_second": speed,
            "gain": speed / speeds["none"],
        }
        for name, speed in speeds.items()
    ]


def packing(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Packed against padded, all else equal."""
    write_weights(folder, size, options.layers)
    vocabulary, lengths = SIZES[size]["vocabulary"], lengths_of(512)
    made: dict[str, Callable[[], Any]] = {
        "padded": lambda: our_trainer(folder, Samples(lengths, vocabulary), 4),
        "packed": lambda: our_trainer(folder, Samples(lengths, vocabulary, capacity=1024), 2),
    }
    speeds = taking_turns(made, options.steps)
    mean = statistics.mean(lengths)
    return {
        "case": "packing", "size": size, "mean_length": mean, "longest": max(lengths), **speeds,
        "ratio": speeds["packed"] / speeds["padded"],
    }  # fmt: skip


def taking_turns(made: Mapping[str, Callable[[], Any]], steps: int) -> dict[str, float]:
    """Tokens a second of several of our trainers, a step of each after the other."""
    import time

    accelerator = Accelerator.current()
    runs = {name: Ours(make()) for name, make in made.items()}
    seconds, tokens = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
    for number in range(steps + WARM_UP):
        for name, run in runs.items():
            before, began = run.tokens, time.perf_counter()
            run()
            accelerator.synchronize()
            if number >= WARM_UP:
                seconds[name] += time.perf_counter() - began
                tokens[name] += run.tokens - before
    return {name: tokens[name] / seconds[name] for name in runs}


def memory(size: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peaks of a step."""
    write_weights(folder, size, options.layers)
    samples = Samples([256] * 16, SIZES[size]["vocabulary"])
    fsdp2 = BF16 if options.bf16 else ""
    peaks = {"transformers": _peak(lambda: by_turns(folder, samples, 4, 2, {}, bf16=options.bf16))}
    for name, loss in (
        ("all logits", {}),
        ("chunk", {"compute_mode": "chunk", "chunk_size": 64}),
        ("dynamic_chunk", {"compute_mode": "dynamic_chunk", "chunk_size": 256}),
    ):

        def two_steps(loss: dict[str, Any] = loss) -> None:
            run = Ours(our_trainer(folder, samples, 4, loss=loss, fsdp2=fsdp2))
            run()
            run()

        peaks[name] = _peak(two_steps)
    return [
        {
            "case": "memory",
            "size": size,
            "loss": name,
            "peak_bytes": peak,
            "ratio": peak / peaks["transformers"],
        }
        for name, peak in peaks.items()
    ]


def _peak(work: Callable[[], object]) -> int:
    accelerator = Accelerator.current()
    gc.collect()
    if accelerator.type == "cpu":
        live = LiveBytes()
        with live:
            work()
        return live.peak
    device: Any = torch.get_device_module(accelerator.device)
    device.empty_cache()
    device.reset_peak_memory_stats()
    work()
    return int(device.max_memory_allocated())


def tell(row: Mapping[str, Any]) -> str:
    """A result in one line."""
    match row["case"]:
        case "same":
            return (
                f"same switches, {row['size']} ({row['parameters'] / 1e6:.1f} M): ours {row['ours_ms']:.1f} ms, transformers "
                f"{row['transformers_ms']:.1f} ms, ratio {row['ratio']:.3f} (of neighbouring steps "
                f"{row['ratio_of_neighbours']:.3f}, of CPU time {row['cpu_ratio']:.3f}; target <= 1.03); "
                f"losses differ by {row['losses_differ']:.1e}"
                + "".join(
                    f"; {name}: {row[f'{name}_tokens_per_second']:.0f} tokens/s, {row[f'{name}_tflops']:.1f} TFLOP/s"
                    + (
                        f", {row[f'{name}_share_of_peak']:.1%} of peak"
                        if f"{name}_share_of_peak" in row
                        else ""
                    )
                    for name in ("ours", "transformers")
                    if f"{name}_tflops" in row
                )
            )
        case "lever":
            return f"{row['size']}, {row['lever']}: {row['tokens_per_second']:.0f} tokens/s, gain {row['gain']:.2f}"
        case "memory":
            return f"vocabulary of 151936, {row['loss']}: peak {row['peak_bytes'] / 1e6:.0f} MB, ratio {row['ratio']:.2f}"
    return (
        f"packing, {row['size']}, lengths of {row['mean_length']:.0f} in the mean and {row['longest']} at most: padded "
        f"{row['padded']:.0f} tokens/s, packed {row['packed']:.0f}, ratio {row['ratio']:.2f} (target >= 1.8)"
    )


CASES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "same": (("tiny", "small", "experts"), same),
    "levers": (("small", "experts"), levers),
    "memory": (("vocabulary",), memory),
    "packing": (("small",), packing),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--size", nargs="+", choices=SIZES, help="sizes instead of each case's own")
    parser.add_argument("--layers", type=int, help="of the text model, instead of the size's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--length", type=int, help="same: tokens of every sample, instead of a mix; tells TFLOP/s"
    )
    parser.add_argument("--micro-batch", type=int, default=4, help="same: samples of a step")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, to tell the share of it")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.chdir(ROOT)  # the clips' paths are meant from here
    accelerator = Accelerator.current()
    accelerator.init_process_group()
    sys.stdout.write(
        f"torch {torch.__version__}, {accelerator.type}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}{', bf16' if options.bf16 else ''}\n"
    )
    rows: list[dict[str, Any]] = []
    for case in options.only:
        sizes, measure = CASES[case]
        for size in options.size or sizes:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(size, options, Path(folder))
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
