"""Numbers of ranks, samples and shards must divide each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm_core.config.cross_checks.layers import check_schedule
from mm_core.config.document import Document
from mm_core.config.findings import Finding, show
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.origin import KeyPath
from mm_core.config.parallel import MODEL_PARALLEL, ParallelSizes
from mm_core.config.tools import ToolsConfig

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need


def check_ranks(
    flags: TrainFlags, fsdp2: Fsdp2Config, document: Document, tools: ToolsConfig, ranks: int
) -> Iterator[Finding]:
    """The numbers of ranks, samples and shards must divide each other.

    Args:
        document: the sharding file.
        ranks: of the whole job. Samples are dealt to its data-parallel ranks, each of which may be several: tensor ×
            pipeline × context parallel ones.
    """
    sizes = ParallelSizes.of(flags, fsdp2)
    if ranks % sizes.together:
        yield _undivided(flags, ranks, sizes.together)
    else:
        batch = flags.check_batch(ranks // sizes.together)
        if batch is not None and "global_batch_size" in flags.model_fields_set:
            yield batch
        elif batch is None:
            yield from check_schedule(flags, sizes, flags.accumulation_steps(ranks // sizes.together))
        yield from _check_shards(fsdp2, document, sizes, ranks)
    wanted = tools.profile.ranks
    if tools.profile.enable and -1 not in wanted and min(wanted) >= ranks:
        text = (
            f"profile.ranks is {show(wanted)}, but the job has ranks 0 to {ranks - 1}: nothing "
            "would be profiled"
        )
        yield Finding("error", "ranks", text, flags.source("tools"), path="profile.ranks")


def _check_shards(
    fsdp2: Fsdp2Config, document: Document, sizes: ParallelSizes, ranks: int
) -> Iterator[Finding]:
    """`sharding_size` must divide the ranks that parameters can be sharded over, and keep together those that share a
    sequence.
    """
    sharing = sizes.sharing(ranks)
    size = fsdp2.shard_group_size(sharing)
    path: KeyPath = ("sharding_size",)
    if sharing % size:
        which = f"{sharing} rank{'s' if sharing > 1 else ''} " + (
            "of the job"
            if sizes.together == 1
            else f"that hold one stage of the model and one part of its tensors ({sizes})"
        )
        text, mend = (
            f"sharding_size is {size}, which does not divide the {which}",
            'Write "auto" for all ranks, or a divisor',
        )
    elif size % sizes.cp:
        text = f"sharding_size is {size}, which is no multiple of the {sizes.cp} ranks that share a sequence"
        mend = 'Write "auto" for all ranks, or a multiple'
    else:
        return
    yield Finding.at(document.origin(path), "error", "ranks", text, path=path, suggestion=mend)


def _undivided(flags: TrainFlags, ranks: int, together: int) -> Finding:
    given = [name for name in MODEL_PARALLEL if getattr(flags, name) > 1]
    others = " × ".join(f"{flags.spelling(name)} {getattr(flags, name)}" for name in given[1:])
    product = f"{getattr(flags, given[0])}" + (f" × {others} = {together}" if others else "")
    whole = f"{ranks} rank{'s' if ranks > 1 else ''} of the job"
    text = f"{product} ranks work on the same samples, which does not divide the {whole}"
    return flags.finding(given[0], "ranks", text, f"Use a multiple of {together} ranks")
