"""JSON Schema of component sections, from the config classes of what is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mm_core import __version__
from mm_core.config.component import ID_KEYS, WITH_WEIGHTS, IdKeys, WeightKeys
from mm_core.config.generation_job import PIPELINE_KEYS
from mm_core.config.model import COMPONENT_SECTIONS
from mm_core.config.origin import KeyPath
from mm_core.config.parts import NESTED, Part, config_class
from mm_core.config.schema_fields import Marked, Schema, Unmarked
from mm_registry import PluginManager, RegistryError, default_manager
from mm_registry.groups import ALIASES, HOOKS, ROLES
from mm_registry.spec import EntrySpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: What `$comment` of every schema begins with; by it a file is known to be one of ours.
WRITTEN = "Written by `mm schema "
#: Roles whose components have a section.
SECTION_ROLES = (*COMPONENT_SECTIONS, "i2v_processor", "dataset", "pipeline")


@dataclass(frozen=True)
class Component:
    """A usable component: every id that means it, its entry and its config class, if it registers one."""

    role: str
    names: tuple[str, ...]
    spec: EntrySpec
    cls: type[BaseModel] | None


def component_schema(spec: EntrySpec, role: str, *, manager: PluginManager | None = None) -> Schema:
    """Return the schema of one component's section; of a pipeline's, `pipeline_config`.

    Raises:
        RegistryError: its config class cannot be used.
    """
    manager = manager or default_manager()
    group = ROLES[role].name
    names = tuple(name for name in ids_of(role, manager) if manager.resolve(group, name).key == spec.key)
    component = Component(role, names, spec, _config_class(role, spec, manager))
    made = Made([IdKeys], [component], manager)
    return made.finish(
        f"{role}/{spec.id}", f"MM Zoo: {role} {spec.id} ({spec.provider})", made.section(component)
    )


def plain_properties(cls: type[BaseModel]) -> Schema:
    """Return the schema of each field of a class as pydantic has it, without what our markers say."""
    made: Schema = cls.model_json_schema(schema_generator=Unmarked)
    properties: Schema = made.get("properties", {})
    return properties


def components(role: str, manager: PluginManager) -> tuple[Component, ...]:
    """Return the components of a role that can be used, by id. A config class that cannot be loaded leaves its
    component out, as `mm check` refuses it.
    """
    group = ROLES[role].name
    named: dict[Any, tuple[EntrySpec, list[str]]] = {}
    for name in ids_of(role, manager):
        spec = manager.resolve(group, name)
        named.setdefault(spec.key, (spec, []))[1].append(name)
    found = []
    for spec, names in named.values():
        try:
            cls = _config_class(role, spec, manager)
        except RegistryError:
            continue
        found.append(Component(role, tuple(names), spec, cls))
    return (*found, *_announced(role, manager))


def _announced(role: str, manager: PluginManager) -> Iterator[Component]:
    """Components that only have a config class yet: their sections can be checked."""
    known = set(manager.ids(ROLES[role].name))
    for spec in manager.specs("mm_core.configs"):
        kind, _, name = spec.id.partition("/")
        if kind == role and name not in known:
            named = spec._replace(id=name)
            try:
                yield Component(role, (name,), named, _config_class(role, named, manager))
            except RegistryError:
                continue


def _config_class(role: str, spec: EntrySpec, manager: PluginManager) -> type[BaseModel] | None:
    return config_class(Part(role, role, (), (), spec.id, spec), manager)


def ids_of(role: str, manager: PluginManager) -> list[str]:
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


class Made:
    """The definitions of one schema, as they are put together."""

    def __init__(
        self, tops: Iterable[type[BaseModel]], found: Iterable[Component], manager: PluginManager
    ) -> None:
        self.found = tuple(found)
        self._hooks = {spec.key[2] for spec in manager.specs(HOOKS)}
        self._templates = ids_of("chat_template", manager)
        classes: set[type[BaseModel]] = {*tops, IdKeys, WeightKeys}
        classes |= {component.cls for component in self.found if component.cls is not None}
        inputs: Any = [
            (cls, "validation")
            for cls in sorted(classes, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
        ]
        refs, generated = models_json_schema(inputs, schema_generator=Marked)
        self.defs: Schema = generated.get("$defs", {})
        self._refs = {cls: _target(ref["$ref"]) for (cls, _), ref in refs.items()}
        taken: set[str] = set()
        self._names: dict[int, str] = {}
        for component in self.found:
            plain = re.sub(r"[^\w.-]", "_", f"{component.role}.{component.spec.id}")
            name = plain if plain not in taken else f"{plain}.{component.spec.distribution}"
            taken.add(name)
            self._names[id(component)] = name
        for component in self.found:  # a section may refer to others
            self.defs[self.name(component)] = self.section(component)

    def name(self, component: Component) -> str:
        """The name of a component's definition."""
        return self._names[id(component)]

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
            if template := getattr(cls, "chat_template_key", None):
                self._choose_template(own, template)
            for key, inner, _ in NESTED.get(role, ()):
                if key in own["properties"] and any(item.role == inner for item in self.found):
                    refer(own["properties"], key, {"anyOf": [{"$ref": f"#/$defs/{inner}"}, {"type": "null"}]})
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

    def _choose_template(self, section: Schema, key: KeyPath) -> None:
        """Write the ids of chat templates into a dataset's section, where its class says that one stands."""
        for name in key[:-1]:
            section = self.defs[_target(section["properties"][name]["$ref"])]
        enumerate_values(section["properties"][key[-1]], self._templates)

    def choice(self, role: str) -> Schema:
        """A section whose id tells which component's schema it follows."""
        key = _id_key(role)
        own = [component for component in self.found if component.role == role]
        names = [name for component in own for name in component.names]
        value: Schema = {"type": "string", "description": "Id of the component; `mm list` shows all."}
        enumerate_values(value, sorted(names, key=lambda name: "/" in name))
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


def _id_key(role: str) -> str:
    return ID_KEYS.get(role, "model_id")


def _says(key: str, component: Component) -> Schema:
    return {"properties": {key: {"enum": list(component.names)}}, "required": [key]}


def enumerate_values(schema: Schema, names: list[str]) -> None:
    if names:  # an empty enumeration is no valid schema
        schema["enum"] = names


def refer(properties: Schema, name: str, schema: Schema) -> None:
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
