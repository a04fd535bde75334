"""The demo: train a tiny Wan2.2 on two real clips, and regenerate them from their captions before and after.

Run from anywhere by `make demo`. Everything it does is a command that you can type yourself; it prints each one.
What it makes lies in `runs/demo` (an older run is moved aside, not deleted).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = Path("examples/tiny/wan22-t2v")  # commands run from the repository root, as their relative paths ask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", default="runs/demo", help="folder of the run (default: runs/demo)")
    parser.add_argument("--train-iters", type=int, default=800, help="optimizer steps (default: 800)")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    started = time.perf_counter()
    run = ROOT / options.save
    move_aside(run)
    run.mkdir(parents=True)

    # Before: the same model with the random weights that training starts from.
    from mm_core.config import read_document

    untrained = read_document(ROOT / HERE / "inference_model.json").data
    untrained["predictor"]["init"] = "random"
    (run / "inference_untrained.json").write_text(json.dumps(untrained, indent=2))
    prompts = str(HERE / "prompts.txt")
    generate = ["--prompt", prompts, "--seed", str(options.seed)]
    mm("generate", "--mm-model", f"{options.save}/inference_untrained.json", *generate,
       "--save-path", f"{options.save}/generated/before")  # fmt: skip

    mm("train",
       "--mm-model", str(HERE / "model.json"), "--mm-data", str(HERE / "data.json"),
       "--mm-tool", str(HERE / "tools.json"), "--fsdp2-config-path", str(HERE / "fsdp2.yaml"),
       "--train-iters", str(options.train_iters), "--num-workers", "0", "--micro-batch-size", "2", "--global-batch-size", "2",
       "--lr", "5e-3", "--lr-decay-style", "cosine", "--clip-grad", "1.0",
       "--lr-warmup-iters", str(min(20, options.train_iters // 2)),
       "--seed", str(options.seed), "--save", options.save, "--save-interval", str(options.train_iters))  # fmt: skip

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
    import numpy as np

    from mm_core.config import load_training_job, parse_train_flags
    from mm_core.data import build_dataset
    from mm_core.generation import psnr, read_video, side_by_side, to_frames, write_video
    from mm_core.observe.plots import plot_loss

    # The real clips, exactly as training sees them.
    flags = [
        "--mm-model", str(HERE / "model.json"), "--mm-data", str(HERE / "data.json"), "--train-iters", "1", "--lr", "1",
    ]  # fmt: skip
    os.chdir(ROOT)
    job = load_training_job(parse_train_flags(flags))
    dataset = build_dataset(job.components["dataset"], options.seed)
    real = [to_frames(dataset.get(index, index)["video"]) for index in range(len(dataset))]
    clips = {"real": real}
    scores = {}
    videos = {}
    for when in ("before", "after"):
        clips[when] = [read_video(path) for path in sorted((run / "generated" / when).glob("*.mp4"))]
        scores[when] = [psnr(made, shown) for made, shown in zip(clips[when], real, strict=True)]
        wide = (
            np.concatenate(clips[when], axis=2).repeat(6, axis=1).repeat(6, axis=2)
        )  # [T, H, clips * W, 3], enlarged
        videos[when] = write_video(run / f"{when}.mp4", wide, fps=4)
    rows = {
        label: np.concatenate(clips[name], axis=2)
        for label, name in {
            "the real clips": "real",
            "generated from their captions before training": "before",
            f"generated from their captions after {options.train_iters} steps": "after",
        }.items()
    }
    summary: dict[str, object] = {
        "psnr_before_db": float(np.mean(scores["before"])),
        "psnr_after_db": float(np.mean(scores["after"])),
        "psnr_each_clip_db": scores,
        "steps": options.train_iters,
        "seconds": round(time.perf_counter() - started, 1),
        "before": str(videos["before"].relative_to(ROOT)),
        "after": str(videos["after"].relative_to(ROOT)),
        "comparison": str(side_by_side(run / "comparison.png", rows, columns=4, scale=3).relative_to(ROOT)),
        "loss": str(plot_loss(run / "metrics.jsonl", run / "loss.png").relative_to(ROOT)),
        "metrics": str((run / "metrics.jsonl").relative_to(ROOT)),
        "run": str(run.relative_to(ROOT)),
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def report(summary: dict[str, object], run: Path) -> str:
    """What the demo prints at its end."""
    before, after = summary["psnr_before_db"], summary["psnr_after_db"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    paths = [summary[name] for name in ("comparison", "before", "after", "loss", "metrics")]
    lines = [
        "",
        f"The clips regenerated from their captions: {before:.1f} dB PSNR before training, {after:.1f} dB after "
        f"{summary['steps']} steps ({after - before:+.1f} dB), in {summary['seconds']} s.",
        "",
        *(f"  {path}" for path in paths),
        f"  {(run / 'summary.json').relative_to(ROOT)}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
