"""Flags of `mm train` for the ranks of a job. Names and meanings are torchrun's and Megatron-LM's."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


class _FromOne:
    """Says a range of something that is not always a number, for the help; `_machines` checks it."""

    ge = 1


def _machines(value: int | str | None) -> int | str | None:
    """Check a number of machines, or MIN:MAX."""
    if value is None or re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", str(value), re.ASCII):
        return value
    text = "must be a number of machines from 1, or MIN:MAX"
    raise PydanticCustomError("invalid_value", "{why}", {"why": text})


_MEGATRON = "FSDP2 does it its own way"


class LaunchFlags(SectionModel):
    """Processes and devices"""

    nproc_per_node: Annotated[
        int | None, _help("ranks to start on this machine; default: 1", ge=1, le=1024)
    ] = None
    nnodes: Annotated[
        int | str | None,
        AfterValidator(_machines),
        _FromOne(),
        _help("machines of the job, or MIN:MAX of them if it may shrink and grow; default: 1"),
    ] = None
    node_rank: Annotated[int | None, _help("number of this machine, from 0; default: 0", ge=0)] = None
    master_addr: Annotated[
        str | None, _help("address of the first machine; default: 127.0.0.1", min_length=1)
    ] = None
    master_port: Annotated[
        int | None,
        _help("port on the first machine; default: a free one, 29500 with several machines", ge=0, le=65535),
    ] = None
    rdzv_backend: Annotated[
        Literal["c10d", "static"] | None,
        _help(
            "how machines find each other: static at --master-addr, c10d at --rdzv-endpoint and in any order"
        ),
    ] = None
    rdzv_endpoint: Annotated[
        str | None,
        _help(
            "HOST or HOST:PORT at which the machines of an elastic job meet; default port: 29400",
            min_length=1,
        ),
    ] = None
    rdzv_id: Annotated[
        str | None,
        _help(
            "name of an elastic job, the same on all machines; a job of that name is continued", min_length=1
        ),
    ] = None
    rdzv_conf: Annotated[
        str | None,
        _help("settings of the rendezvous, such as join_timeout=600,last_call_timeout=30 (seconds)"),
    ] = None
    max_restarts: Annotated[
        int | None,
        _help(
            "how often failed ranks are started again, from the last checkpoint of --save; default: 0",
            ge=0,
            le=1000,
        ),
    ] = None
    monitor_interval: Annotated[
        float, _help("seconds between looks at the ranks of an elastic job", gt=0.0, le=60.0)
    ] = 0.1
    distributed_backend: Annotated[
        str | None,
        _help("communication, such as nccl, hccl or gloo; default: the device's own", min_length=1),
    ] = None
    distributed_timeout_minutes: Annotated[int, _help("minutes until a waiting rank gives up", ge=1)] = 10
    use_torch_fsdp2: Annotated[bool, NoEffect("FSDP2 is always used", quiet_for=(True,))] = False
    use_distributed_optimizer: Annotated[bool, NoEffect(_MEGATRON)] = False
    overlap_grad_reduce: Annotated[bool, NoEffect(_MEGATRON)] = False
    overlap_param_gather: Annotated[bool, NoEffect(_MEGATRON)] = False
    hetero_parallel: Annotated[bool, Only(False, reason="heterogeneous parallelism is not available")] = False
    hetero_encoder_mbs_scale: Annotated[int, Only(1, reason="heterogeneous parallelism is not available")] = 1
    auto_parallel_mm: Annotated[bool, Only(False, reason="automatic parallelism is not available")] = False
