"""Megatron's `TransformerConfig` from a model file: built, and checked by Megatron's own rules.

MindSpeed-MM fills Megatron's arguments from `text_decoder` or `predictor` of model.json in the same way. For a model
that transformers builds, these numbers serve that check alone: its `config.json` describes the model.
"""

from __future__ import annotations

import re
import types
import typing
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, closest
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.megatron.installed import megatron_module

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from mm_core.config.job import TrainingJob

#: As MindSpeed-MM looks for them.
PARTS = ("predictor", "text_decoder")

#: Key of a model file -> field of TransformerConfig. Keys that are called as the field need no line here.
_KEYS = {
    "num_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "ffn_dim": "ffn_hidden_size",
    "eps": "layernorm_epsilon",
    "dropout": "attention_dropout",
    "num_experts": "num_moe_experts",
}
#: Keys that mean a field but do not hold its value.
_DERIVED: dict[str, Any] = {
    "num_layers": int | list[int],
    "qk_norm": bool | str | None,
    "qk_norm_type": str | None,
    "swiglu": bool,
    "n_shared_experts": int | None,
    "seq_length": int,
    "max_position_embeddings": int,
}
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
_POSITIVE = {*_REQUIRED, *_PARALLEL, "kv_channels", "ffn_hidden_size", "num_query_groups", "num_moe_experts"}
#: Flags that always decide, and flags that say what the model file leaves out.
_FLAGS = (*_PARALLEL, "sequence_parallel", "fp16", "bf16", "recompute_granularity", "recompute_method")
_FALLBACK = (
    *_REQUIRED,
    "ffn_hidden_size",
    "normalization",
    "swiglu",
    "seq_length",
    "max_position_embeddings",
)
_NAME = re.compile(r"(?:self\.)?\b([a-z][a-z0-9_]*)\b")


@dataclass
class _Collected:
    """Values by Megatron's names, and how each is written where the user wrote it."""

    section: Origin
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[str, Origin, KeyPath]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def complain(self, message: str) -> None:
        """Add a complaint that uses Megatron's names; it points at the first of them that the user wrote."""
        names = [name for name in _NAME.findall(message) if name in self.places]
        names.sort(key=lambda name: self.places[name][1].kind != "file")  # the file first, then the flags
        _, origin, path = self.places[names[0]] if names else ("", self.section, ())

        def written(match: re.Match[str]) -> str:
            return self.places[match[1]][0] if match[1] in self.places else match[0]

        text = _NAME.sub(written, " ".join(message.split())).rstrip(".")
        self.findings.append(
            Finding.at(origin, "error", "megatron", f"Megatron-Core refuses this model: {text}", path=path)
        )


def transformer_config(
    model: TrainingJob | Document | Mapping[str, Any] | str | Path,
    flags: Any = None,
    *,
    part: str | None = None,
) -> TransformerConfig:
    """Build Megatron's `TransformerConfig` of one part of a model file.

    Parameters are fp32 (`params_dtype`), as ours always are; `bf16` of the flags is the dtype of compute. Dropout is 0
    where nothing is said, and weights are initialised on the CPU where there is no accelerator.

    Args:
        model: a checked job, a model file, its path, or its content.
        flags: parallel sizes, `bf16`, `fp16`, recomputation, and sizes that the file leaves out: `TrainFlags`, the
            arguments that `get_args()` returns, or a mapping by the same names. By default the job's.
        part: dotted path of the section; by default `predictor`, else `text_decoder`.

    Raises:
        ConfigError: what is missing, of a wrong type, or refused by Megatron, each at its key or flag.
        UserError: Megatron-Core is not installed.
    """
    config_class = megatron_module("megatron.core.transformer.transformer_config").TransformerConfig
    document, fields, flags = _source(model, flags, part)
    path = _part(document, part)
    section = fields if fields is not None else document.value(path)
    if not isinstance(section, Mapping):
        raise ConfigError([_at(document, path, f"{dotted(path)} is no object of keys and values")])
    collected = _Collected(document.key_origin(path))
    hints = {name: hint for name, hint in typing.get_type_hints(config_class).items() if _is_plain(hint)}
    _from_flags(collected, flags, _FLAGS, hints)
    _from_section(collected, document, path, section, hints, flags)
    if collected.findings:
        raise ConfigError(collected.findings)
    _derive(collected)
    _check(collected, section)
    if collected.findings:
        raise ConfigError(collected.findings)
    values = {name: value for name, value in collected.values.items() if name in hints}
    try:
        with warnings.catch_warnings():
            # A complaint of Megatron's about a default of its own.
            warnings.filterwarnings("ignore", message="full scope is deprecated")
            config: TransformerConfig = config_class(**values, **_settings(values))
    except (ValueError, AssertionError, TypeError) as error:
        collected.complain(str(error))
        raise ConfigError(collected.findings) from error
    return config


