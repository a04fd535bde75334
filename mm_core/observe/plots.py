"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def plot_loss(metrics: Path, picture: Path) -> Path:
    """Draw loss (raw and smoothed) and learning rate of a `metrics.jsonl` into a PNG, and return its path."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [r["step"] for r in records]
    losses = [r["loss"] for r in records]
    smooth: list[float] = []
    for loss in losses:  # exponential moving average over about 20 steps
        smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="loss")
    axis.plot(steps, smooth, color="C0", linewidth=1.8, label="loss, smoothed")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    rate = axis.twinx()
    rate.plot(steps, [r["lr"] for r in records], color="C1", linewidth=1.0, label="learning rate")
    rate.set_ylabel("learning rate")
    lines = [*axis.get_lines(), *rate.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    return picture
