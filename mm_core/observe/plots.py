"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from mm_registry.errors import UserError


def plot_loss(metrics: Path, picture: Path) -> Path:
    """Draw loss (raw and smoothed) and learning rate of a `metrics.jsonl` into a PNG, and return its path.

    Raises:
        UserError: there is no step in the file.
    """
    from matplotlib.figure import Figure

    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a live run may be writing the last one
    if not records:
        raise UserError(f"{metrics}: there is no step to draw yet.")
    steps = [r["step"] for r in records]
    losses = [r["loss"] for r in records]
    smooth: list[float] = []
    for loss in losses:  # exponential moving average over about 20 steps
        smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="loss")
    axis.plot(steps, smooth, color="C0", linewidth=1.8, label="loss, smoothed")
    axis.set(xlabel="step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
    rate = axis.twinx()
    rate.plot(steps, [r["lr"] for r in records], color="C1", linewidth=1.0, label="learning rate")
    rate.set_ylabel("learning rate")
    curves = [*axis.get_lines(), *rate.get_lines()]
    axis.legend(curves, [str(curve.get_label()) for curve in curves], loc="upper right")
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110, format="png")
    return picture
