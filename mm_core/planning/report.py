"""A plan for people (tables) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mm_core.observe.console import human_bytes, human_count
from mm_core.planning.devices import Device
from mm_core.planning.model import PlanResult
from mm_core.planning.roofline import PUBLISHED, model_tflops

_WIDTH = 160
_BYTES = ("parameters", "gradients", "optimizer", "gathered", "reducing", "activations", "transient")
_SIZES = {"dp": "data", "cp": "context", "tp": "tensor", "pp": "pipeline", "ep": "experts"}


def plan_text(result: PlanResult, device: Device) -> str:
    """The plan as tables and sentences."""
    parts: list[str] = [
        _headline(result),
        _memory(result),
        _units(result),
        _collectives(result, device),
        _time(result, device),
        _verdict(result, device),
    ]
    if result.advice:
        parts.append(_advice(result))
    parts += [f"note: {note}" for note in result.costs.notes]
    return "\n".join(parts) + "\n"


def plan_data(result: PlanResult, device: Device) -> dict[str, Any]:
    """The plan as JSON-able data. `parameters` counts what is trained, `peak_bytes` is one rank's."""
    costs, timeline = result.costs, result.costs.timeline
    return {
        "parameters": result.parameters,
        "frozen_parameters": costs.frozen_parameters,
        "peak_bytes": result.peak_bytes,
        "peak_moment": timeline.moment,
        "fits": result.fits,
        "world_size": result.world_size,
        "sizes": dict(result.sizes),
        "micro_batches": costs.micro_batches,
        "tokens": costs.tokens,
        "device": {**device.model_dump(), "sources": dict(device.sources)},
        "memory": {
            "steady": costs.steady.as_dict(),
            "peak": timeline.peak.bytes.as_dict(),
            "host_bytes": timeline.host_bytes,
            "host_activation_bytes": timeline.host_activation_bytes,
        },
        "timeline": [
            {"phase": e.phase, "unit": e.unit, "micro": e.micro, **e.bytes.as_dict()} for e in timeline.events
        ],
        "units": [
            {
                "kind": unit.kind,
                "count": unit.count,
                "path": unit.path,
                "parameters": unit.parameter_numel,
                "trainable": unit.trainable_numel,
                "flops": asdict(unit.flops),
                "saved_bytes": unit.saved_bytes,
                "transient_bytes": unit.transient_bytes,
                "backward_transient_bytes": unit.backward_transient_bytes,
            }
            for unit in costs.units
        ],
        "collectives": [asdict(one) for one in result.collectives],
        "flops": {
            **asdict(costs.flops),
            "total": costs.flops.total,
            "attention": costs.flops.attention,
            "model": costs.flops.model,
        },
        "time": {
            **asdict(result.time),
            "total": result.time.total,
            "model_tflops_per_device": model_tflops(costs, result.time.total),
            "tokens_per_second_per_device": _token_rate(result),
        },
        "advice": [asdict(one) for one in result.advice],
        "notes": list(costs.notes),
    }


def _token_rate(result: PlanResult) -> float:
    """Tokens a second of each device; the stages of a pipeline read the same ones."""
    costs = result.costs
    return costs.tokens * costs.micro_batches / result.sizes["pp"] / result.time.total


def _headline(result: PlanResult) -> str:
    dims = " × ".join(f"{_SIZES[name]} {size}" for name, size in result.sizes.items() if size > 1)
    frozen = result.costs.frozen_parameters
    rest = f", {human_count(frozen)} frozen" if frozen else ""
    ranks = "1 rank" if result.world_size == 1 else f"{result.world_size} ranks"
    return (
        f"{ranks} of {result.device}{f' ({dims})' if dims else ''}: {human_count(result.parameters)} trained "
        f"parameters{rest}, {result.costs.micro_batches} micro batch{'es' if result.costs.micro_batches > 1 else ''} of "
        f"{result.costs.tokens:,} tokens a rank and step\n"
    )


