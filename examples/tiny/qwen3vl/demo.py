"""The demo: train a tiny Qwen3-VL on eight photographs, and ask it what they show before and after.

Run from anywhere by `make demo-vl`. Everything it does is a command that you can type yourself; it prints each one.
What it makes lies in `runs/demo-vl` (an older run is moved aside, not deleted). It also asks about the same photographs
mirrored, which training never shows. Exit code 1: it did not learn the captions.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parents[3]
HERE = Path("examples/tiny/qwen3vl")  # commands run from the repository root, as their relative paths ask
WHEN = ("before", "after")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", default="runs/demo-vl", help="folder of the run (default: runs/demo-vl)")
    parser.add_argument("--train-iters", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    started = time.perf_counter()
    run = ROOT / options.save
    move_aside(run)
    run.mkdir(parents=True)
    questions = write_questions(run)
    ask = ["--input", str(questions), "--max-new-tokens", "32", "--seed", str(options.seed)]

    # Before: the random weights that training starts from, which the seed decides.
    mm("generate", "--mm-model", str(HERE / "model.json"), *ask, "--output", f"{options.save}/before.jsonl")

    mm("train", str(HERE / "job.yaml"), "--train-iters", str(options.train_iters), "--seed", str(options.seed),
       "--lr-warmup-iters", str(min(20, options.train_iters // 2)),
       "--save", options.save, "--save-interval", str(options.train_iters))  # fmt: skip

    mm("generate", "--load", options.save, *ask, "--output", f"{options.save}/after.jsonl")

    summary = compare(run, options, started)
    sys.stdout.write(report(summary))
    if not (summary["right_after"] == summary["photographs"] and summary["right_before"] == 0):
        sys.stdout.write("The captions were not learnt.\n")
        raise SystemExit(1)


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
    sys.stdout.write(f"{run} existed; it is {older} now.\n")


def write_questions(run: Path) -> Path:
    """Write what is asked: about each photograph, then about each one mirrored."""
    folder = run / "mirrored"
    folder.mkdir()
    rows, mirrored = [], []
    for line in (ROOT / HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        photo = ROOT / HERE / row["images"][0]
        with Image.open(photo) as image:
            ImageOps.mirror(image).save(folder / photo.name, quality=90)
        rows.append({**row, "images": [str(photo)]})
        mirrored.append({**row, "images": [str(folder / photo.name)]})
    questions = run / "questions.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (*rows, *mirrored)]
    questions.write_text("".join(lines), encoding="utf-8")
    return questions


def compare(run: Path, options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Count the right replies, and make the pages to look at."""
    from mm_core.observe.plots import plot_loss

    rows = json.loads((ROOT / HERE / "conversations.json").read_text(encoding="utf-8"))
    captions = [row["messages"][-1]["content"] for row in rows]
    photos = [ROOT / HERE / row["images"][0] for row in rows]
    replies = {
        when: [
            json.loads(line)["reply"]
            for line in (run / f"{when}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for when in WHEN
    }
    count = len(captions)
    right = {when: [a == b for a, b in zip(replies[when], captions * 2, strict=True)] for when in WHEN}
    plot_loss(run / "metrics.jsonl", run / "loss.png")
    write_page(run, photos, captions, replies, options.train_iters)
    draw_sheet(run, photos, captions, replies)
    summary = {
        "photographs": count,
        "right_before": sum(right["before"][:count]),
        "right_after": sum(right["after"][:count]),
        "right_mirrored_before": sum(right["before"][count:]),
        "right_mirrored_after": sum(right["after"][count:]),
        "steps": options.train_iters,
        "seconds": round(time.perf_counter() - started, 1),
        "look_at": [f"{options.save}/{name}" for name in ("index.html", "comparison.png", "loss.png")],
        "metrics": f"{options.save}/metrics.jsonl",
        "run": options.save,
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def write_page(
    run: Path, photos: list[Path], captions: list[str], replies: dict[str, list[str]], steps: int
) -> None:
    """Write `index.html`: each photograph with what the model says of it. One file, nothing is fetched."""
    figures = []
    for index, (photo, caption) in enumerate(zip(photos, captions, strict=True)):
        data = base64.b64encode(photo.read_bytes()).decode()
        said = {when: html.escape(replies[when][index]) for when in WHEN}
        sign = "✓" if replies["after"][index] == caption else "✗"
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{data}"><figcaption><p class="before">before: {said["before"]}</p>'
            f"<p>after {steps} steps: {said['after']} {sign}</p></figcaption></figure>"
        )
    style = (
        "body{font-family:sans-serif;display:flex;flex-wrap:wrap;gap:1em}figure{width:256px;margin:0}"
        "img{width:256px}.before{color:#888;overflow-wrap:anywhere}h1{width:100%;font-size:1.2em}"
    )
    title = "A tiny Qwen3-VL says what photographs show"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{''.join(figures)}</html>\n"
    )
    (run / "index.html").write_text(page, encoding="utf-8")


def draw_sheet(run: Path, photos: list[Path], captions: list[str], replies: dict[str, list[str]]) -> None:
    """Write `comparison.png`: a row for each photograph."""
    height, left = 110, 150
    sheet = Image.new("RGB", (760, height * len(photos)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (photo, caption) in enumerate(zip(photos, captions, strict=True)):
        with Image.open(photo) as image:
            small = image.convert("RGB")
        small.thumbnail((left - 20, height - 10))
        sheet.paste(small, (10, row * height + 5))
        for line, (name, text) in enumerate(
            (("caption", caption), *((when, replies[when][row]) for when in WHEN))
        ):
            shown = "".join(c if c.isprintable() and c.isascii() else "?" for c in text)[:85]
            fill = "black" if name != "after" else ("green" if text == caption else "red")
            draw.text((left, row * height + 20 + 25 * line), f"{name:8} {shown}", fill=fill)
    sheet.save(run / "comparison.png")


def report(summary: dict[str, Any]) -> str:
    """What the demo prints at its end."""
    count = summary["photographs"]
    lines = [
        "",
        f"Right captions: {summary['right_before']} of {count} photographs before training, {summary['right_after']} after "
        f"{summary['steps']} steps; mirrored, as it never saw them: {summary['right_mirrored_after']} of {count}. "
        f"{summary['seconds']} s.",
        "",
        *(
            f"  {path}"
            for path in (*summary["look_at"], summary["metrics"], summary["run"] + "/summary.json")
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
