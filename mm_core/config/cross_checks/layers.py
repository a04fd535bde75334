"""What a model's layers and heads are divided by: pipeline stages, tensor and context parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding, Level, clip, show
from mm_core.config.origin import KeyPath
from mm_core.config.parallel import ParallelSizes
from mm_core.config.pipeline_stages import idle_share, schedule_problem

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need

_PIPELINE = "pipeline_num_layers"
_HEADS = ("num_heads", "num_attention_heads")


def check_layers(
    components: Mapping[str, ComponentConfig], document: Document, flags: TrainFlags | None = None
) -> Iterator[Finding]:
    """`pipeline_num_layers` must fit `num_layers` and the numbers of stages, and heads must be divisible.

    The list has an entry for each stage, or a list of those for each virtual stage. With one stage it does nothing, so
    that a mistake in it is a warning, and its length is free: files that are used with several stages are right.
    """
    stages = flags.pipeline_model_parallel_size if flags is not None else 1
    virtual = flags.virtual_pipeline_model_parallel_size if flags is not None else 1
    yield from _check_pipeline(components, document, stages, virtual)
    if flags is not None:
        yield from _check_even_stages(components, document, flags)
        yield from _check_heads(components, flags)


def check_schedule(flags: TrainFlags, sizes: ParallelSizes, micro_batches: int) -> Iterator[Finding]:
    """Micro batches of a step against pipeline stages: how many can be run, and how many keep the stages busy."""
    if sizes.pp == 1:
        return
    problem = schedule_problem(micro_batches, sizes)
    if problem is not None:
        text, mend = problem
        yield flags.finding("virtual_pipeline_model_parallel_size", "layers", text, mend)
    elif micro_batches < sizes.pp:
        few = f"{micro_batches} micro batch{'es' if micro_batches > 1 else ''} a step cannot keep {sizes.pp} pipeline stages busy"
        yield Finding.at(
            flags.origin("pipeline_model_parallel_size"),
            "warning",
            "layers",
            f"{few}: each waits {idle_share(micro_batches, sizes):.0%} of the time",
            path=flags.spelling("pipeline_model_parallel_size"),
            suggestion="Raise --global-batch-size, or lower --micro-batch-size",
        )


def _check_even_stages(
    components: Mapping[str, ComponentConfig], document: Document, flags: TrainFlags
) -> Iterator[Finding]:
    """Without `pipeline_num_layers` each stage still needs a block."""
    path: KeyPath = ("predictor", _PIPELINE)
    written = document.value(path) if document.has(path) else None
    sizes, layers = ParallelSizes.of(flags), _layers(components)
    stages = sizes.pp * sizes.vpp
    if sizes.pp == 1 or layers is None or layers >= stages or written is not None:
        return
    text = f"{stages} stages cannot be made of the {layers} layers of {components['predictor'].label}"
    yield flags.finding("pipeline_model_parallel_size", "layers", text, f"Use {layers} stages at most")


def _check_pipeline(
    components: Mapping[str, ComponentConfig], document: Document, stages: int, virtual: int
) -> Iterator[Finding]:
    path: KeyPath = ("predictor", _PIPELINE)
    value = document.value(path) if document.has(path) else None
    if not isinstance(value, list):
        return  # absent, null, or of another type, which the section's class says
    level: Level = "error" if stages > 1 else "warning"
    unused = "" if stages > 1 else "; it does nothing with one pipeline stage"
    nested = any(isinstance(item, list) for item in value)
    rows: list[tuple[KeyPath, list[Any]]] = [(path, value)]
    if nested:
        if not all(isinstance(item, list) for item in value):
            text = f"{_PIPELINE} is {show(value)}: numbers and lists are mixed{unused}"
            mend = "Write one number for each stage, or one list of those for each virtual stage"
            yield Finding.at(document.origin(path), level, "layers", text, path=path, suggestion=mend)
            return
        rows = [((*path, index), item) for index, item in enumerate(value)]
    for place, row in rows:
        for index, entry in enumerate(row):
            if not isinstance(entry, int) or isinstance(entry, bool) or entry < 1:
                at = (*place, index)
                text = f"{_PIPELINE} has the entry {show(entry)}, but every stage needs a layer{unused}"
                yield Finding.at(document.origin(at), level, "layers", text, path=at)
                return
    total = sum(sum(row) for _, row in rows)
    layers = _layers(components)
    if layers is not None and total != layers:
        text = f"{_PIPELINE} adds up to {total}, but num_layers is {layers}{unused}"
        mend = f"Write entries that add up to {layers}"
        yield Finding.at(document.origin(path), level, "layers", text, path=path, suggestion=mend)
    if stages > 1:
        yield from _check_stages(document, path, value, rows, stages, virtual)


def _check_stages(
    document: Document,
    path: KeyPath,
    value: list[Any],
    rows: list[tuple[KeyPath, list[Any]]],
    stages: int,
    virtual: int,
) -> Iterator[Finding]:
    nested = isinstance(value[0], list) if value else False
    if (nested and len(rows) != virtual) or (not nested and virtual > 1):
        lists = len(rows) if nested else 0
        text = (
            f"{_PIPELINE} has {lists} list{'' if lists == 1 else 's'}, but --virtual-pipeline-model-parallel-size is {virtual}"
            if nested
            else f"{_PIPELINE} is one list, but --virtual-pipeline-model-parallel-size {virtual} needs {virtual} of them"
        )
        yield Finding.at(document.origin(path), "error", "layers", text, path=path)
        return
    for place, row in rows:
        if len(row) != stages:
            text = (
                f"{_PIPELINE} has {len(row)} entr{'y' if len(row) == 1 else 'ies'} ({clip(show(row))}), but "
                f"--pipeline-model-parallel-size is {stages}"
            )
            mend = "Write one number for each stage"
            yield Finding.at(document.origin(place), "error", "layers", text, path=place, suggestion=mend)


def _layers(components: Mapping[str, ComponentConfig]) -> int | None:
    # A section with an error is no component: what is wrong with its num_layers is said already.
    predictor = components.get("predictor")
    value = predictor.fields.get("num_layers") if predictor is not None else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_heads(components: Mapping[str, ComponentConfig], flags: TrainFlags) -> Iterator[Finding]:
    """Tensor parallelism deals heads to ranks, and so does Ulysses' context parallelism."""
    predictor = components.get("predictor")
    if predictor is None:
        return
    heads = next((n for name in _HEADS if isinstance(n := predictor.fields.get(name), int)), None)
    tensor, context = flags.tensor_model_parallel_size, flags.context_parallel_size
    if flags.context_parallel_algo not in (None, "ulysses_cp_algo"):
        context = 1  # rings pass keys and values on and divide no heads
    if heads is None or heads % (tensor * context) == 0:
        return
    name = "tensor_model_parallel_size" if heads % tensor else "context_parallel_size"
    size = tensor if heads % tensor else tensor * context
    both = tensor > 1 and size != tensor
    product = f"{flags.spelling('tensor_model_parallel_size')} {tensor} × {context} = " if both else ""
    text = f"{product}{size} ranks cannot share the {heads} heads of {predictor.label} equally"
    fits = [str(n) for n in range(1, size * 2) if heads % n == 0]
    mend = f"Their number must divide {heads}: {', '.join(fits)}"
    if name == "context_parallel_size":
        mend += f"; or use {flags.spelling('context_parallel_algo')} megatron_cp_algo, a ring that deals out no heads"
    yield flags.finding(name, "heads", text, mend)
