"""JSON Schema (draft 2020-12) of files and of component sections, from the classes that check them.

Editors complete and check with it while one types. It knows the components that are installed where it is made. What
compares several keys, files or paths is `mm check`'s alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from mm_core import __version__
from mm_core.config.component import WITH_WEIGHTS, IdKeys, WeightKeys
from mm_core.config.dtypes import SPELLINGS, short_dtype
from mm_core.config.findings import show
from mm_core.config.generation_job import PIPELINE_KEYS
from mm_core.config.keys import Legacy, NoEffect, Only
from mm_core.config.kinds import CLASSES, Kind
from mm_core.config.model import COMPONENT_SECTIONS
from mm_core.config.parts import Part, config_class
from mm_core.config.section import legacy_keys, markers
from mm_registry import PluginManager, RegistryError, default_manager
from mm_registry.groups import ALIASES, HOOKS, ROLES
from mm_registry.spec import EntrySpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: What `$comment` of every schema begins with; by it a file is known to be one of ours.
WRITTEN = "Written by `mm schema "
#: File kinds by the names that `mm schema` takes.
KINDS: Mapping[str, Kind] = {
    "model": Kind.MODEL,
    "data": Kind.DATA,
    "tools": Kind.TOOLS,
    "fsdp2": Kind.FSDP2,
    "inference": Kind.INFERENCE,
}
#: Roles whose components have a section.
SECTION_ROLES = (*COMPONENT_SECTIONS, "dataset", "pipeline")

Schema = dict[str, Any]


@dataclass(frozen=True)
class Component:
    """A usable component: every id that means it, its entry and its config class, if it registers one."""

    role: str
    names: tuple[str, ...]
    spec: EntrySpec
    cls: type[BaseModel] | None


def file_schema(name: str, *, manager: PluginManager | None = None) -> Schema:
    """Return the schema of a kind of file: `model`, `data`, `tools`, `fsdp2` or `inference`. The config classes of
    installed components are imported, nothing else of theirs.
    """
    manager = manager or default_manager()
    kind = KINDS[name]
    roles = {
        Kind.MODEL: COMPONENT_SECTIONS,
        Kind.INFERENCE: (*COMPONENT_SECTIONS, "pipeline"),
        Kind.DATA: ("dataset",),
    }.get(kind, ())
    found = [component for role in roles for component in components(role, manager)]
    made = _Made(CLASSES[kind], found, manager)
    top = made.of(CLASSES[kind])
    properties = top["properties"]
    properties["$schema"] = {"type": "string", "description": "For editors: the place of this schema."}
    for role in roles:
        if role != "pipeline":
            made.defs[role] = made.choice(role)
    if kind is Kind.DATA:
        _refer(properties, "dataset_param", {"$ref": "#/$defs/dataset"})
    if kind in (Kind.MODEL, Kind.INFERENCE):
        for role in COMPONENT_SECTIONS:
            section: Schema = {"$ref": f"#/$defs/{role}"}
            listed = {"type": "array", "minItems": 1, "items": section}
            _refer(properties, role, {"anyOf": [section, listed]} if role == "text_encoder" else section)
    if kind is Kind.MODEL:
        _enumerate(properties["task_id"], _ids("task", manager))
        _enumerate(properties["callbacks"]["items"], _ids("callback", manager))
    if kind is Kind.INFERENCE:
        second = [{"type": "string"}, {"$ref": "#/$defs/predictor"}, {"type": "null"}]
        _refer(properties, "low_noise_predictor", {"anyOf": second})
        _enumerate(properties["pipeline_class"], _ids("pipeline", manager))
        top["allOf"] = [*top.get("allOf", []), *made.pipelines()]
    return made.finish(name, f"MM Zoo: {kind}", top)


def component_schema(spec: EntrySpec, role: str, *, manager: PluginManager | None = None) -> Schema:
    """Return the schema of one component's section; of a pipeline's, `pipeline_config`.

    Raises:
        RegistryError: its config class cannot be used.
    """
    manager = manager or default_manager()
    group = ROLES[role].name
    names = tuple(name for name in _ids(role, manager) if manager.resolve(group, name).key == spec.key)
    component = Component(role, names, spec, _config_class(role, spec, manager))
    made = _Made(IdKeys, [component], manager)
    return made.finish(
        f"{role}/{spec.id}", f"MM Zoo: {role} {spec.id} ({spec.provider})", made.section(component)
    )


def components(role: str, manager: PluginManager) -> tuple[Component, ...]:
    """Return the components of a role that can be used, by id. A config class that cannot be loaded leaves its
    component out, as `mm check` refuses it.
    """
    group = ROLES[role].name
    named: dict[Any, tuple[EntrySpec, list[str]]] = {}
    for name in _ids(role, manager):
        spec = manager.resolve(group, name)
        named.setdefault(spec.key, (spec, []))[1].append(name)
    found = []
    for spec, names in named.values():
        try:
            cls = _config_class(role, spec, manager)
        except RegistryError:
            continue
        found.append(Component(role, tuple(names), spec, cls))
    return tuple(found)


def _config_class(role: str, spec: EntrySpec, manager: PluginManager) -> type[BaseModel] | None:
    return config_class(Part(role, role, (), (), spec.id, spec), manager)


def _ids(role: str, manager: PluginManager) -> list[str]:
    """Every way to write the id of a usable component: plain ids first, then old ones, then `distribution/id`."""
    group = ROLES[role].name
    old = [
        spec.id.removeprefix(f"{role}/") for spec in manager.specs(ALIASES) if spec.id.startswith(f"{role}/")
    ]
    qualified = [spec.qualified_id for spec in manager.specs(group)]
    usable = []
    for name in dict.fromkeys([*manager.ids(group), *old, *qualified]):
        try:
            manager.resolve(group, name)
        except RegistryError:
            continue
        usable.append(name)
    return usable


class _Made:
    """The definitions of one schema, as they are put together."""

    def __init__(self, top: type[BaseModel], found: Iterable[Component], manager: PluginManager) -> None:
        self.found = tuple(found)
        self._hooks = {spec.key[2] for spec in manager.specs(HOOKS)}
        classes: set[type[BaseModel]] = {top, IdKeys, WeightKeys}
        classes |= {component.cls for component in self.found if component.cls is not None}
        inputs: Any = [
            (cls, "validation")
            for cls in sorted(classes, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
        ]
        refs, generated = models_json_schema(inputs, schema_generator=_Generator)
        self.defs: Schema = generated.get("$defs", {})
        self._refs = {cls: _target(ref["$ref"]) for (cls, _), ref in refs.items()}
        taken: set[str] = set()
        self._names: dict[int, str] = {}
        for component in self.found:
            plain = re.sub(r"[^\w.-]", "_", f"{component.role}.{component.spec.id}")
            name = plain if plain not in taken else f"{plain}.{component.spec.distribution}"
            taken.add(name)
            self._names[id(component)] = name
            self.defs[name] = self.section(component)

    def of(self, cls: type[BaseModel]) -> Schema:
        """A copy of the schema of a class, down to its properties."""
        made = dict(self.defs[self._refs[cls]])
        made["properties"] = {key: dict(value) for key, value in made.get("properties", {}).items()}
        return made

    def section(self, component: Component) -> Schema:
        """The core's keys and the component's own, in one object."""
        role, cls = component.role, component.cls
        core = self.of(WeightKeys if role in WITH_WEIGHTS else IdKeys)["properties"]
        description = core.pop("model_id").get("description", "")
        about = f"{ROLES[role].noun} of {component.spec.provider}"
        own: Schema = {
            "type": "object",
            "description": f"A {about}, which has no config class: any key passes here.",
        }
        if cls is not None:
            own = self.of(cls)
            own["description"] = " ".join(filter(None, [own.get("description", ""), f"A {about}."]))
        required = [key for key in own.get("required", ()) if key not in core]
        if role == "pipeline":
            required = [
                key for key in required if key not in PIPELINE_KEYS
            ]  # they may stand at the top level
        if component.spec.key[2] in self._hooks:
            required = []  # a hook may fill them
        properties = {**own.get("properties", {}), **core}
        if role != "pipeline":
            key = _id_key(role)
            names = list(component.names)
            value: Schema = {"const": names[0]} if len(names) == 1 else {"enum": names}
            properties = {key: {**value, "description": description}, **properties}
            required = [key, *(name for name in required if name != key)]
        own["properties"] = properties
        own.pop("required", None)
        return {**own, "required": required} if required else own

    def choice(self, role: str) -> Schema:
        """A section whose id tells which component's schema it follows."""
        key = _id_key(role)
        own = [component for component in self.found if component.role == role]
        names = [name for component in own for name in component.names]
        value: Schema = {"type": "string", "description": "Id of the component; `mm list` shows all."}
        _enumerate(value, sorted(names, key=lambda name: "/" in name))
        return {
            "type": "object",
            "properties": {key: value},
            "required": [key],
            "allOf": [
                {"if": _says(key, component), "then": {"$ref": f"#/$defs/{self._names[id(component)]}"}}
                for component in own
            ],
        }

    def pipelines(self) -> Iterator[Schema]:
        """For each pipeline, what its `pipeline_config` is."""
        for component in self.found:
            if component.role == "pipeline":
                settings = {"$ref": f"#/$defs/{self._names[id(component)]}"}
                then = {"properties": {"pipeline_config": settings}}
                yield {"if": _says("pipeline_class", component), "then": then}

    def finish(self, what: str, title: str, top: Schema) -> Schema:
        """The whole document; definitions that nothing refers to are left out."""
        needed: Schema = {}
        waiting = list(_references(top))
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed[name] = self.defs[name]
                waiting += _references(self.defs[name])
        head = {
            "$schema": DIALECT,
            "$comment": f"{WRITTEN}{what}` of mmzoo-core {__version__}.",
            "title": title,
        }
        return {**head, **top, **({"$defs": dict(sorted(needed.items()))} if needed else {})}


