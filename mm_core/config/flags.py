"""The flags of a training job, and how they fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import PrivateAttr

from mm_core.config import flag_table as table
from mm_core.config.document import Document
from mm_core.config.environment import launched, read
from mm_core.config.findings import ConfigError, Finding, clip, closest
from mm_core.config.flag_help import flag_name, metavar
from mm_core.config.optimizer_flags import check_optimizer
from mm_core.config.origin import DEFAULT, Origin
from mm_core.config.overrides import FLAG_OF, Override
from mm_core.config.parallel import MODEL_PARALLEL, check_sizes


class TrainFlags(
    table.FileFlags,
    table.BatchFlags,
    table.OptimizerFlags,
    table.ScheduleFlags,
    table.CheckpointFlags,
    table.LoraFlags,
    table.LossFlags,
    table.PrecisionFlags,
    table.RecomputeFlags,
    table.LaunchFlags,
    table.ParallelFlags,
    table.LogFlags,
    table.AcceptedFlags,
    table.UnavailableFlags,
    table.RefusedFlags,
):
    """Every flag of a training job, typed. `given` tells which were written; `model_fields_set` as well."""

    _given: dict[str, str] = PrivateAttr(default_factory=dict)
    _findings: tuple[Finding, ...] = PrivateAttr(default=())
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)
    _job_file: str | None = PrivateAttr(default=None)
    _sections: dict[str, Document] = PrivateAttr(default_factory=dict)
    _plugins: Document | None = PrivateAttr(default=None)
    _overrides: tuple[Override, ...] = PrivateAttr(default=())

    @property
    def given(self) -> Mapping[str, str]:
        """Attribute -> flag as the user spelt it, `gpt_args.lr` if the job file has it."""
        return self._given

    @property
    def job_file(self) -> str | None:
        """The job file, as the user named it."""
        return self._job_file

    @property
    def sections(self) -> Mapping[str, Document]:
        """The sections that are written in the job file: `model`, `data`, `tools`, `fsdp2`."""
        return self._sections

    @property
    def plugins(self) -> Document | None:
        """The job file, if it has the key `plugins`, which goes to the model section."""
        return self._plugins

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The `key.path=value` of the command line that are about sections."""
        return self._overrides

    def source(self, section: str) -> str | None:
        """Return the file that has a section: the one that its flag names, or the job file; None if none has."""
        named: str | None = getattr(self, FLAG_OF[section])
        return named if named is not None or section not in self._sections else self._job_file

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Notes and warnings about the flags."""
        return self._findings

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up, from `--lr-warmup-iters` or `--lr-warmup-fraction`."""
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * (self.lr_decay_iters or self.train_iters))
        return self.lr_warmup_iters

    @property
    def machines(self) -> tuple[int, int]:
        """The smallest and the largest number of machines, from `--nnodes`: N means (N, N), MIN:MAX both."""
        low, _, high = str(self.nnodes or 1).partition(":")
        return int(low), int(high or low)

    @property
    def elastic(self) -> bool:
        """Whether ranks are started again after a failure, or machines may come and go."""
        return bool(self.max_restarts or isinstance(self.nnodes, str) or self.rdzv_backend == "c10d") or (
            self.rdzv_backend is None and any((self.rdzv_endpoint, self.rdzv_id, self.rdzv_conf))
        )

    def accumulation_steps(self, dp_size: int) -> int:
        """Return forward passes of one rank in one optimizer step, for `dp_size` data-parallel ranks.

        Raises:
            ConfigError: the global batch is no multiple of micro batch × ranks.
        """
        problem = self.check_batch(dp_size)
        if problem is not None:
            raise ConfigError([problem])
        return self.with_global_batch(dp_size).global_batch_size // (self.micro_batch_size * dp_size)

    def check_batch(self, dp_size: int) -> Finding | None:
        """Return an error if the global batch cannot be dealt to `dp_size` ranks."""
        each = self.micro_batch_size * dp_size
        if self.global_batch_size % each == 0:
            return None
        lower = self.global_batch_size // each * each
        near = " or ".join(str(size) for size in (lower, lower + each) if size)
        return self.finding(
            "global_batch_size",
            "out-of-range",
            f"{self.global_batch_size} is no multiple of --micro-batch-size {self.micro_batch_size} × "
            f"{dp_size} {self._dealt_to} = {each}",
            f"Use {near}",
        )

    @property
    def _dealt_to(self) -> str:
        """What samples are dealt to."""
        several = any(getattr(self, name) > 1 for name in MODEL_PARALLEL)
        return "data-parallel groups of ranks" if several else "ranks"

    def with_global_batch(self, dp_size: int) -> TrainFlags:
        """Return the flags with the default global batch filled in: one forward pass of each rank."""
        if self.global_batch_size:
            return self
        return self.model_copy(update={"global_batch_size": self.micro_batch_size * dp_size})

    def spelling(self, name: str) -> str:
        """Return the flag of an attribute, as the user spelt it or as the help does."""
        return self._given.get(name, flag_name(name))

    def origin(self, name: str) -> Origin:
        """Return where the value of an attribute comes from."""
        if name not in self.model_fields_set:
            return DEFAULT
        return self._origins.get(name) or Origin("flag", detail=self.spelling(name))

    def finding(self, name: str, code: str, message: str, suggestion: str = "") -> Finding:
        """Return an error about one flag."""
        flag, origin = self.spelling(name), self.origin(name)
        if origin.kind == "file":  # the place does not say which flag it is
            message = f"{name}: {message}"
        return Finding.at(origin, "error", code, message, path=flag, suggestion=suggestion)


