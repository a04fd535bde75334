"""The command line of `mm train`: parsing, checking, help."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import PrivateAttr
from pydantic.fields import FieldInfo

from mm_core.config import flag_table as table
from mm_core.config.document import Document
from mm_core.config.findings import ConfigError, Finding, clip, closest, has_errors
from mm_core.config.keys import NoEffect, Only
from mm_core.config.origin import Origin
from mm_core.config.section import check_section, markers

_WHOLE = re.compile(r"[+-]?\d+\Z")


class TrainFlags(
    table.FileFlags,
    table.BatchFlags,
    table.OptimizerFlags,
    table.ScheduleFlags,
    table.CheckpointFlags,
    table.PrecisionFlags,
    table.LaunchFlags,
    table.LogFlags,
    table.AcceptedFlags,
    table.RefusedFlags,
):
    """Every flag of a training job, typed. `given` tells which were written; `model_fields_set` as well."""

    _given: dict[str, str] = PrivateAttr(default_factory=dict)
    _findings: tuple[Finding, ...] = PrivateAttr(default=())

    @property
    def given(self) -> Mapping[str, str]:
        """Attribute -> flag as the user spelt it."""
        return self._given

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
            f"{dp_size} ranks = {each}",
            f"Use {near}",
        )

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
        return (
            Origin("flag", detail=self.spelling(name)) if name in self.model_fields_set else Origin("default")
        )

    def finding(self, name: str, code: str, message: str, suggestion: str = "") -> Finding:
        """Return an error about one flag."""
        flag = self.spelling(name)
        return Finding("error", code, message, path=flag, suggestion=suggestion)


def flag_name(attribute: str) -> str:
    """`micro_batch_size` is `--micro-batch-size`."""
    return "--" + attribute.replace("_", "-")


def world_size(flags: TrainFlags, environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks of the job: a launcher's `WORLD_SIZE`, else what the flags ask for."""
    launched = environ.get("WORLD_SIZE", "")
    if "RANK" in environ and launched.isdigit() and int(launched) > 0:
        return int(launched)
    return (flags.nproc_per_node or 1) * (flags.nnodes or 1)


def parse_train_flags(argv: Sequence[str]) -> TrainFlags:
    """Read a command line: `--flag value`, `--flag=value`, `_` or `-`; no abbreviations. A flag given
    twice: the last one counts.

    Raises:
        ConfigError: everything that is wrong with the flags, each with a suggestion.
    """
    values, given, findings = _split(argv)
    document = Document("", values, {(name,): Origin("flag", detail=flag) for name, flag in given.items()})
    checked = check_section(TrainFlags, document, label="the command line")
    findings += [_about_flag(finding, given) for finding in checked.findings]
    if checked.section is not None:
        checked.section._given = given
        findings += _cross_checks(checked.section)
    if checked.section is None or has_errors(findings):
        raise ConfigError(findings)
    checked.section._findings = tuple(findings)
    return checked.section


