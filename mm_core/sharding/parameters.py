"""What of a model is trained and what is frozen, part by part: a table for people, and the same as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mm_core.observe.console import human_count
from mm_core.sharding.plan import ShardingPlan, bare_name

_TEXT_WIDTH = 200


@dataclass
class PartParameters:
    """Elements of the whole parameters of one part, whoever holds them; a tied parameter counts where it is met first.

    Attributes:
        path: as users write it, `model.model.visual.blocks`.
    """

    path: str
    total: int = 0
    trained: int = 0

    @property
    def frozen(self) -> int:
        return self.total - self.trained

    def as_dict(self) -> dict[str, int | str]:
        """JSON-able."""
        return {"part": self.path, "total": self.total, "trained": self.trained, "frozen": self.frozen}


def part_parameters(model: nn.Module, plans: Mapping[str, ShardingPlan]) -> list[PartParameters]:
    """The parts of a model in the order of their modules.

    A part is what stands beside a list of blocks, or the list itself, found by structure; a part without blocks of its own
    is not taken apart.

    Args:
        model: the composite, sharded or not.
        plans: by path of the FSDP root; they know the whole sizes of parameters that this rank has a slice of.
    """
    whole = {
        ".".join(filter(None, (root, info.name))): info.numel
        for root, plan in plans.items()
        for unit in (*plan.units, plan.root)
        for info in unit.parameters
    }
    parts = {path: PartParameters(path) for path in _parts(model, "")}
    for name, parameter in model.named_parameters():
        name = bare_name(name)
        path = name
        while path not in parts:
            path = path.rpartition(".")[0]
        count = whole.get(name, parameter.numel())
        parts[path].total += count
        parts[path].trained += count if parameter.requires_grad else 0
    return [part for part in parts.values() if part.total]


def parameters_text(parts: list[PartParameters]) -> str:
    """The table as plain text, which a log file or a pipe can hold."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    total, trained = sum(p.total for p in parts), sum(p.trained for p in parts)
    table.add_column("part", "total", overflow="fold")
    for name, count in (("parameters", total), ("trained", trained), ("frozen", total - trained)):
        table.add_column(name, _shown(count), justify="right")
    for part in parts:
        table.add_row(part.path or "(root)", _shown(part.total), _shown(part.trained), _shown(part.frozen))
    stream = StringIO()
    Console(file=stream, width=_TEXT_WIDTH, color_system=None, legacy_windows=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def _shown(count: int) -> str:
    return human_count(count) if count else "-"


def _parts(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the parts; of each module that is taken apart too, for parameters of its own."""
    yield path
    for name, child in module.named_children():
        name = bare_name(name)
        if not name:  # a wrapper stands for what it wraps
            yield from (found for found in _parts(child, path) if found != path)
        elif _is_taken_apart(child):
            yield from _parts(child, f"{path}.{name}" if path else name)
        else:
            yield f"{path}.{name}" if path else name


def _is_taken_apart(module: nn.Module) -> bool:
    """Whether lists of blocks lie inside: there are parts beside them."""
    return not isinstance(module, nn.ModuleList) and any(
        isinstance(child, nn.ModuleList) and len(child) > 1 for child in module.modules()
    )
