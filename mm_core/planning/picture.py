"""A rank's memory over a step, as a picture."""

from __future__ import annotations

from pathlib import Path

from mm_core.planning.model import PlanResult

_GIB = 1024**3
_KINDS = ("parameters", "optimizer", "gradients", "gathered", "reducing", "activations", "transient")


def draw_timeline(result: PlanResult, picture: Path) -> Path:
    """Draw the memory of each event of a step into a PNG, stacked by what it is for, and return its path."""
    from matplotlib.figure import Figure  # slow to import

    events = result.costs.timeline.events
    places = range(len(events))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.add_subplot()
    values = [[getattr(event.bytes, kind) / _GIB for event in events] for kind in _KINDS]
    axis.stackplot(list(places), values, labels=_KINDS, step="mid")
    peak = events.index(result.costs.timeline.peak)
    axis.annotate(
        f"{result.peak_bytes / _GIB:.1f} GiB\n{result.costs.timeline.moment}",
        (peak, result.peak_bytes / _GIB),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    limit = result.device_bytes / _GIB
    if limit < 3 * result.peak_bytes / _GIB:
        axis.axhline(limit, color="0.3", linestyle="--", linewidth=1.0, label=f"memory of {result.device}")
    begins = [i for i in places if i == 0 or _part(events[i]) != _part(events[i - 1])]
    ends = [*begins[1:], len(events)]
    # Parts of a few events, such as the loss, have no room for a name.
    named = [(a, b) for a, b in zip(begins, ends, strict=True) if b - a >= max(1, len(events) // 40)]
    for begin in begins:
        axis.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xticks([(a + b) / 2 for a, b in named], [events[a].phase for a, _ in named])
    axis.set(
        ylabel="GiB of one rank",
        xlim=(0, max(1, len(events) - 1)),
        title=f"{result.world_size} ranks of {result.device}",
    )
    axis.margins(y=0.12)
    axis.legend(loc="upper left", fontsize=8, ncols=2)
    figure.savefig(picture, dpi=110, format="png")
    return picture


def _part(event: object) -> tuple[object, object]:
    return getattr(event, "micro", 0), getattr(event, "phase", "")
