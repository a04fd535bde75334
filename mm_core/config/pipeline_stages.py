"""Which blocks each pipeline stage has, and in which order stages run their micro batches. No torch here.

A model of `pp` ranks with `vpp` parts each has `pp · vpp` stages in a row; rank `r` has the stages `r`, `r + pp`,
`r + 2·pp`, … (Narayanan et al., arXiv:2104.04473, section 2.2). `pipeline_num_layers` lists them in that order: one
number for each rank, or one list of those for each part.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from mm_core.config.parallel import ParallelSizes

Schedule: TypeAlias = Literal["GPipe", "1F1B", "Interleaved1F1B"]


def stage_blocks(blocks: int, sizes: ParallelSizes) -> tuple[range, ...]:
    """The blocks of each stage, in the order of the forward pass.

    Without `pipeline_num_layers` they are dealt out as evenly as they can be; the first stages have one more than the
    last.

    Raises:
        ValueError: `layout_problem` has something to say.
    """
    problem = layout_problem(blocks, sizes)
    if problem is not None:
        raise ValueError(problem)
    stages = sizes.pp * sizes.vpp
    counts = [count for row in sizes.layers for count in row]
    if not counts:
        each, left = divmod(blocks, stages)
        counts = [each + (stage < left) for stage in range(stages)]
    found, start = [], 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return tuple(found)


def layout_problem(blocks: int, sizes: ParallelSizes) -> str | None:
    """What is wrong with the numbers of blocks and stages, as a sentence without its full stop; None if nothing is."""
    stages = sizes.pp * sizes.vpp
    named = f"--pipeline-model-parallel-size {sizes.pp}"
    if sizes.vpp > 1:
        named += f" × --virtual-pipeline-model-parallel-size {sizes.vpp}"
    if not sizes.layers:
        if blocks < stages:
            return f"{named} makes {stages} stages of {blocks} blocks, but each needs one; use {blocks} stages at most"
        return None
    if len(sizes.layers) != sizes.vpp or any(len(row) != sizes.pp for row in sizes.layers):
        wanted = f"{sizes.pp} numbers" if sizes.vpp == 1 else f"{sizes.vpp} lists of {sizes.pp} numbers"
        return f"pipeline_num_layers is {_shown(sizes)}, but {named} needs {wanted}"
    counts = [count for row in sizes.layers for count in row]
    if min(counts) < 1:
        return f"pipeline_num_layers is {_shown(sizes)}, but every stage needs a layer"
    if sum(counts) != blocks:
        return (
            f"pipeline_num_layers adds up to {sum(counts)}, but the model has {blocks} blocks; "
            f"write entries that add up to {blocks}"
        )
    return None


def schedule_name(micro_batches: int, sizes: ParallelSizes) -> Schedule:
    """The schedule of an optimizer step, by the name of its class in `torch.distributed.pipelining`.

    One forward and one backward in turn keep `pp` micro batches in memory at most; with fewer micro batches than
    stages that is what running all forward passes first keeps as well.
    """
    if sizes.vpp > 1:
        return "Interleaved1F1B"
    return "1F1B" if micro_batches >= sizes.pp else "GPipe"


def schedule_problem(micro_batches: int, sizes: ParallelSizes) -> tuple[str, str] | None:
    """Why this number of micro batches a step cannot be run, and how to mend it: two sentences without full stops; None if
    it can.
    """
    if sizes.vpp == 1:
        return None
    rounds = max(1, micro_batches // sizes.pp)
    if micro_batches % rounds == 0:
        return None
    below = micro_batches // sizes.pp * sizes.pp
    return (
        f"interleaved stages take micro batches in equal rounds of about {sizes.pp}, one for each pipeline stage, which "
        f"{micro_batches} micro batches a step do not make",
        f"Choose --global-batch-size so that there are {below} or {below + sizes.pp}",
    )


def idle_share(micro_batches: int, sizes: ParallelSizes) -> float:
    """The share of a step in which a rank waits for others if every stage takes as long: (pp - 1) / (v·m + pp - 1)."""
    return (sizes.pp - 1) / (sizes.vpp * micro_batches + sizes.pp - 1)


def _shown(sizes: ParallelSizes) -> str:
    rows = [list(row) for row in sizes.layers]
    return str(rows[0] if len(rows) == 1 else rows)
