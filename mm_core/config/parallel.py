"""How many ranks share one model, and in which way. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from mm_core.config.findings import Finding, show
from mm_core.config.origin import KeyPath
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.document import Document
    from mm_core.config.flags import TrainFlags  # many classes
    from mm_core.config.fsdp2 import Fsdp2Config

ContextAlgorithm: TypeAlias = Literal["ulysses", "ring"]

#: What `--context-parallel-algo` calls the algorithms of context parallelism.
CONTEXT_ALGORITHMS: dict[str, ContextAlgorithm] = {
    "ulysses_cp_algo": "ulysses",
    "megatron_cp_algo": "ring",
}

#: The flags of the kinds of parallelism whose ranks work on the same samples.
MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


class Place(NamedTuple):
    """Where a rank stands: its index in each kind of parallelism."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """The numbers of ranks that share one model; what is left of the ranks is data parallel.

    Args:
        pp: pipeline stages.
        cp: ranks that share each sequence.
        tp: ranks that share each weight of the layers that a model's `tp_plan` names.
        ep: data- and context-parallel ranks that share the experts of one layer.
        vpp: parts of each pipeline stage that lie apart in the model (interleaved schedule).
        cp_algo: `ulysses` exchanges sequence against heads (all-to-all, arXiv:2309.14509); `ring` passes keys and values
            on from rank to rank (arXiv:2310.01889).
        layers: `pipeline_num_layers`: blocks of each stage, in one tuple for each of the `vpp` parts; empty: dealt out
            evenly.
    """

    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    vpp: int = 1
    cp_algo: ContextAlgorithm = "ulysses"
    layers: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls, flags: TrainFlags, fsdp2: Fsdp2Config | None = None, pipeline_num_layers: Any = None
    ) -> ParallelSizes:
        """What the flags and files of a checked job ask for.

        Args:
            pipeline_num_layers: of the predictor's section: a list of numbers, a list of those, or None.
        """
        experts = None if fsdp2 is None else fsdp2.expert_parallel_size
        rows = pipeline_num_layers or []
        rows = rows if rows and isinstance(rows[0], list | tuple) else [rows] if rows else []
        return cls(
            pp=flags.pipeline_model_parallel_size,
            cp=flags.context_parallel_size,
            tp=flags.tensor_model_parallel_size,
            ep=experts or flags.expert_model_parallel_size,
            vpp=flags.virtual_pipeline_model_parallel_size,
            cp_algo=CONTEXT_ALGORITHMS.get(flags.context_parallel_algo or "", "ulysses"),
            layers=tuple(map(tuple, rows)) if flags.pipeline_model_parallel_size > 1 else (),
        )

    @property
    def together(self) -> int:
        """Ranks that work on the same samples: pipeline × context × tensor."""
        return self.pp * self.cp * self.tp

    def data_parallel(self, world: int) -> int:
        """How many groups of ranks `world` ranks make that work on samples of their own.

        Raises:
            UserError: the sizes do not divide the number of ranks.
        """
        if world % self.together:
            raise UserError(
                f"{world} rank{'s' if world > 1 else ''} cannot be dealt to groups of pipeline {self.pp} × context {self.cp} "
                f"× tensor {self.tp} = {self.together} that work on the same samples; use a multiple of {self.together} ranks."
            )
        return world // self.together

    def sharing(self, world: int) -> int:
        """Over how many ranks the parameters of one stage can be sharded: data × context.

        Raises:
            UserError: as `data_parallel`.
        """
        return self.data_parallel(world) * self.cp

    def place(self, rank: int, world: int) -> Place:
        """Where a rank stands. Ranks count as in Megatron: tensor fastest, then context, data, pipeline.

        Raises:
            UserError: as `data_parallel`.
        """
        data = self.data_parallel(world)
        rest, tensor = divmod(rank, self.tp)
        rest, context = divmod(rest, self.cp)
        stage, replica = divmod(rest, data)
        return Place(stage, replica, context, tensor)

    def __str__(self) -> str:
        """`pipeline 2 (2 parts each) × context 2 (ring)`; the empty text if nothing is shared."""
        parts = []
        if self.pp > 1:
            parts.append(f"pipeline {self.pp}" + (f" ({self.vpp} parts each)" if self.vpp > 1 else ""))
        if self.cp > 1:
            parts.append(f"context {self.cp} ({self.cp_algo})")
        if self.tp > 1:
            parts.append(f"tensor {self.tp}")
        if self.ep > 1:
            parts.append(f"experts {self.ep}")
        return " × ".join(parts)


_EXPERTS = "expert_model_parallel_size"
EXPERTS_KEY = "expert_parallel_size"


def with_expert_flag(document: Document, flags: TrainFlags) -> tuple[Document, list[Finding]]:
    """Fill `expert_parallel_size` of the sharding file from `--expert-model-parallel-size`, where the file leaves it open.

    It is done before the file is checked, whose other keys about experts depend on it.

    Returns:
        The file, and an error if both say it differently.
    """
    if _EXPERTS not in flags.model_fields_set:
        return document, []
    path: KeyPath = (EXPERTS_KEY,)
    wanted = flags.expert_model_parallel_size
    written = document.value(path) if document.has(path) else None
    if written is None:
        return (document.replaced(path, wanted, flags.origin(_EXPERTS)) if wanted > 1 else document), []
    if written == wanted:
        return document, []
    text = f"{EXPERTS_KEY} is {show(written)}, but {flags.spelling(_EXPERTS)} is {wanted}"
    return document, [
        Finding.at(document.origin(path), "error", "conflict", text, path=path, suggestion="Keep one of them")
    ]


def check_sizes(flags: TrainFlags) -> list[Finding]:
    """Return the errors of sizes that do not go together, whatever the model and the number of ranks."""
    findings = []
    stages, parts = flags.pipeline_model_parallel_size, flags.virtual_pipeline_model_parallel_size
    given = flags.spelling("pipeline_model_parallel_size")
    if parts > 1 and stages == 1:
        text = f"{parts} parts of each pipeline stage need {given} of 2 or more"
        findings.append(flags.finding("virtual_pipeline_model_parallel_size", "conflict", text))
    if flags.save_hf and stages > 1:
        text = f"a folder holds a whole model, and with {given} {stages} no rank has one"
        mend = "Leave it out, and write the folder from a checkpoint: `mm convert` does"
        findings.append(flags.finding("save_hf", "not-available", text, mend))
    return findings