def _split(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    findings: list[Finding] = []
    rest = list(argv)
    previous = ""
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            findings.append(_stray(word, previous))
            continue
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        field = TrainFlags.model_fields.get(name)
        previous = flag
        if field is None:
            findings.append(_unknown(flag))
            while rest and not _is_flag(rest[0]):
                rest.pop(0)  # its value is no mistake of its own
            continue
        kind = _kind(field)
        texts = [text] if equals else []
        if not equals and kind is not bool:
            while rest and not _is_flag(rest[0]) and (kind is list or not texts):
                texts.append(rest.pop(0))
        empty = bool(texts) and not any(text.strip() for text in texts)
        if empty or (not texts and kind is not bool):
            what = "it needs a value, and the one given is empty" if empty else "a value is missing"
            mend = f"Write {flag} or {flag}=false" if kind is bool else f"Write {flag} {_metavar(field)}"
            findings.append(Finding("error", "missing-value", what, path=flag, suggestion=mend))
            continue
        if name in given:
            findings.append(
                Finding("note", "repeated-flag", "given more than once; the last one counts", path=flag)
            )
        given[name] = flag
        values[name] = _convert(kind, texts)
    return values, given, findings


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def _kind(field: FieldInfo) -> type:
    """Return bool, int, float, list or str: how a flag's text is read."""
    annotation = field.annotation
    names = {annotation, typing.get_origin(annotation), *typing.get_args(annotation)}
    names |= {typing.get_origin(arg) for arg in typing.get_args(annotation)}
    return next((kind for kind in (bool, int, float, list) if kind in names), str)


def _convert(kind: type, texts: list[str]) -> Any:
    """Return the value of a flag; text that is no value of the kind stays text, and the check says so."""
    if kind is bool:
        return {"": True, "true": True, "false": False}.get(texts[0].lower(), texts[0]) if texts else True
    if kind is list:
        return [part for text in texts for part in text.split(",") if part]
    text = texts[0]
    if kind is int and _WHOLE.match(text) and len(text) < 30:
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _unknown(flag: str) -> Finding:
    near = closest(flag, [flag_name(name) for name in TrainFlags.model_fields])
    mend = f"Did you mean {near}?" if near else "`mm train --help` lists all"
    return Finding("error", "unknown-flag", "there is no such flag", path=flag, suggestion=mend)


def _stray(word: str, previous: str) -> Finding:
    name = previous[2:].replace("-", "_")
    field = TrainFlags.model_fields.get(name)
    if field is not None and _kind(field) is bool:
        mend = (
            f"{previous} takes no value"
            if word.lower() != "false"
            else f"Leave {previous} out, or write {previous}=false"
        )
    else:
        mend = "Values follow a flag: --flag value"
    return Finding(
        "error", "stray-argument", f'unexpected argument "{clip(word)}"', path="command line", suggestion=mend
    )


def _about_flag(finding: Finding, given: Mapping[str, str]) -> Finding:
    """Say it about a flag rather than about a key of a file."""
    message, suggestion = finding.message, finding.suggestion
    for name, flag in given.items():
        if finding.path == flag:
            message = message.removeprefix(f'"{name}" ').removeprefix("is ").removeprefix(f'"{name}": ')
    message = message.removeprefix("true: only false is accepted: ")
    if "quotes" in suggestion:
        suggestion = ""
    return dataclasses.replace(finding, message=message, suggestion=suggestion)


def _cross_checks(flags: TrainFlags) -> list[Finding]:
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
    if flags.finetune and flags.load is None:
        findings.append(
            flags.finding("finetune", "missing-flag", "needs --load: there are no weights to start from")
        )
    nodes = flags.nnodes or 1
    if (flags.node_rank or 0) >= nodes:
        findings.append(
            flags.finding("node_rank", "out-of-range", f"{flags.node_rank} must be below --nnodes {nodes}")
        )
    if nodes > 1 and flags.master_addr is None and flags.nproc_per_node is not None:
        findings.append(flags.finding("nnodes", "missing-flag", f"{nodes} machines need --master-addr"))
    return findings


def required_flags(flags: TrainFlags) -> list[Finding]:
    """Return errors for flags without which no training can run."""
    wanted = {
        "train_iters": "how many optimizer steps to train",
        "lr": "the learning rate",
    }
    return [
        flags.finding(
            name,
            "missing-flag",
            f"it is required: {why}",
            f"Add {flag_name(name)} {_metavar(TrainFlags.model_fields[name])}",
        )
        for name, why in wanted.items()
        if name not in flags.model_fields_set
    ]


# -- help
# ------------------------------------------------------------------------------------------------------------


def _metavar(field: FieldInfo) -> str:
    for annotation in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(annotation) is typing.Literal:
            return "|".join(map(str, typing.get_args(annotation)))
    return {int: "N", float: "X", list: "A,B", str: "TEXT", bool: ""}[_kind(field)]


def train_help(width: int = 110) -> str:
    """Return the help page of `mm train`."""
    lines = [
        "usage: mm train --mm-model FILE --mm-data FILE [--mm-tool FILE] [--fsdp2-config-path FILE] [FLAGS]",
        "",
        "Check a job, then build, shard and train it. Underscores are accepted for hyphens, and "
        "--flag=value.",
    ]
    for group in table.GROUPS:
        lines += ["", f"{(group.__doc__ or '').strip()}:"]
        compact = []
        for name, field in group.model_fields.items():
            only = markers(field, Only)
            idle = markers(field, NoEffect)
            if group in (table.AcceptedFlags, table.RefusedFlags):
                compact.append(flag_name(name))
                continue
            if idle:
                text = f"accepted without effect: {idle[0].reason}"
            elif only:
                values = [str(value) for value in only[0].values if value not in (None, False)]
                text = (
                    f"only {' or '.join(values)}: {only[0].reason}"
                    if values
                    else f"refused: {only[0].reason}"
                )
            else:
                text = field.description or ""
                if field.default not in (None, False, 0) and "required" not in text:
                    text += f" (default {field.default})"
            head = f"  {flag_name(name)} {_metavar(field)}".rstrip()
            body = textwrap.wrap(text, width - 34)
            if len(head) > 32:
                lines.append(head)
                head = ""
            lines += [f"{head:<33} {body[0]}", *(" " * 34 + line for line in body[1:])]
        lines += textwrap.wrap(
            ", ".join(compact), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"
