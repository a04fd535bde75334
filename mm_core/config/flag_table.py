"""The flags of `mm train`, one class a group. Names and meanings are Megatron-LM's and MindSpeed-MM's."""

from typing import Annotated, Any

from pydantic import Field

from mm_core.config.checkpoint_flags import CheckpointFlags
from mm_core.config.classic_flags import AcceptedFlags, RefusedFlags, UnavailableFlags
from mm_core.config.keys import NoEffect, Only
from mm_core.config.launch_flags import LaunchFlags
from mm_core.config.lora import LoraFlags
from mm_core.config.loss_flags import LossFlags
from mm_core.config.optimizer_flags import OptimizerFlags, ScheduleFlags
from mm_core.config.parallel_flags import ParallelFlags
from mm_core.config.recompute import Granularity, Method
from mm_core.config.section import SectionModel


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


class FileFlags(SectionModel):
    """Files"""

    mm_model: Annotated[str | None, _help("model file (model.json)", min_length=1)] = None
    mm_data: Annotated[str | None, _help("data file (data.json)", min_length=1)] = None
    mm_tool: Annotated[str | None, _help("tools file (tools.json)", min_length=1)] = None
    fsdp2_config_path: Annotated[str | None, _help("sharding file (fsdp2.yaml)", min_length=1)] = None
    locked: Annotated[
        bool, _help("train only with the plugins of the lock file, which `mm plugin lock` writes")
    ] = False
    lock_file: Annotated[
        str | None, _help("lock file; default: mmzoo.lock. Giving it means --locked", min_length=1)
    ] = None


class BatchFlags(SectionModel):
    """Batch"""

    micro_batch_size: Annotated[int, _help("samples of one rank in one forward pass", ge=1, le=2**20)] = 1
    global_batch_size: Annotated[
        int,
        _help(
            "samples of one optimizer step, over all ranks and accumulated passes; default: micro "
            "batch × ranks",
            ge=1,
            le=2**20,
        ),
    ] = 0
    seq_length: Annotated[int | None, _help("tokens of a sequence of texts, at most", ge=1, le=2**31)] = None
    num_workers: Annotated[
        int, _help("processes that load data, for each rank; 0: the rank loads itself", ge=0, le=1024)
    ] = 2
    encode_ahead: Annotated[
        bool,
        _help(
            "encode the next micro batch while this one is computed, in a thread, on an accelerator on a stream of its own; "
            "the losses stay the same, and one more micro batch is in memory"
        ),
    ] = False
    seed: Annotated[int, _help("fixes data order, noise, timesteps and random weights", ge=0, lt=2**63)] = (
        1234
    )


class PrecisionFlags(SectionModel):
    """Precision"""

    bf16: Annotated[
        bool, _help("compute in bf16 over fp32 master weights, as param_dtype: bf16 in fsdp2.yaml")
    ] = False
    fp16: Annotated[bool, Only(False, reason="fp16 needs loss scaling, which is not available; use bf16")] = (
        False
    )
    downcast_to_bf16: Annotated[bool, NoEffect("loaded weights stay fp32 as master weights")] = False
    accumulate_allreduce_grads_in_fp32: Annotated[
        bool, NoEffect("reduce_dtype in fsdp2.yaml decides; accumulated gradients are fp32")
    ] = False
    allow_tf32: Annotated[bool, NoEffect("TF32 stays as torch sets it")] = False
    use_deter_comp: Annotated[
        bool, _help("deterministic kernels only, so that a run on an accelerator repeats bit for bit")
    ] = False


class RecomputeFlags(SectionModel):
    """Recomputation of activations"""

    recompute_granularity: Annotated[
        Granularity | None,
        _help(
            "full keeps only the inputs of blocks, selective also results of matrix products and attention; as in "
            "fsdp2.yaml, which decides where it says something"
        ),
    ] = None
    recompute_method: Annotated[
        Method | None, _help("blocks that are recomputed in full: uniform is all, block the first ones")
    ] = None
    recompute_num_layers: Annotated[int | None, _help("how many, for block", ge=1)] = None


class LogFlags(SectionModel):
    """Logging and evaluation"""

    log_interval: Annotated[
        int, _help("optimizer steps between lines on the console; metrics.jsonl has all", ge=1)
    ] = 1
    tensorboard_dir: Annotated[
        str | None, _help("folder of the event files; default: inside --save", min_length=1)
    ] = None
    log_throughput: Annotated[bool, NoEffect("samples/s are always logged", quiet_for=(True,))] = False
    log_tps: Annotated[bool, NoEffect("tokens/s are always logged", quiet_for=(True,))] = False
    timing_log_level: Annotated[int | None, NoEffect("tools.json chooses what is profiled")] = None
    eval_interval: Annotated[
        int | None,
        _help(
            "optimizer steps between validations, if the dataset has a validation set; default: 1000", ge=1
        ),
    ] = None
    eval_iters: Annotated[
        int | None,
        _help("global batches of one validation, 0 for none; default: the whole validation set", ge=0),
    ] = None
    eval_ema: Annotated[
        bool,
        _help("validate, and make sample videos, with the averaged weights of --ema-decay as well"),
    ] = False
    sample_config: Annotated[
        str | None,
        _help(
            "inference file, as for mm generate: its videos are made with the weights as they are, before the first step, "
            "every --sample-interval steps and after the last one, into <save>/samples",
            min_length=1,
        ),
    ] = None
    sample_interval: Annotated[
        int | None, _help("optimizer steps between the sample videos of --sample-config; default: 1000", ge=1)
    ] = None


#: In the order of the help page.
GROUPS: tuple[type[SectionModel], ...] = (
    FileFlags,
    BatchFlags,
    OptimizerFlags,
    ScheduleFlags,
    CheckpointFlags,
    LoraFlags,
    LossFlags,
    PrecisionFlags,
    RecomputeFlags,
    LaunchFlags,
    ParallelFlags,
    LogFlags,
    AcceptedFlags,
    UnavailableFlags,
    RefusedFlags,
)
