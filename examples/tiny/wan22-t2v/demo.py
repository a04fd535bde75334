"""The demo: train a tiny Wan2.2 on a real clip, and regenerate the clip from its caption before and after.

Run from anywhere by `make demo`. Everything it does is a command that you can type yourself; it prints each one.
What it makes lies in `runs/demo` (an older run is moved aside, not deleted).
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = Path("examples/tiny/wan22-t2v")  # commands run from the repository root, as their relative paths ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="runs/demo", help="folder of the run (default: runs/demo)")
    parser.add_argument("--train-iters", type=int, default=900, help="optimizer steps (default: 900)")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    started = time.perf_counter()
    run = ROOT / options.save
    move_aside(run)
    run.mkdir(parents=True)

    # Before: the same model with the random weights that training starts from.
    untrained = json.loads((ROOT / HERE / "inference_model.json").read_text())
    untrained["predictor"]["init"] = "random"
    (run / "inference_untrained.json").write_text(json.dumps(untrained, indent=2))
    prompts = str(HERE / "prompts.txt")
    generate = ["--prompt", prompts, "--seed", str(options.seed)]
    mm("generate", "--mm-model", f"{options.save}/inference_untrained.json", *generate, "--save-path", f"{options.save}/generated/before")

    mm("train",
       "--mm-model", str(HERE / "model.json"), "--mm-data", str(HERE / "data.json"),
       "--mm-tool", str(HERE / "tools.json"), "--fsdp2-config-path", str(HERE / "fsdp2.yaml"),
       "--train-iters", str(options.train_iters), "--micro-batch-size", "4", "--global-batch-size", "4",
       "--lr", "2e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "20", "--clip-grad", "1.0",
       "--seed", str(options.seed), "--save", options.save, "--save-interval", "300")  # fmt: skip

    mm("generate", "--mm-model", str(HERE / "inference_model.json"), "--load", options.save, *generate,
       "--save-path", f"{options.save}/generated/after")  # fmt: skip

    summary = compare(run, options, started)
    sys.stdout.write(report(summary, run))


def mm(*arguments: str) -> None:
    """Run one `mm` command from the repository root, showing it first."""
    sys.stdout.write("\n$ mm " + shlex.join(arguments) + "\n")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "mm_core", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def move_aside(run: Path) -> None:
    """Keep an older run under a numbered name."""
    if not run.exists():
        return
    number = 1
    while (older := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    run.rename(older)
    sys.stdout.write(f"{run.relative_to(ROOT)} existed; it is {older.relative_to(ROOT)} now.\n")


def compare(run: Path, options: argparse.Namespace, started: float) -> dict[str, object]:
    """PSNR of the generated clips against the real ones, and the pictures."""
    from mm_core.config import load_training_job, parse_train_flags
    from mm_core.data import build_dataset
    from mm_core.generation.video import psnr, read_video, side_by_side
    from mm_core.observe.plots import plot_loss

    flags = ["--mm-model", str(ROOT / HERE / "model.json"), "--mm-data", str(ROOT / HERE / "data.json")]
    raise NotImplementedError(flags)


if __name__ == "__main__":
    main()