def world_size(flags: TrainFlags, environ: Mapping[str, str] | None = None) -> int:
    """Return the number of ranks of the job: a launcher's `WORLD_SIZE`, else what the flags ask for."""
    launched = read("WORLD_SIZE", environ) or ""
    whole = launched.isascii() and launched.isdigit() and len(launched) < 10  # "²".isdigit() is true
    if read("RANK", environ) is not None and whole and int(launched) > 0:
        return int(launched)
    return (flags.nproc_per_node or 1) * flags.machines[1]


def check_together(flags: TrainFlags) -> list[Finding]:
    """Return the errors of flags that do not fit each other."""
    findings = []
    if flags.lr_warmup_fraction is not None and flags.lr_warmup_iters:
        findings.append(
            flags.finding(
                "lr_warmup_fraction",
                "conflict",
                "the warm-up is given by --lr-warmup-iters too",
                "Keep one of them",
            )
        )
    if (
        flags.warmup_steps > (flags.lr_decay_iters or flags.train_iters)
        and "train_iters" in flags.model_fields_set
    ):
        limit = flags.lr_decay_iters or flags.train_iters
        findings.append(
            flags.finding(
                "lr_warmup_iters",
                "out-of-range",
                f"{flags.warmup_steps} steps of warm-up do not fit into {limit} steps",
            )
        )
    if flags.min_lr > flags.lr and "lr" in flags.model_fields_set:
        findings.append(flags.finding("min_lr", "out-of-range", f"{flags.min_lr} is above --lr {flags.lr}"))
    if flags.save_interval is not None and flags.save is None:
        findings.append(
            flags.finding(
                "save_interval",
                "missing-flag",
                "needs --save: there is no folder to save into",
                "Add --save FOLDER",
            )
        )
    if flags.keep_last is not None and flags.save is None:
        text = "needs --save: there is no folder to save into"
        findings.append(flags.finding("keep_last", "missing-flag", text, "Add --save FOLDER"))
    if flags.keep_every is not None and flags.keep_last is None:
        text = "needs --keep-last: without it every checkpoint stays"
        findings.append(flags.finding("keep_every", "missing-flag", text, "Add --keep-last N"))
    if flags.async_save and flags.no_async_save:
        text = "contradicts --async-save"
        findings.append(flags.finding("no_async_save", "conflict", text, "Leave one of them out"))
    if flags.save_hf and flags.save is None:
        text = "needs --save: the folders are written into that of the run"
        findings.append(flags.finding("save_hf", "missing-flag", text, "Add --save FOLDER"))
    if flags.finetune and flags.load is None:
        findings.append(
            flags.finding("finetune", "missing-flag", "needs --load: there are no weights to start from")
        )
    return [*findings, *check_optimizer(flags), *check_sizes(flags), *check_machines(flags)]