class _Generator(GenerateJsonSchema):
    """pydantic's generator, which does not know our markers."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as pydantic declares it

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # they repeat the key

    def handle_invalid_for_json_schema(
        self, schema: core_schema.CoreSchema, error_info: str
    ) -> JsonSchemaValue:
        return {}  # a plugin's own type: anything, and `mm check` knows better

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        made = super().function_before_schema(schema)
        if schema["function"]["function"] is short_dtype:
            return {**made, "enum": list(SPELLINGS)}
        return made

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        cls = schema["cls"]
        made.pop("title", None)
        if "description" in made:
            made["description"] = " ".join(made["description"].split())
        for name, field in cls.model_fields.items():
            if name in made.get("properties", {}):
                made["properties"][name] = _marked(made["properties"][name], field)
        for old, new in legacy_keys(cls).items():
            if new in made.get("required", ()):
                made["required"] = [key for key in made["required"] if key != new]
                made.setdefault("allOf", []).append({"anyOf": [{"required": [new]}, {"required": [old]}]})
        return made


def _marked(made: Schema, field: Any) -> Schema:
    """What a field's markers say, in the schema's words."""
    made = dict(made)
    said = [made["description"]] if made.get("description") else []
    for only in markers(field, Only):
        values = _accepted(only, made)
        made = {key: value for key, value in made.items() if key in ("default", "description", "deprecated")}
        made["enum"] = values
        shown = " or ".join(show(value) for value in values if value not in (None, []))
        said.append(f"Only {shown}: {only.reason}." if shown else f"Refused: {only.reason}.")
    for idle in markers(field, NoEffect):
        made["deprecated"] = True
        said.append(f"Without effect here: {idle.reason}.")
    for old in markers(field, Legacy):
        made["deprecated"] = True
        said.append(f'An old spelling of "{old.new}".')
    if said:
        made["description"] = " ".join(said)
    return made


def _accepted(only: Only, made: Schema) -> list[Any]:
    """The values of a marker; number formats by any of their names."""
    branches = made.get("anyOf", [made])
    if any(branch.get("enum") == list(SPELLINGS) for branch in branches):
        names = [name for name in SPELLINGS if only.accepts(short_dtype(name))]
        return [*names, *([None] if only.accepts(None) else [])]
    return [list(value) if isinstance(value, tuple) else value for value in only.values]


def _id_key(role: str) -> str:
    return "dataset_type" if role == "dataset" else "model_id"


def _says(key: str, component: Component) -> Schema:
    return {"properties": {key: {"enum": list(component.names)}}, "required": [key]}


def _enumerate(schema: Schema, names: list[str]) -> None:
    if names:  # an empty enumeration is no valid schema
        schema["enum"] = names


def _refer(properties: Schema, name: str, schema: Schema) -> None:
    """Replace what the file's class says about a section, but for its description."""
    kept = {key: properties[name][key] for key in ("description", "default") if key in properties[name]}
    properties[name] = {**kept, **schema}


def _target(reference: str) -> str:
    return reference.removeprefix("#/$defs/")


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                yield _target(value)
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)
