"""The flags of MindSpeed-MM's inference scripts that `mm generate` knows besides its own.

A script for `inference_sora.py` gives what Megatron-LM wants to know of every job. What only training reads has no
effect here; what would change the videos is refused, as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from pydantic import create_model
from pydantic.fields import FieldInfo

from mm_core.config import flag_table as table
from mm_core.config.document import Document
from mm_core.config.findings import ConfigError, Finding, has_errors, unavailable_is_error
from mm_core.config.flag_help import flag_name, kind_of, metavar
from mm_core.config.flag_parsing import convert
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.section import SectionModel, check_section

_TRAINING = "only training reads it"
_ONE_PROCESS = (
    "ranks share videos by --context-parallel-size alone, and are started by --nproc-per-node or torchrun"
)
_ONE_MACHINE = "mm generate starts ranks on one machine; torchrun starts those of several"
_DTYPE = "dtype in the inference file decides"
_PROMPTS = "the inference file names tokenizer and prompts"
_LOCK = "only `mm train` compares the plugins with a lock"
#: Groups of training flags that generation has no use for, whatever they say.
_OF_TRAINING = (
    table.FileFlags,
    table.BatchFlags,
    table.OptimizerFlags,
    table.ScheduleFlags,
    table.CheckpointFlags,
    table.LossFlags,
    table.PrecisionFlags,
    table.LogFlags,
)
_MARKS: dict[str, Any] = {
    **dict.fromkeys(
        ("lora_target_modules", "lora_target_parameters"), NoEffect("the adapter of --lora-load tells them")
    ),
    "load_base_model": NoEffect(
        "--load, or from_pretrained in the inference file, names the weights under an adapter"
    ),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout"), NoEffect("it is of LoRA's training")),
    "bf16": NoEffect(_DTYPE),
    "fp16": NoEffect(_DTYPE),
    "finetune": NoEffect("only weights are loaded", quiet_for=(True,)),
    "locked": Only(False, reason=_LOCK),
    "lock_file": Only(None, reason=_LOCK),
    "nnodes": Only(None, 1, reason=_ONE_MACHINE),
    **dict.fromkeys(
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size",
        ),
        Only(1, reason=_ONE_PROCESS),
    ),
    **dict.fromkeys(("node_rank", "master_addr", "master_port"), NoEffect(_ONE_MACHINE)),
    **dict.fromkeys(
        ("distributed_backend", "distributed_timeout_minutes"), NoEffect("ranks meet with the defaults")
    ),
    "use_torch_fsdp2": NoEffect("nothing is sharded in generation"),
    **dict.fromkeys(("tokenizer_type", "tokenizer_model", "tokenizer_name_or_path"), NoEffect(_PROMPTS)),
    "seq_length": NoEffect("model_max_length of the inference file's tokenizer says how long a prompt is"),
}


def classic_flags() -> type[SectionModel]:
    """Return the class of all flags of a training job, each as generation takes it."""
    fields: dict[str, Any] = {}
    for group in table.GROUPS:
        for name, field in group.model_fields.items():
            mark = _MARKS.get(name)
            if mark is None and group in _OF_TRAINING:
                mark = NoEffect(_TRAINING)
            fields[name] = (_marked(field, mark), field.default)
    return create_model("ClassicFlags", __base__=SectionModel, **fields)


def _marked(field: FieldInfo, mark: Any) -> Any:
    """Return a field's annotation, its kind replaced by `mark` if there is one."""
    kept = [each for each in field.metadata if mark is None or not isinstance(each, NoEffect | NotYet | Only)]
    marks = (*kept, *([mark] if mark is not None else ()))
    return Annotated[(field.annotation, *marks)] if marks else field.annotation


def take_classic_flags(argv: Sequence[str], own: Collection[str]) -> tuple[list[str], list[Finding]]:
    """Take the flags out of a command line that are none of generation's own, with their values.

    Args:
        own: generation's own flags, by attribute.

    Returns:
        The rest of the line, and notes about what was taken. A flag that nobody knows stays in the rest.

    Raises:
        ConfigError: a value is wrong, or is refused.
    """
    cls = classic_flags()
    values: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    rest: list[str] = []
    findings: list[Finding] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        field = None if name in own else cls.model_fields.get(name)
        if not word.startswith("--") or field is None:
            rest.append(word)
            if name in own:  # its values, which may look like anything but a flag
                while words and not words[0].startswith("--"):
                    rest.append(words.pop(0))
            continue
        kind = kind_of(field)
        texts = [text] if equals else []
        while kind is not bool and not equals and words and not words[0].startswith("--"):
            texts.append(words.pop(0))
            if kind is not list:
                break
        if kind is not bool and not any(text.strip() for text in texts):
            mend = f"Write {flag} {metavar(field)}"
            findings.append(
                Finding("error", "missing-value", "a value is missing", path=flag, suggestion=mend)
            )
            continue
        values[name], spelt[name] = convert(kind, texts), flag
    places: dict[KeyPath, Origin] = {(name,): Origin("flag", detail=flag) for name, flag in spelt.items()}
    checked = check_section(cls, Document("", values, places, places), label="the command line")
    findings += [_about(finding, spelt) for finding in checked.findings]
    findings = unavailable_is_error(findings)
    if has_errors(findings):
        raise ConfigError(findings)
    return rest, findings


def _about(finding: Finding, spelt: dict[str, str]) -> Finding:
    """Say it about a flag rather than about a key."""
    name = next((name for name, flag in spelt.items() if flag == finding.path), "")
    message = finding.message.removeprefix(f'"{name}" ').removeprefix("is ").removeprefix(f'"{name}": ')
    return dataclasses.replace(finding, message=message)


def classic_flag_names(own: Collection[str]) -> list[str]:
    """Return the flags that `take_classic_flags` takes, as they are typed."""
    return [flag_name(name) for name in classic_flags().model_fields if name not in own]
