"""The environment variables that MM Zoo, a launcher, the libraries below or MindSpeed-MM's scripts know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mm_core.config.findings import clip
from mm_core.config.secrets import HIDDEN, hide, is_secret

OURS: Final = "MM Zoo"
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as it is set.
        reader: who reads it: `MM Zoo`, a library; empty if nobody does here, and setting it has no effect.
        meaning: what it is for, with its unit; a part of a sentence.
        default: what holds without it; empty if it is unsaid or computed.
        words: the values to choose from; empty if any will do.
        low, high: the range of a whole number; None: it is no number, or has no such limit.
        pattern: what a value of several parts must match, and `form`, how to say that.
    """

    name: str
    reader: str
    meaning: str
    default: str = ""
    words: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None
    pattern: str = ""
    form: str = ""

    @property
    def allowed(self) -> str:
        """The values, in words: `0 or 1`, `from 120 to 7200`, `text`."""
        if self.words:
            return " or ".join(filter(None, [", ".join(self.words[:-1]), self.words[-1]]))
        if self.low is None:
            return self.form or "text"
        return f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"

    def problem(self, value: str) -> str:
        """Return what is wrong with a value, or the empty text."""
        if self.words:
            return "" if value in self.words else f"must be {self.allowed}"
        if self.pattern:
            return "" if re.fullmatch(self.pattern, value, re.ASCII) else f"must be {self.form}"
        if self.low is None:
            return ""
        if not _WHOLE.fullmatch(value):
            return f"is no whole number, and must be {self.allowed}"
        fits = self.low <= int(value) and (self.high is None or int(value) <= self.high)
        return "" if fits else f"is out of range: it must be {self.allowed}"

    def shown(self, value: str) -> str:
        """Return a value as it may be printed: secrets are hidden, long texts cut."""
        return HIDDEN if is_secret(self.name) else clip(hide(value))


_SWITCH = ("0", "1")
_DEVICES = "devices that this process may see, such as 0,1"
_SETTINGS = r"\w+:[^,]+(,\w+:[^,]+)*"
_SETTINGS_FORM = "settings such as expandable_segments:True"
_TORCH, _NPU, _HCCL = "torch", "torch_npu", "torch_npu (HCCL)"