def check_machines(flags: TrainFlags) -> list[Finding]:
    """Return the errors of flags that say how machines find each other."""
    findings = []
    least, most = flags.machines
    if least > most:
        text = f"{flags.nnodes} reads MIN:MAX, and {least} is above {most}"
        findings.append(flags.finding("nnodes", "out-of-range", text, f"Use {most}:{least}"))
    elif (flags.node_rank or 0) >= most:
        text = f"{flags.node_rank} must be below --nnodes {most}"
        findings.append(flags.finding("node_rank", "out-of-range", text))
    if least != most and not flags.global_batch_size:
        text = f"{flags.nnodes} machines need --global-batch-size: its default would change with their number"
        findings.append(flags.finding("nnodes", "missing-flag", text))
    known = launched() or read("SLURM_STEP_ID") is not None  # the launcher says where
    meets = flags.master_addr or flags.rdzv_endpoint or read("MASTER_ADDR")
    if most > 1 and not known and not meets and flags.nproc_per_node is not None:
        wanted = "--rdzv-endpoint" if flags.elastic else "--master-addr"
        findings.append(flags.finding("nnodes", "missing-flag", f"{most} machines need {wanted}"))
    if most > 1 and not known and flags.elastic and flags.rdzv_id is None:
        text = f"{most} machines of an elastic job need --rdzv-id, the same on each"
        findings.append(flags.finding("nnodes", "missing-flag", text))
    if flags.rdzv_backend == "static" and isinstance(flags.nnodes, str):
        text = "static machines are a fixed number, and --nnodes is a range"
        findings.append(flags.finding("rdzv_backend", "conflict", text, "Use c10d"))
    if flags.rdzv_endpoint is not None and split_endpoint(flags.rdzv_endpoint)[0] is None:
        text = f'"{clip(flags.rdzv_endpoint)}" is no HOST:PORT'
        mend = "Write an IPv6 address in brackets" if flags.rdzv_endpoint.count(":") > 1 else ""
        findings.append(flags.finding("rdzv_endpoint", "bad-value", text, mend))
    if flags.master_addr is not None and not re.fullmatch(
        r"[\w.-]+|[\w:.%]*:[\w:.%]*:[\w:.%]*", flags.master_addr
    ):
        text = f'"{clip(flags.master_addr)}" is no name and no address of a machine'
        mend = "The port goes to --master-port"
        findings.append(flags.finding("master_addr", "bad-value", text, mend))
    problem = rendezvous_settings(flags.rdzv_conf or "")[1]
    if problem:
        findings.append(flags.finding("rdzv_conf", "bad-value", problem))
    if (flags.max_restarts or 0) > 0 and flags.save is None:
        text = "needs --save: without checkpoints a restart begins at step 0"
        findings.append(flags.finding("max_restarts", "missing-flag", text, "Add --save FOLDER"))
    return findings


def split_endpoint(text: str) -> tuple[str | None, int | None]:
    """Return host and port of HOST, HOST:PORT or [IPV6]:PORT; no host if it is none of them."""
    match = re.fullmatch(r"(?:\[([\w:.%]+)\]|([\w.-]+))(?::(\d{1,5}))?", text, re.ASCII)
    if match is None or int(match[3] or 0) > 65535:
        return None, None
    return match[1] or match[2], int(match[3]) if match[3] else None


#: Settings of torch's c10d rendezvous that hold seconds or numbers.
_RENDEZVOUS = (
    "timeout", "join_timeout", "last_call_timeout", "close_timeout", "heartbeat_timeout", "read_timeout",
    "keep_alive_interval", "keep_alive_max_attempt",
)  # fmt: skip


def rendezvous_settings(text: str) -> tuple[dict[str, int], str]:
    """Return what `--rdzv-conf` says, and what is wrong with it, or the empty text."""
    settings: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in _RENDEZVOUS:
            near = closest(name, _RENDEZVOUS)
            mend = f"did you mean {near}?" if near else f"there are {', '.join(_RENDEZVOUS)}"
            return {}, f'there is no setting "{clip(name)}"; {mend}'
        if not (value.isascii() and value.isdigit() and 0 < int(value) < 10**6):
            return {}, f'"{clip(part)}" needs a whole number from 1, such as {name}=60'
        settings[name] = int(value)
    return settings, ""


def required_flags(flags: TrainFlags) -> list[Finding]:
    """Return errors for flags without which no training can run."""
    wanted = {
        "train_iters": "how many optimizer steps to train",
        "lr": "the learning rate",
    }
    inside = f", or write it under gpt_args of {flags.job_file}" if flags.job_file else ""
    return [
        flags.finding(
            name,
            "missing-flag",
            f"it is required: {why}",
            f"Add {flag_name(name)} {metavar(TrainFlags.model_fields[name])}{inside}",
        )
        for name, why in wanted.items()
        if name not in flags.model_fields_set
    ]