def _source(model: Any, flags: Any, part: str | None) -> tuple[Document, Mapping[str, Any] | None, Any]:
    """The model file, the section's values with its defaults if a job has them, and the flags."""
    if isinstance(model, Document):
        return model, None, flags
    if isinstance(model, str | Path):
        return read_document(model), None, flags
    if isinstance(model, Mapping):
        return Document.from_data(model), None, flags
    document: Document = model.documents["model"]
    component = model.components.get(part or next((name for name in PARTS if document.has((name,))), ""))
    return document, component.fields if component else None, model.flags if flags is None else flags


def _part(document: Document, part: str | None) -> KeyPath:
    path: KeyPath = tuple(part.split(".")) if part else ()
    if part is None:
        path = next(((name,) for name in PARTS if document.has((name,))), ())
    if not path:
        text = "the model file has neither predictor nor text_decoder, which Megatron's TransformerConfig is made from"
        raise ConfigError([_at(document, (), text)])
    if not document.has(path):
        near = closest(part or "", [name for name in document.data if isinstance(name, str)])
        raise ConfigError(
            [_at(document, (), f'the model file has no "{part}"', f'Did you mean "{near}"?' if near else "")]
        )
    return path


def _at(document: Document, path: KeyPath, text: str, suggestion: str = "") -> Finding:
    return Finding.at(document.key_origin(path), "error", "megatron", text, path=path, suggestion=suggestion)


def _is_plain(hint: Any) -> bool:
    """Whether values of a field can stand in a file: numbers, texts, and lists of them."""
    if hint in (int, float, bool, str, type(None)):
        return True
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    return origin in (typing.Union, types.UnionType, list) and all(
        _is_plain(arg) for arg in typing.get_args(hint)
    )


def _from_flags(collected: _Collected, flags: Any, names: Collection[str], hints: Mapping[str, Any]) -> None:
    data: dict[str, Any] = {}
    origins: dict[KeyPath, Origin] = {}
    for name in names:
        value = _flag(flags, name)
        if value is None or (name == "virtual_pipeline_model_parallel_size" and value == 1):
            continue  # Megatron's None: no interleaving
        origin = flags.origin(name) if hasattr(flags, "origin") else Origin("flag")
        spelling = "--" + name.replace("_", "-")
        if origin.kind == "flag" and not origin.detail:
            origin = Origin("flag", detail=spelling)
        data[name] = value
        origins[name,] = origin
        collected.places[name] = (spelling, origin, (name,))
    kinds = {name: _kind(name, _DERIVED.get(name) or hints[name], data[name]) for name in data}
    _take(collected, Document("", data, origins), (), data, kinds)


def _flag(flags: Any, name: str) -> Any:
    return flags.get(name) if isinstance(flags, Mapping) else getattr(flags, name, None)


def _from_section(
    collected: _Collected,
    document: Document,
    path: KeyPath,
    section: Mapping[str, Any],
    hints: Mapping[str, Any],
    flags: Any,
) -> None:
    """Take what the section says, checked against the types of Megatron's own fields; flags fill the gaps."""
    kinds: dict[str, Any] = {}
    for key in section:
        name = _KEYS.get(key, key)
        if key in _DERIVED:
            kinds[key] = _kind("", _DERIVED[key], section[key])
        elif name in hints and name not in _FLAGS and name != "use_cpu_initialization":
            kinds[key] = _kind(name, hints[name], section[key])
    named = {_KEYS.get(key, key) for key in kinds}
    _from_flags(collected, flags, [name for name in _FALLBACK if name not in named], hints)
    if {"kv_channels", "num_attention_heads"} <= named:
        named.add("hidden_size")  # their product
    for name in _REQUIRED:
        if name not in named and name not in collected.values:
            key = "num_heads" if name == "num_attention_heads" and path[-1:] == ("predictor",) else name
            kinds[key] = (int, ...)
    _take(collected, document, path, section, kinds)


