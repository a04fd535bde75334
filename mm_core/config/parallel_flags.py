"""Flags of `mm train` for ranks that share one model. Names and meanings are Megatron-LM's and MindSpeed's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mm_core.config.keys import NoEffect, NotYet
from mm_core.config.section import SectionModel


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


_ALONE = ("context_parallel_size", 1)
_HYBRID = "only hybrid_cp_algo, rings of Ulysses groups, reads it"


class ParallelFlags(SectionModel):
    """Ranks that share one model"""

    tensor_model_parallel_size: Annotated[
        int,
        _help(
            "ranks that share the weights of each layer, for models whose class has a tp_plan", ge=1, le=4096
        ),
    ] = 1
    pipeline_model_parallel_size: Annotated[
        int,
        _help("stages that the blocks of the model are dealt to, as pipeline_num_layers says", ge=1, le=4096),
    ] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        int,
        _help(
            "parts of each stage that lie apart, the lists of pipeline_num_layers (interleaved)",
            ge=1,
            le=4096,
        ),
    ] = 1
    context_parallel_size: Annotated[int, _help("ranks that share each sequence", ge=1, le=4096)] = 1
    expert_model_parallel_size: Annotated[
        int,
        _help(
            "ranks that share the experts of a layer, as expert_parallel_size in fsdp2.yaml", ge=1, le=4096
        ),
    ] = 1
    context_parallel_algo: Annotated[
        Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] | None,
        NoEffect("--context-parallel-size is 1", when=_ALONE),
        NotYet(
            None,
            "ulysses_cp_algo",
            "megatron_cp_algo",
            reason="rings of Ulysses groups are not available yet",
            unless=_ALONE,
        ),
        _help(
            "ulysses_cp_algo exchanges the sequence against heads, megatron_cp_algo passes keys and values round a ring; "
            "default: ulysses_cp_algo"
        ),
    ] = None
    ulysses_degree_in_cp: Annotated[int | None, NoEffect(_HYBRID)] = None
    use_cp_send_recv_overlap: Annotated[bool, NoEffect("a ring decides itself when it sends")] = False
    cp_window_size: Annotated[int | None, NoEffect("keys and values go round one ring of all ranks")] = None
    sequence_parallel: Annotated[
        bool, NoEffect("between the layers that tensor parallelism cuts, activations are whole")
    ] = False
