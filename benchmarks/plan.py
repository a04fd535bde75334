"""The tables of docs/choose-a-parallelism.md: plans of real models on 8 to 256 devices. Nothing is timed.

python benchmarks/plan.py [--device h100] [--only 5B A14B]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mm_core.config.planned_job import load_planned_job
from mm_core.planning.devices import find_device
from mm_core.planning.model import PlanResult
from mm_core.planning.plan import plan_job
from mm_core.planning.report import seconds_text
from mm_core.planning.roofline import PUBLISHED, model_tflops
from mm_registry.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_GIB = 1024**3
_WAN, _QWEN = ROOT / "examples/wan2.2", ROOT / "examples/qwen3vl"


def _wan(size: str, model: str = "pretrain_model.json") -> list[str]:
    folder = _WAN / size
    return [
        "--mm-model", str(folder / "t2v" / model), "--mm-data", str(folder / "t2v/data.json"),
        "--fsdp2-config-path", str(folder / "fsdp2.yaml"),
    ]  # fmt: skip


def _qwen(size: str) -> list[str]:
    return [
        "--mm-model", str(_QWEN / size / "model.json"), "--mm-data", str(_QWEN / "data.json"),
        "--fsdp2-config-path", str(_QWEN / "fsdp2.yaml"), "--micro-batch-size", "4",
    ]  # fmt: skip


MODELS = {
    "Wan2.2 5B": _wan("5B"),
    "Wan2.2 A14B": _wan("A14B", "pretrain_model_high.json"),
    "Qwen3-VL 8B": _qwen("8B"),
    "Qwen3-VL 30B-A3B": _qwen("30B-A3B"),
    "Qwen3-VL 235B-A22B": _qwen("235B-A22B"),
}
CHOICES = {
    "FSDP over all": ["fsdp2.sharding_size=auto"],
    "FSDP in a machine (HSDP)": ["fsdp2.sharding_size=8"],
    "FSDP × context 8": ["fsdp2.sharding_size=auto", "--context-parallel-size", "8"],
    "FSDP × experts 8": ["fsdp2.sharding_size=auto", "fsdp2.expert_parallel_size=8"],
    "FSDP × experts 64": ["fsdp2.sharding_size=auto", "fsdp2.expert_parallel_size=64"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h100")
    parser.add_argument("--only", nargs="*", default=[], help="parts of models' names")
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64, 256])
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    _write(
        "| model | ranks | choice | between steps | peak | when | step at least | TFLOP/s a device | fits |"
    )
    _write("|" + "---|" * 9)
    for model, files in MODELS.items():
        if arguments.only and not any(part in model for part in arguments.only):
            continue
        for ranks in arguments.ranks:
            for choice, flags in CHOICES.items():
                if not _makes_sense(model, ranks, choice):
                    continue
                started = time.perf_counter()
                try:
                    result = plan_job(load_planned_job([*files, *flags], ranks), device, with_advice=False)
                except UserError as error:
                    sys.stderr.write(f"{model}, {ranks} ranks, {choice}: {error}\n")
                    continue
                _write(_row(model, ranks, choice, result))
                sys.stderr.write(f"{model}, {ranks} ranks, {choice}: {time.perf_counter() - started:.1f} s\n")
    _published()


def _makes_sense(model: str, ranks: int, choice: str) -> bool:
    if "experts" in choice:
        return ("A3B" in model or "A22B" in model) and ranks >= int(choice.split()[-1])
    if "machine" in choice:
        return ranks > 8
    return "context" not in choice or "Wan" in model


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _row(model: str, ranks: int, choice: str, result: PlanResult) -> str:
    timeline, seconds = result.costs.timeline, result.time.total
    cells = (
        model, str(ranks), choice, f"{result.costs.steady.total / _GIB:.1f} GiB", f"{result.peak_bytes / _GIB:.1f} GiB",
        timeline.moment, seconds_text(seconds), f"{model_tflops(result.costs, seconds):.0f}",
        "yes" if result.fits else "no",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _published() -> None:
    """Wan2.1-14B, which has the network of A14B, at 24 × 30 × 52 = 37,440 tokens."""
    frames = "data.dataset_param.preprocess_parameters.num_frames=93"
    files = [*_wan("A14B", "pretrain_model_high.json"), frames, "fsdp2.sharding_size=8"]
    # Megatron recomputes 10 of the 40 blocks; ranks that share a sequence stand for those that share tensors.
    settings: tuple[list[str], ...] = ([], ["--context-parallel-size", "8", "fsdp2.recompute_num_layers=10"])
    _write("\n| published | TFLOP/s | of the peak | roofline | reached |\n|---|---|---|---|---|")
    for point, flags in zip(PUBLISHED, settings, strict=True):
        device = find_device("h100").model_copy(update={"attention_efficiency": point.attention_efficiency})
        result = plan_job(load_planned_job([*files, *flags], point.ranks), device, with_advice=False)
        best = model_tflops(result.costs, result.time.total)
        _write(
            f"| {point.title}, {point.ranks} devices | {point.tflops:.0f} | {point.tflops * 1e12 / device.bf16_flops:.0%} | "
            f"{best:.0f} | {point.tflops / best:.0%} |"
        )


if __name__ == "__main__":
    main()
