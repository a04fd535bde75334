"""The flags of `mm train`, one class a group. Names and meanings are Megatron-LM's and MindSpeed-MM's."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mm_core.config.classic_flags import AcceptedFlags, RefusedFlags, UnavailableFlags
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.lora import LoraFlags
from mm_core.config.loss_flags import LossFlags
from mm_core.config.recompute import Granularity, Method
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


_ALONE = ("context_parallel_size", 1)
_HYBRID = "only hybrid_cp_algo, rings of Ulysses groups, reads it"
_MEGATRON = "FSDP2 does it its own way"
_BY_MODULE = "learning rate and weight decay are the same for all modules so far"
_MUON = "only the Muon optimizer reads it"


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
    seed: Annotated[int, _help("fixes data order, noise, timesteps and random weights", ge=0, lt=2**63)] = (
        1234
    )


class OptimizerFlags(SectionModel):
    """Optimizer"""

    optimizer: Annotated[
        Literal["adam", "sgd", "muon"], NotYet("adam", reason="AdamW is the only optimizer so far")
    ] = "adam"
    optimizer_selection: Annotated[
        Literal["fused_torch_adamw", "torch_adamw", "fused_adamw"], _help("which AdamW; all are torch's")
    ] = "fused_torch_adamw"
    lr: Annotated[float, _help("learning rate after warm-up; required", gt=0.0)] = 1e-5
    min_lr: Annotated[float, _help("learning rate at the end of the decay", ge=0.0)] = 0.0
    adam_beta1: Annotated[float, _help("decay of the first moment", ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, _help("decay of the second moment", ge=0.0, lt=1.0)] = 0.999
    adam_eps: Annotated[float, _help("added to the square root of the second moment", gt=0.0)] = 1e-8
    weight_decay: Annotated[float, _help("decoupled weight decay", ge=0.0)] = 0.01
    clip_grad: Annotated[float, _help("largest 2-norm of the gradient; 0 does not clip", ge=0.0)] = 1.0
    ema_decay: Annotated[
        float | None,
        _help(
            "keep an exponential moving average of the trained weights, of this decay, such as 0.999; it is part of each "
            "checkpoint",
            ge=0.0,
            lt=1.0,
        ),
    ] = None
    lr_mult: Annotated[float, Field(gt=0.0), NotYet(1.0, reason=_BY_MODULE)] = 1.0
    lr_scale_modules: Annotated[list[str] | None, NotYet(None, (), reason=_BY_MODULE)] = None
    weight_decay_exclude_modules: Annotated[list[str] | None, NotYet(None, (), reason=_BY_MODULE)] = None
    enable_dummy_optimizer: Annotated[bool, NoEffect("every rank has parameters to train")] = False
    matched_adamw_rms: Annotated[float | None, NoEffect(_MUON)] = None
    muon_momentum: Annotated[float | None, NoEffect(_MUON)] = None
    ns_steps: Annotated[int | None, NoEffect(_MUON)] = None


class ScheduleFlags(SectionModel):
    """Schedule"""

    train_iters: Annotated[int, _help("optimizer steps of the whole run; required", ge=1, le=2**40)] = 1
    train_samples: Annotated[
        int | None, Only(None, reason="state the length of the run as --train-iters")
    ] = None
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        NotYet(
            "constant",
            "linear",
            "cosine",
            reason="this decay is not available yet; use constant, linear or cosine",
        ),
        _help("shape of the learning rate after warm-up"),
    ] = "linear"
    lr_decay_iters: Annotated[
        int | None, _help("optimizer steps until --min-lr; default: --train-iters", ge=1)
    ] = None
    lr_warmup_iters: Annotated[int, _help("optimizer steps of linear warm-up", ge=0)] = 0
    lr_warmup_fraction: Annotated[
        float | None,
        _help("warm-up as a share of --lr-decay-iters, or of --train-iters without it", ge=0.0, le=1.0),
    ] = None
    lr_warmup_init: Annotated[float, _help("learning rate from which warm-up starts", ge=0.0)] = 0.0
    exit_interval: Annotated[
        int | None, _help("optimizer steps: leave, after saving, at a multiple of it", ge=1)
    ] = None
    override_opt_param_scheduler: Annotated[bool, NoEffect("the flags always decide the schedule")] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool, Only(False, reason="the flags decide the schedule; give the flags of the earlier run")
    ] = False


class CheckpointFlags(SectionModel):
    """Checkpoints"""

    load: Annotated[
        str | None,
        _help(
            "run or checkpoint to continue, or a Hugging Face folder with the predictor's weights",
            min_length=1,
        ),
    ] = None
    save: Annotated[str | None, _help("folder of the run: metrics, logs, checkpoints", min_length=1)] = None
    save_interval: Annotated[
        int | None, _help("optimizer steps between checkpoints; the last one is saved too", ge=1)
    ] = None
    save_hf: Annotated[
        bool,
        _help(
            "with each checkpoint also write <save>/hf/iter_…/predictor, a folder that diffusers and transformers load; "
            "these folders are never removed"
        ),
    ] = False
    ckpt_format: Annotated[
        str, Only("torch_dcp", reason="checkpoints are torch's distributed checkpoints")
    ] = "torch_dcp"
    finetune: Annotated[bool, _help("take only the weights of --load; start at step 0")] = False
    accept_changes: Annotated[
        bool,
        _help(
            "continue --load with other plugins or another configuration than its checkpoint was written with"
        ),
    ] = False
    no_load_optim: Annotated[bool, _help("do not load the optimizer's state")] = False
    no_load_rng: Annotated[bool, _help("do not load the generators' states")] = False
    no_save_optim: Annotated[bool, _help("do not save the optimizer's state")] = False
    no_save_rng: Annotated[bool, _help("do not save the generators' states")] = False
    async_save: Annotated[bool, NoEffect("training goes on while a checkpoint is written, by default")] = (
        False
    )
    no_async_save: Annotated[
        bool,
        _help(
            "let training wait until a checkpoint is written; otherwise it goes on, and the machine's memory holds a copy"
        ),
    ] = False
    keep_last: Annotated[
        int | None,
        _help("checkpoints that stay: so many of the newest ones; default: all", ge=1),
    ] = None
    keep_every: Annotated[
        int | None,
        _help("optimizer steps: with --keep-last, a checkpoint at a multiple of it stays too", ge=1),
    ] = None
    exit_on_missing_checkpoint: Annotated[bool, NoEffect("a missing checkpoint is always an error")] = False
    no_load_strict: Annotated[bool, Only(False, reason="weights are always loaded strictly")] = False


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