def _kind(name: str, hint: Any, value: Any) -> Any:
    """A field's type for pydantic, with the smallest value of a size."""
    from pydantic import Field

    return (Annotated[int, Field(ge=1)] if name in _POSITIVE and value is not None else hint, ...)


def _take(
    collected: _Collected,
    document: Document,
    path: KeyPath,
    section: Mapping[str, Any],
    kinds: Mapping[str, Any],
) -> None:
    """Check the keys of `kinds` and collect their values; what is wrong becomes findings."""
    from pydantic import create_model

    from mm_core.config.section import SectionModel, check_section

    data = {key: section[key] for key in kinds if key in section}
    sizes = create_model("MegatronSizes", __base__=SectionModel, **kinds)
    collected.findings += check_section(sizes, document, path, data=data).findings
    for key, value in data.items():
        name = _KEYS.get(key, key)
        collected.values[name] = value
        collected.places.setdefault(name, (f'"{key}"', document.origin((*path, key)), (*path, key)))


def _derive(collected: _Collected) -> None:
    values, places = collected.values, collected.places
    if isinstance(values["num_layers"], list):  # layers by stage, or by kind of block
        values["num_layers"] = sum(values["num_layers"])
    if "hidden_size" not in values:
        values["hidden_size"] = values["num_attention_heads"] * values["kv_channels"]
        places["hidden_size"] = ("hidden_size", *places["kv_channels"][1:])
    if values.get("qk_norm"):
        values["qk_layernorm"] = True
    if values.get("qk_norm_type") == "rmsnorm":
        values["normalization"] = "RMSNorm"
    if values.get("swiglu"):
        values["gated_linear_unit"] = True
    shared, width = (
        values.get("n_shared_experts"),
        values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size"),
    )
    if shared and width:
        values.setdefault("moe_shared_expert_intermediate_size", shared * width)
    values.setdefault("attention_dropout", 0.0)
    values.setdefault("hidden_dropout", 0.0)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What no file says, or not in Megatron's terms."""
    import torch

    from mm_core.accelerator import Accelerator

    settings: dict[str, Any] = {
        "params_dtype": torch.float32,
        # What one pipeline stage sends to the next.
        "pipeline_dtype": torch.bfloat16 if values.get("bf16") else torch.float32,
        "use_cpu_initialization": Accelerator.current().type == "cpu",
    }
    if values.get("gated_linear_unit"):
        settings["activation_func"] = torch.nn.functional.silu
    return settings


def _check(collected: _Collected, section: Mapping[str, Any]) -> None:
    """The rules of Megatron's training package and of its layers; `TransformerConfig` has the others itself."""
    values = collected.values

    def multiple(name: str, of: str) -> None:
        number, base = values.get(name), values.get(of)
        if number and base and number % base:
            collected.complain(f"{name} ({number}) must be a multiple of {of} ({base})")

    if values.get("fp16") and values.get("bf16"):
        collected.complain("fp16 and bf16 are both given, and exclude each other")
    if values.get("sequence_parallel") and values.get("tensor_model_parallel_size", 1) < 2:
        collected.complain("sequence_parallel needs tensor_model_parallel_size of 2 or more")
    if values.get("expert_model_parallel_size", 1) > 1 and not values.get("num_moe_experts"):
        collected.complain(
            "expert_model_parallel_size is given, but the section has no num_moe_experts to spread"
        )
    if values["num_layers"] < 1:
        collected.complain(f"num_layers is {values['num_layers']}, and a model has at least one")
    if "kv_channels" not in values:
        multiple("hidden_size", "num_attention_heads")
    multiple("num_attention_heads", "num_query_groups")
    multiple("num_moe_experts", "expert_model_parallel_size")
    if not section.get("pipeline_num_layers"):
        multiple("num_layers", "pipeline_model_parallel_size")
    experts, chosen = values.get("num_moe_experts"), values.get("moe_router_topk")
    if experts and chosen and chosen > experts:
        collected.complain(f"moe_router_topk ({chosen}) must be at most num_moe_experts ({experts})")
    stages, pieces = (
        values.get("pipeline_model_parallel_size", 1),
        values.get("virtual_pipeline_model_parallel_size"),
    )
    if pieces and stages < 2:
        collected.complain(
            f"virtual_pipeline_model_parallel_size ({pieces}) needs pipeline_model_parallel_size of 2 or more"
        )
    length, longest = values.get("seq_length"), values.get("max_position_embeddings")
    if length and longest and length > longest:
        collected.complain(f"seq_length ({length}) must be at most max_position_embeddings ({longest})")