def _table(title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A line, and a table whose columns are (name, right-aligned)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    stream = StringIO()
    Console(file=stream, width=_WIDTH, color_system=None, legacy_windows=False).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([title, *(line for line in lines if line), ""])


def _memory(result: PlanResult) -> str:
    steady, peak = result.costs.steady, result.costs.timeline.peak
    rows = [
        [name, human_bytes(getattr(steady, name)), human_bytes(getattr(peak.bytes, name))] for name in _BYTES
    ]
    rows.append(["total", human_bytes(steady.total), human_bytes(peak.bytes.total)])
    line = result.costs.timeline
    for what, size in (("", line.host_bytes), ("activations ", line.host_activation_bytes)):
        if size:
            rows.append([f"{what}in host memory", "", human_bytes(size)])
    title = "memory of the fullest rank"
    return _table(title, [("", False), ("between steps", True), (f"at the peak: {peak.moment}", True)], rows)


def _units(result: PlanResult) -> str:
    rows = []
    for unit in result.costs.units:
        flops = unit.flops
        share = f"{flops.attention / flops.total:.0%}" if flops.total else "-"
        rows.append(
            [
                f"{unit.path or '(root)'}" + (f" ×{unit.count}" if unit.count > 1 else ""),
                unit.kind,
                human_count(unit.parameter_numel),
                _flops(flops.forward),
                _flops(flops.backward),
                _flops(flops.recompute),
                share,
                human_bytes(unit.saved_bytes),
                human_bytes(max(unit.transient_bytes, unit.backward_transient_bytes)),
            ]
        )
    names = ("parameters", "forward", "backward", "again", "attention", "saved", "needed beside")
    columns = [("unit", False), ("class", False), *((name, True) for name in names)]
    return _table("one unit of each kind, on a rank and micro batch (FLOPs)", columns, rows)


def _collectives(result: PlanResult, device: Device) -> str:
    rows = []
    for one in result.collectives:
        rate = device.bandwidth(one.kind, one.ranks, one.stride) * device.bandwidth_efficiency
        rows.append(
            [
                one.kind,
                one.group,
                str(one.ranks),
                one.what,
                f"{one.count:,}",
                human_bytes(one.bytes),
                f"{rate / 1e9:.3g} GB/s",
                seconds_text(one.bytes / rate),
            ]
        )
    columns = [("collective", False), ("group", False), ("ranks", True), ("of", False)]
    columns += [(name, True) for name in ("calls", "sent", "rate", "time")]
    return _table("collectives of a rank and step", columns, rows or [["none", *[""] * 7]])


def _time(result: PlanResult, device: Device) -> str:
    time, costs = result.time, result.costs
    flops = costs.flops
    rows = [
        ["matrix products", f"{_flops(flops.total - flops.attention)} FLOPs", seconds_text(time.matmul)],
        ["attention", f"{_flops(flops.attention)} FLOPs", seconds_text(time.attention)],
        ["bound by memory: norms, optimizer, …", "", seconds_text(time.other)],
        [
            "communication that nothing hides",
            f"of {seconds_text(time.communication)}",
            seconds_text(time.exposed),
        ],
    ]
    if time.idle:
        rows.append(["waiting in the pipeline", "", seconds_text(time.idle)])
    rows.append(["a step", "", seconds_text(time.total)])
    reached = (
        f"roofline at {device.matmul_efficiency:.0%} of the FLOP/s in matrix products, {device.attention_efficiency:.0%} in "
        f"attention, {device.bandwidth_efficiency:.0%} of the bandwidths"
    )
    return _table(reached, [("", False), ("", True), ("time", True)], rows)


def _verdict(result: PlanResult, device: Device) -> str:
    peak, memory = result.peak_bytes, device.memory_bytes
    usable = memory * (1 - device.reserve)
    sizes = (
        f"{human_bytes(peak)} of {human_bytes(memory)}, of which {device.reserve:.0%} are left to the driver, to buffers of "
        "communication and to fragments"
    )
    if result.fits:
        verdict = f"It fits: the peak is {sizes}; {human_bytes(usable - peak)} are free."
    else:
        verdict = f"It does not fit: the peak is {sizes}; {human_bytes(peak - usable)} are missing."
    seconds = result.time.total
    rate = model_tflops(result.costs, seconds)
    tokens = _token_rate(result)
    step = (
        f"A step takes at least {seconds_text(seconds)}: {rate:.3g} TFLOP/s of the model and {tokens:,.0f} tokens a second "
        "on each device."
    )
    reached = [point.reached for point in PUBLISHED if point.device == result.device]
    if reached:
        low, high = min(reached), max(reached)
        step += (
            f" Published runs reach {low:.0%} to {high:.0%} of this roofline: {seconds_text(seconds / high)} to "
            f"{seconds_text(seconds / low)}."
        )
    return f"{verdict}\n{step}\n"


def _advice(result: PlanResult) -> str:
    rows = [
        [
            one.change,
            human_bytes(one.peak_bytes),
            "yes" if one.fits else "no",
            "-" if one.seconds is None else seconds_text(one.seconds),
            one.why,
        ]
        for one in result.advice
    ]
    title = "what would make it faster, and still fit" if result.fits else "what to change"
    columns = [("change", False), ("peak", True), ("fits", False), ("step", True), ("why", False)]
    return _table(title, columns, rows)


def _flops(number: float) -> str:
    """`8.95e14` as `895T`."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def seconds_text(number: float) -> str:
    """`35.2 s`, `12 ms`."""
    if number >= 0.9995:
        return f"{number:.3g} s"
    return f"{number * 1e3:.3g} ms"