#: In the order of `mm doctor`: ours, the launcher's, the libraries', Ascend's, and what MindSpeed-MM alone reads.
VARIABLES: tuple[Variable, ...] = (
    Variable(
        "MM_DEVICE",
        OURS,
        "device to compute on; without it CUDA, else an NPU, else the CPU",
        words=("cpu", "cuda", "npu"),
    ),
    Variable(
        "MM_PLUGINS",
        OURS,
        "plugins that may take part, separated by commas; empty: the core alone",
        "all that are installed",
    ),
    Variable("MM_PARENT_PID", OURS, "set by mm train for the ranks that it starts", low=1),
    Variable(
        "PYDANTIC_DISABLE_PLUGINS",
        "pydantic",
        "set by our commands: they need none of pydantic's plugins",
        "__all__",
    ),
    Variable("RANK", OURS, "number of this process in the job; a launcher sets it", low=0),
    Variable("WORLD_SIZE", OURS, "processes of the job; a launcher sets it", low=1),
    Variable(
        "LOCAL_RANK", OURS, "number of this process on its machine, and its device; a launcher sets it", low=0
    ),
    Variable("LOCAL_WORLD_SIZE", OURS, "processes of the job on this machine; a launcher sets it", low=1),
    Variable("MASTER_ADDR", OURS, "address at which the processes meet; a launcher sets it"),
    Variable("MASTER_PORT", OURS, "port at which the processes meet; a launcher sets it", low=0, high=65535),
    Variable(
        "TORCHELASTIC_RUN_ID",
        OURS,
        "set by torchrun: step times are written to a standard output that is no terminal",
    ),
    Variable(
        "TORCHELASTIC_MAX_RESTARTS", OURS, "set by torchrun: how often it may start the ranks again", low=0
    ),
    Variable(
        "TORCHELASTIC_ERROR_FILE", OURS, "set by torchrun: tells one job from another that has no --rdzv-id"
    ),
    Variable(
        "TORCHELASTIC_RESTART_COUNT", OURS, "set by torchrun: how often the ranks were started again", low=0
    ),
    Variable(
        "TORCHELASTIC_USE_AGENT_STORE", OURS, "set by torchrun: True if it keeps the store of the ranks"
    ),
    Variable(
        "MM_JOB", OURS, "set by mm train for ranks that it may start again: the job that they belong to"
    ),
    Variable("MM_ATTEMPT", OURS, "set by mm train for ranks that it may start again: which start this is"),
    *(
        Variable(name, OURS, f"set by SLURM: {meaning}", low=0 if number else None)
        for name, number, meaning in (
            ("SLURM_JOB_ID", False, "number of the job; the port follows from it"),
            ("SLURM_STEP_ID", True, "number of the srun step; srun alone sets it"),
            ("SLURM_PROCID", True, "number of this task"),
            ("SLURM_NTASKS", True, "tasks of the step"),
            ("SLURM_STEP_NUM_TASKS", True, "tasks of the step, also in a shell"),
            ("SLURM_LOCALID", True, "number of this task on its machine"),
            ("SLURM_NODEID", True, "number of this machine in the step"),
            ("SLURM_NNODES", True, "machines of the job"),
            ("SLURM_STEP_NUM_NODES", True, "machines of the step"),
            ("SLURM_NTASKS_PER_NODE", True, "tasks of each machine"),
            ("SLURM_TASKS_PER_NODE", False, "tasks of each machine, such as 8(x2)"),
            ("SLURM_STEP_TASKS_PER_NODE", False, "tasks of each machine of the step"),
            ("SLURM_JOB_NODELIST", False, "machines of the job, such as node[01-04]"),
            ("SLURM_STEP_NODELIST", False, "machines of the step"),
        )
    ),
    Variable(
        "OMP_NUM_THREADS",
        _TORCH,
        "CPU threads of each process",
        "cores / ranks",
        pattern=r"[1-9]\d*(,[1-9]\d*)*",
        form="a whole number from 1",
    ),
    Variable(
        "TOKENIZERS_PARALLELISM",
        "tokenizers",
        "whether tokenizers use several threads; false in processes that load data",
        words=("true", "false", *_SWITCH),
    ),
    Variable("CUDA_VISIBLE_DEVICES", _TORCH, _DEVICES, "all"),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        _TORCH,
        "queues of work between process and device; FSDP2 needs more than one",
        "8",
        low=1,
        high=32,
    ),
    Variable("CUBLAS_WORKSPACE_CONFIG", _TORCH, "workspace of cuBLAS; --use-deter-comp sets :4096:8"),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        _TORCH,
        "memory allocator of CUDA devices",
        pattern=_SETTINGS,
        form=_SETTINGS_FORM,
    ),
    Variable(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        _TORCH,
        "whether torch imports torch_npu by itself",
        "1",
        words=_SWITCH,
    ),
    Variable("HF_HUB_OFFLINE", "huggingface_hub", "1: nothing is downloaded", "0"),
    Variable("HF_HOME", "huggingface_hub", "folder of downloaded files", "~/.cache/huggingface"),
    Variable("HF_ENDPOINT", "huggingface_hub", "address of the hub", "https://huggingface.co"),
    Variable("HF_TOKEN", "huggingface_hub", "your token of the hub"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", _NPU, _DEVICES, "all"),
    Variable(
        "ASCEND_SLOG_PRINT_TO_STDOUT", _NPU, "1: CANN's log goes to the standard output", "0", words=_SWITCH
    ),
    Variable(
        "ASCEND_GLOBAL_LOG_LEVEL",
        _NPU,
        "CANN's log: 0 debug, 1 info, 2 warning, 3 error, 4 nothing",
        "3",
        low=0,
        high=4,
    ),
    Variable("ASCEND_GLOBAL_EVENT_ENABLE", _NPU, "1: CANN logs events", "0", words=_SWITCH),
    Variable(
        "ASCEND_LAUNCH_BLOCKING",
        _NPU,
        "1: operators run one after the other, to find the one that fails",
        "0",
        words=_SWITCH,
    ),
    Variable(
        "TASK_QUEUE_ENABLE", _NPU, "how far operators are queued ahead: 0 off, 1, 2 more", "1", low=0, high=2
    ),
    Variable(
        "COMBINED_ENABLE", _NPU, "1: operators on non-contiguous tensors are combined", "0", words=_SWITCH
    ),
    Variable(
        "CPU_AFFINITY_CONF",
        _NPU,
        "binding of threads to cores: 0 off, 1 coarse, 2 fine",
        "0",
        pattern=r"[0-2](,.+)?",
        form="0, 1 or 2, then cores if wanted",
    ),
    Variable(
        "MULTI_STREAM_MEMORY_REUSE", _NPU, "1: memory of communication is used again", "1", words=_SWITCH
    ),
    Variable(
        "NPU_ASD_ENABLE", _NPU, "detection of silent errors: 0 off, 1 to 3 log or stop", "0", low=0, high=3
    ),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF", _NPU, "memory allocator of NPUs", pattern=_SETTINGS, form=_SETTINGS_FORM
    ),
    Variable("ACLNN_CACHE_LIMIT", _NPU, "operators that are kept prepared", "10000", low=1, high=10_000_000),
    Variable("HCCL_CONNECT_TIMEOUT", _HCCL, "seconds until ranks must have met", "120", low=120, high=7200),
    Variable("HCCL_EXEC_TIMEOUT", _HCCL, "seconds that a collective may take", "1800", low=68, high=17340),
    Variable("HCCL_BUFFSIZE", _HCCL, "MB of the buffer of each communicator", "200", low=1),
    Variable(
        "HCCL_DETERMINISTIC",
        _HCCL,
        "whether sums are added in one order",
        "false",
        words=("true", "false", "strict"),
    ),
    Variable(
        "HCCL_WHITELIST_DISABLE",
        _HCCL,
        "1: other machines are not checked against a list",
        "1",
        words=_SWITCH,
    ),
    *(
        Variable(name, "", meaning)
        for name, meaning in {
            "NPUS_PER_NODE": "a variable of launch scripts; --nproc-per-node tells the number of ranks",
            "NON_MEGATRON": "MindSpeed-MM's switch for patching Megatron; nothing is patched here",
            "ENABLE_GC_THRESHOLD": "MindSpeed-MM's garbage collection; Python's own stands",
            "OOTB_OPTIMIZER_PARSE_ARGS": "MindSpeed's automatic parallelism, which is not available",
            "OOTB_OPTIMIZER_PARSE_MODEL": "MindSpeed's automatic parallelism, which is not available",
            "OOTB_OPTIMIZER_PROFILING": "MindSpeed's automatic parallelism, which is not available",
            "MM_FORCE_EP_BALANCE": "MindSpeed-MM's forced expert balance, which is not available",
            "HF_SAVE_WAIT_MODE": "MindSpeed-MM's way to wait while a folder is saved",
            "TRITON_F32_DEFAULT": "MindSpeed-MM's precision of Triton kernels",
            "IMAGE_PLACEHOLDER": "MindSpeed-MM's word for an image; data.json says it",
            "VIDEO_PLACEHOLDER": "MindSpeed-MM's word for a video; data.json says it",
            "AUDIO_PLACEHOLDER": "MindSpeed-MM's word for audio; data.json says it",
            "CLOSE_MATMUL_K_SHIFT": "MindSpeed-MM's switch for NPU matrix products; --use-deter-comp decides",
            "AE_SPATIAL_COMPRESSION": "MindSpeed-MM's factor of the autoencoder; its config.json says it",
            "PROFILE_TYPE": "MindSpeed-MM's automatic profiling; tools.json decides",
            "PROFILE_START_STEP": "MindSpeed-MM's automatic profiling; tools.json decides",
            "MS_NODE_TIMEOUT": "MindSpore's timeout; MindSpore is not used",
            "USE_TF": "whether transformers uses TensorFlow; it never does here",
        }.items()
    ),
)
