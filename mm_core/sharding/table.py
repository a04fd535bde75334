"""A sharding plan as one table, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mm_core.accelerator import dtype_name
from mm_core.observe.console import human_bytes, human_count
from mm_core.sharding.plan import ShardingPlan
from mm_core.sharding.rows import Peak, is_wrapped, peak_memory, unit_rows

_SAME = ("numel", "bytes_per_rank", "training_bytes_per_rank", "gathered_bytes", "dtype", "recompute", "offload",
         "reshard")  # fmt: skip
_TEXT_WIDTH = 200


@dataclass
class _Run:
    """Units that follow each other and differ in one number of their paths."""

    paths: list[str]
    row: dict[str, Any]
    place: int | None = None

    def takes(self, path: str, row: Mapping[str, Any]) -> bool:
        """Take a unit, if it continues the run."""
        place = _next_number(self.paths[-1], path)
        if place is None or (self.place not in (None, place)) or any(row[k] != self.row[k] for k in _SAME):
            return False
        self.place = place
        self.paths.append(path)
        for name in ("prefetch", "backward_prefetch"):  # at the ends there are fewer
            if row[name] is not None:
                self.row[name] = max(self.row[name], row[name], key=len)
        return True

    @property
    def label(self) -> str:
        """`predictor.blocks.0-29 ×30`."""
        if self.place is None:
            return self.paths[0]
        names = self.paths[0].split(".")
        names[self.place] += "-" + self.paths[-1].split(".")[self.place]
        return f"{'.'.join(names)} ×{len(self.paths)}"


def plan_table(plan: ShardingPlan, shards: int, ranks: int | None = None) -> Table:
    """The table of one FSDP root; equal units that follow each other share a line, which shows one of them.

    Args:
        shards: number of ranks that a parameter is cut over.
        ranks: data-parallel ranks; None if their number is not known, which goes with one shard.
    """
    rows = unit_rows(plan, shards)
    wrapped = ranks is None or is_wrapped(plan, ranks)
    peak = peak_memory(plan, shards, wrapped=wrapped)
    table = Table(
        title=_title(plan, shards, ranks, wrapped),
        title_justify="left",
        title_style="bold",
        caption=_caption(plan, peak, shards),
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_footer=True,
        pad_edge=False,
        collapse_padding=True,
    )
    numel = sum(row["numel"] for row in rows)
    table.add_column("unit", "total", overflow="fold")
    for name, total in (
        ("parameters", human_count(numel)),
        ("per rank", human_bytes(peak.shards)),
        ("+ gradients,\nAdamW", human_bytes(peak.stored)),
        ("gathered", ""),
    ):
        table.add_column(name, total, justify="right")
    for name in ("dtype", "recompute", "offload", "reshard", "prefetch\nfwd / bwd"):
        table.add_column(name)
    for run in folded(rows):
        row = run.row
        table.add_row(
            run.label,
            human_count(row["numel"]),
            human_bytes(row["bytes_per_rank"]),
            human_bytes(row["training_bytes_per_rank"]),
            human_bytes(row["gathered_bytes"]),
            row["dtype"] or "-",
            row["recompute"],
            row["offload"],
            {True: "yes", False: "no"}.get(row["reshard"], str(row["reshard"])),
            _prefetch(row),
        )
    return table


def plan_texts(plans: Mapping[str, ShardingPlan], shards: int, ranks: int | None = None) -> str:
    """The tables of some FSDP roots as plain text, which a log file or a pipe can hold.

    Args:
        plans: by path of the root.
        shards, ranks: as for `plan_table`.
    """
    stream = StringIO()
    writer = Console(file=stream, width=_TEXT_WIDTH, color_system=None, legacy_windows=False)
    for plan in plans.values():
        writer.print(plan_table(plan, shards, ranks))
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def folded(rows: Sequence[Mapping[str, Any]]) -> list[_Run]:
    """Rows of `unit_rows`, with those together that differ in one number of their paths only, which counts up.

    A run stands where its first unit does, also when other units run between its own (`layers.0`,
    `layers.0.mlp.experts`, `layers.1`, …).
    """
    runs: list[_Run] = []
    for row in rows:
        path = row["unit"]
        if not any(run.takes(path, row) for run in reversed(runs)):
            runs.append(_Run([path], dict(row)))
    return runs


def _next_number(before: str, path: str) -> int | None:
    """The place of the one name in which two paths differ, if it is a number that went up by one."""
    first, second = before.split("."), path.split(".")
    if len(first) != len(second):
        return None
    places = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(places) != 1:
        return None
    a, b = first[places[0]], second[places[0]]
    return places[0] if a.isdecimal() and b.isdecimal() and int(b) == int(a) + 1 else None


def _title(plan: ShardingPlan, shards: int, ranks: int | None, wrapped: bool) -> str:
    name = plan.full_path("")
    if ranks is None:
        return f"{name}: whole sizes, since --nproc-per-node does not say how many ranks there are"
    if not wrapped:
        return f"{name}: not sharded, there is one rank"
    copies = f", {ranks // shards} copies" if ranks > shards else ""
    return f"{name}: {_number(ranks, 'rank')}, parameters cut over {shards}{copies}"


def _caption(plan: ShardingPlan, peak: Peak, shards: int) -> str:
    where = "on the host: " if peak.on_host else ""
    lines = [
        f"predicted peak of parameters on the device: {human_bytes(peak.total)} a rank = {where}shards "
        f"{human_bytes(peak.shards)}, gradients {human_bytes(peak.gradients)}, AdamW {human_bytes(peak.optimizer)}; gathered "
        f"{human_bytes(peak.gathered)}, whole gradients {human_bytes(peak.whole_gradients)}; activations not counted",
    ]
    if plan.expert_parallel_size > 1:
        lines.append(
            f"experts: dealt out over {plan.expert_parallel_size} ranks, and each cut over "
            f"{max(1, shards // plan.expert_parallel_size)}"
        )
    if plan.recompute:
        form = "reentrant" if plan.use_reentrant else "non-reentrant"
        lines.append(
            f"recompute: {_number(len(plan.recompute), 'module')}, {plan.recompute_granularity}, {form}"
        )
    if plan.ignored:
        lines.append(f"not sharded: {', '.join(plan.full_path(path) for path in plan.ignored)}")
    lines += _sources(plan)
    return "\n".join(lines)


def _sources(plan: ShardingPlan) -> list[str]:
    """A line for each source, with the settings that came from it; the defaults are not listed."""
    values = {
        "reshard_after_forward": plan.reshard_after_forward,
        "param_dtype": plan.param_dtype,
        "reduce_dtype": plan.reduce_dtype,
        "output_dtype": plan.output_dtype,
        "num_to_forward_prefetch": plan.forward_prefetch,
        "num_to_backward_prefetch": plan.backward_prefetch,
        "expert_parallel_size": plan.expert_parallel_size,
        "recompute_granularity": plan.recompute_granularity,
        "use_reentrant": plan.use_reentrant,
        "offload_to_cpu": plan.offload_to_cpu,
    }
    by_source: dict[str, list[str]] = {}
    for key, source in plan.sources.items():
        if source != "default":
            shown = f"{key} {_value(values[key])}" if key in values else key
            by_source.setdefault(source, []).append(shown)
    names = {"structure": "found by structure", "units": "all units"}
    return [f"{names.get(source, source)}: {', '.join(keys)}" for source, keys in by_source.items()] + [
        "everything else: default"
    ]


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | str) else dtype_name(value)


def _prefetch(row: Mapping[str, Any]) -> str:
    """Units ahead in forward and in backward; `auto` is FSDP2's own choice."""
    backward = row["backward_prefetch"]
    return f"{len(row['prefetch'])} / {'auto' if backward is None else len(backward)}"


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
