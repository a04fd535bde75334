"""JSON Schema (draft 2020-12) of files, from the classes that check them.

Editors complete and check with it while one types. It knows the components that are installed where it is made. What
compares several keys, files or paths is `mm check`'s alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel

from mm_core.config.flags import TrainFlags
from mm_core.config.job_file import KEYS, TOOL_PATH
from mm_core.config.kinds import CLASSES, Kind
from mm_core.config.model import COMPONENT_SECTIONS
from mm_core.config.parts import NESTED
from mm_core.config.schema_components import Component, Made, components, enumerate_values, ids_of, refer
from mm_core.config.schema_fields import Schema
from mm_registry import PluginManager, default_manager

#: File kinds by the names that `mm schema` takes.
KINDS: Mapping[str, Kind] = {
    "model": Kind.MODEL,
    "data": Kind.DATA,
    "tools": Kind.TOOLS,
    "fsdp2": Kind.FSDP2,
    "inference": Kind.INFERENCE,
    "transformers": Kind.TRANSFORMERS,
    "job": Kind.JOB,
}
_NESTED = tuple(dict.fromkeys(role for inner in NESTED.values() for _, role, _ in inner))
_ROLES: Mapping[Kind, tuple[str, ...]] = {
    Kind.MODEL: (*COMPONENT_SECTIONS, *_NESTED),
    Kind.INFERENCE: (*COMPONENT_SECTIONS, *_NESTED, "pipeline"),
    Kind.DATA: ("dataset",),
    Kind.TRANSFORMERS: ("transformers_model",),
    Kind.JOB: (*COMPONENT_SECTIONS, *_NESTED, "dataset", "transformers_model"),
}
_FLAGS = ("gpt_args", "flags", "lora_args")
_FOR_EDITORS = {"$schema": {"type": "string", "description": "For editors: the place of this schema."}}


def file_schema(name: str, *, manager: PluginManager | None = None) -> Schema:
    """Return the schema of a kind of file: `model`, `data`, `tools`, `fsdp2`, `inference`, `transformers` or `job`. The
    config classes of installed components are imported, nothing else of theirs.
    """
    manager = manager or default_manager()
    kind = KINDS[name]
    roles = _ROLES.get(kind, ())
    found = [component for role in roles for component in components(role, manager)]
    classes: list[type[BaseModel]] = [*CLASSES.values(), TrainFlags] if kind is Kind.JOB else [CLASSES[kind]]
    made = Made(classes, found, manager)
    for role in roles:
        if role not in ("pipeline", "transformers_model"):
            made.defs[role] = made.choice(role)
    top = _job(made, manager) if kind is Kind.JOB else _TOPS.get(kind, _plain)(made, kind, manager)
    wholes = ["job.diffusion", "job.data", "job.tools", "job.fsdp2"] if kind is Kind.JOB else []
    for section in [top, *(made.defs[name] for name in (*_families(made), *wholes))]:
        section["properties"] = {**section["properties"], **_FOR_EDITORS}
    return made.finish(name, f"MM Zoo: {kind}", top)


def _plain(made: Made, kind: Kind, manager: PluginManager) -> Schema:
    return made.of(CLASSES[kind])


def _model(made: Made, kind: Kind, manager: PluginManager) -> Schema:
    top = made.of(CLASSES[kind])
    properties = top["properties"]
    for role in COMPONENT_SECTIONS:
        section: Schema = {"$ref": f"#/$defs/{role}"}
        listed = {"type": "array", "minItems": 1, "items": section}
        refer(properties, role, {"anyOf": [section, listed]} if role == "text_encoder" else section)
    if kind in (Kind.MODEL, Kind.INFERENCE):
        second = [{"type": "string"}, {"$ref": "#/$defs/predictor"}, {"type": "null"}]
        refer(properties, "low_noise_predictor", {"anyOf": second})
    if kind is Kind.MODEL:
        enumerate_values(properties["task_id"], ids_of("task", manager))
        enumerate_values(properties["callbacks"]["items"], ids_of("callback", manager))
    return top


def _inference(made: Made, kind: Kind, manager: PluginManager) -> Schema:
    top = _model(made, kind, manager)
    enumerate_values(top["properties"]["pipeline_class"], ids_of("pipeline", manager))
    top["allOf"] = [*top.get("allOf", []), *made.pipelines()]
    return top


def _data(made: Made, kind: Kind, manager: PluginManager) -> Schema:
    top = made.of(CLASSES[kind])
    refer(top["properties"], "dataset_param", {"$ref": "#/$defs/dataset"})
    return top


def _transformers(made: Made, kind: Kind, manager: PluginManager) -> Schema:
    """The whole file is the component's section: each family has the core's keys and its own."""
    core = made.of(CLASSES[Kind.TRANSFORMERS])
    for name, component in _families(made).items():
        own: Schema = {"type": "object", "properties": {}}
        if component.cls is not None:
            own = made.of(component.cls)
        # Without a config class any other key passes.
        model_id = {**core["properties"]["model_id"], "enum": list(component.names)}
        own["properties"] = {**core["properties"], "model_id": model_id, **own["properties"]}
        own["required"] = list(dict.fromkeys([*core.get("required", []), *own.get("required", [])]))
        made.defs[name] = own
    choice = made.choice("transformers_model")
    return {**choice, "description": core.get("description", "")}


def _families(made: Made) -> dict[str, Component]:
    return {made.name(item): item for item in made.found if item.role == "transformers_model"}


_TOPS: Mapping[Kind, Callable[[Made, Kind, PluginManager], Schema]] = {
    Kind.MODEL: _model,
    Kind.INFERENCE: _inference,
    Kind.DATA: _data,
    Kind.TRANSFORMERS: _transformers,
}


def _job(made: Made, manager: PluginManager) -> Schema:
    """Each section of a job file is what a file of its own has, or the path of one."""
    defs = made.defs
    diffusion = _model(made, Kind.MODEL, manager)
    family = _transformers(made, Kind.TRANSFORMERS, manager)
    told = {"anyOf": [{"required": ["model_id"]}, {"required": ["init_from_hf_path"]}]}
    defs["job.diffusion"] = diffusion
    defs["job.model"] = {"if": told, "then": family, "else": {"$ref": "#/$defs/job.diffusion"}}
    defs["job.data"] = _data(made, Kind.DATA, manager)
    defs["job.tools"], defs["job.fsdp2"] = made.of(CLASSES[Kind.TOOLS]), made.of(CLASSES[Kind.FSDP2])
    flags = made.of(TrainFlags)
    flags["description"] = "Flags of `mm train`, with _ for -."
    flags.pop("required", None)
    defs["job.flags"] = flags
    path = {"type": "string", "minLength": 1, "description": "Path of a file."}
    sections = {"model": Kind.MODEL, "data": Kind.DATA, "tools": Kind.TOOLS, "fsdp2": Kind.FSDP2}
    properties: Schema = {
        key: {"description": f"The {kind}, or its path.", "anyOf": [{"$ref": f"#/$defs/job.{key}"}, path]}
        for key, kind in sections.items()
    }
    properties |= {key: {"$ref": "#/$defs/job.flags"} for key in _FLAGS}
    properties["plugins"] = diffusion["properties"]["plugins"]
    properties[TOOL_PATH] = {
        **path,
        "description": "Path of the tools file, in MindSpeed-MM's combined YAML.",
    }
    assert set(KEYS) == set(properties)
    holder = {"type": ["string", "number", "boolean", "null"], "description": "A value for aliases."}
    return {
        "type": "object",
        "description": "A whole training job in one file.",
        "properties": properties,
        "patternProperties": {"^[A-Z][A-Z0-9_]*$": holder},
        "additionalProperties": False,
    }
