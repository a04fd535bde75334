"""Telling the kinds of configuration files apart by their keys."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from pydantic import BaseModel

from mm_core.config.data import DataConfig
from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.inference import InferenceConfig
from mm_core.config.model import ModelConfig
from mm_core.config.tools import ToolsConfig
from mm_core.config.transformers_model import TransformersModelConfig


class Kind(StrEnum):
    MODEL = "model file"
    INFERENCE = "inference file"
    DATA = "data file"
    TOOLS = "tools file"
    FSDP2 = "sharding file"
    COMBINED = "combined job file"
    JOB = "job file"
    TRANSFORMERS = "transformers model file"


#: The class of the top level, for kinds that can be checked.
CLASSES: dict[Kind, type[BaseModel]] = {
    Kind.MODEL: ModelConfig,
    Kind.INFERENCE: InferenceConfig,
    Kind.DATA: DataConfig,
    Kind.TOOLS: ToolsConfig,
    Kind.FSDP2: Fsdp2Config,
    Kind.TRANSFORMERS: TransformersModelConfig,
}


#: Files that hold a whole job; `mm_core.config.job_file` reads them.
JOB_KINDS = (Kind.COMBINED, Kind.JOB)
_JOB_KEYS = {"model", "data", "tools", "fsdp2", "gpt_args", "flags", "lora_args"}


def detect_kind(document: Document) -> Kind | None:
    """Return what a file configures, or None if its keys do not tell."""
    keys = set(document.data)
    if "MM_TOOL_PATH" in keys:
        return Kind.COMBINED
    if "gpt_args" in keys:
        return Kind.JOB
    if keys & {"init_from_hf_path", "text_decoder", "image_encoder"}:
        return Kind.TRANSFORMERS
    if "pipeline_class" in keys:
        return Kind.INFERENCE
    scores = {kind: len(keys & set(cls.model_fields)) for kind, cls in CLASSES.items()}
    best = max(scores.values())
    winners = [kind for kind, score in scores.items() if score == best]
    if len(keys & _JOB_KEYS) > best:
        return Kind.JOB
    if best == 0:
        return None
    # Training and inference files share their sections; only the latter have a tokenizer or a pipeline.
    return winners[0]


def read_kind(path: str, expected: Kind) -> Document:
    """Read a file that must be of one kind; its `$schema` key, which is for editors, is left out.

    Raises:
        ConfigError: it cannot be read, or its keys are those of another kind.
    """
    return expect_kind(without_schema(read_document(path)), expected)


def expect_kind(document: Document, expected: Kind, section: str = "") -> Document:
    """Return a file, or a section of a job file, that must be of one kind by its keys.

    Raises:
        ConfigError: its keys are those of another kind.
    """
    kind = detect_kind(document)
    if kind is None or kind == expected or (expected is Kind.MODEL and kind is Kind.TRANSFORMERS):
        return document
    mend = _HINTS[expected]
    if kind in JOB_KINDS:
        mend = f"Give it without a flag: mm train {document.path}"
    else:
        own = set(document.data) & set(CLASSES[expected].model_fields)
        if own == set(document.data):
            return document
        if expected is Kind.INFERENCE and kind is Kind.MODEL and len(own) > 3:
            return document  # an inference file without its pipeline_class
    message = f"this is {_one(kind)} by its keys, expected {_one(expected)}"
    if not section:
        raise ConfigError([Finding("error", "wrong-file", message, document.path, suggestion=mend)])
    raise ConfigError(
        [Finding.at(document.origin(()), "error", "wrong-file", f"{section}: {message}", path=section)]
    )


def _one(kind: Kind) -> str:
    return f"an {kind}" if kind is Kind.INFERENCE else f"a {kind}"


_HINTS = {
    Kind.MODEL: "--mm-model takes the file with the sections diffusion, predictor, ae and text_encoder",
    Kind.DATA: "--mm-data takes the file with dataset_param and dataloader_param",
    Kind.TOOLS: "--mm-tool takes the file with profile",
    Kind.FSDP2: "--fsdp2-config-path takes the file with sharding_size and patterns",
    Kind.INFERENCE: "`mm generate` takes a file with pipeline_class",
}


def without_schema(document: Document) -> Document:
    """Return the document without `$schema`, by which editors find a file's description."""
    if "$schema" not in document.data:
        return document
    return replace(document, data={key: value for key, value in document.data.items() if key != "$schema"})
