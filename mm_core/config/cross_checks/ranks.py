"""Numbers of ranks, samples and shards must divide each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm_core.config.document import Document
from mm_core.config.findings import Finding, show
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.origin import KeyPath
from mm_core.config.tools import ToolsConfig

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need

#: Kinds of parallelism whose ranks work on the same samples.
_MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def check_ranks(
    flags: TrainFlags, fsdp2: Fsdp2Config, document: Document, tools: ToolsConfig, ranks: int
) -> Iterator[Finding]:
    """The numbers of ranks, samples and shards must divide each other.

    Args:
        document: the sharding file.
        ranks: of the whole job. Samples are dealt to its data-parallel ranks, each of which may be several: tensor ×
            pipeline × context parallel ones.
    """
    together = 1
    for name in _MODEL_PARALLEL:
        together *= getattr(flags, name)
    if ranks % together:
        yield _undivided(flags, ranks, together)
    else:
        batch = flags.check_batch(ranks // together)
        if batch is not None and "global_batch_size" in flags.model_fields_set:
            yield batch
    size = fsdp2.shard_group_size(ranks)
    if ranks % size:
        text = (
            f"sharding_size is {size}, which does not divide the {ranks} "
            f"rank{'s' if ranks > 1 else ''} of the job"
        )
        mend = 'Write "auto" for all ranks, or a divisor'
        path: KeyPath = ("sharding_size",)
        yield Finding.at(document.origin(path), "error", "ranks", text, path=path, suggestion=mend)
    wanted = tools.profile.ranks
    if tools.profile.enable and -1 not in wanted and min(wanted) >= ranks:
        text = (
            f"profile.ranks is {show(wanted)}, but the job has ranks 0 to {ranks - 1}: nothing "
            "would be profiled"
        )
        yield Finding("error", "ranks", text, flags.source("tools"), path="profile.ranks")


def _undivided(flags: TrainFlags, ranks: int, together: int) -> Finding:
    given = [name for name in _MODEL_PARALLEL if getattr(flags, name) > 1]
    others = " × ".join(f"{flags.spelling(name)} {getattr(flags, name)}" for name in given[1:])
    product = f"{getattr(flags, given[0])}" + (f" × {others} = {together}" if others else "")
    text = f"{product} ranks work on the same samples, which does not divide the {ranks} ranks of the job"
    return flags.finding(given[0], "ranks", text, f"Use a multiple of {together} ranks")
