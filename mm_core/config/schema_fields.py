"""What JSON Schema says about the fields of a config class, our markers included."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mm_core.config.dtypes import SPELLINGS, short_dtype
from mm_core.config.findings import show
from mm_core.config.keys import Legacy, NoEffect, NotYet, Only
from mm_core.config.section import legacy_keys, markers

Schema = dict[str, Any]


class Unmarked(GenerateJsonSchema):
    """pydantic's generator, with our number formats."""

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


class Marked(Unmarked):
    """The generator of schemas for editors, which know our markers too."""

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
    for later in markers(field, NotYet):
        said.append(f"Other values than {_listed(later.values)} are not available yet: {later.reason}.")
    for idle in markers(field, NoEffect):
        if idle.when is None:
            made["deprecated"] = True
            said.append(f"Without effect here: {idle.reason}.")
        else:
            condition = idle.when[1]
            shown = _listed(condition) if isinstance(condition, tuple) else show(condition)
            said.append(f"Without effect with {idle.when[0]} {shown}: {idle.reason}.")
    for old in markers(field, Legacy):
        made["deprecated"] = True
        said.append(f'An old spelling of "{old.new}".')
    if said:
        made["description"] = " ".join(said)
    return made


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(show(value) for value in values)


def _accepted(only: Only, made: Schema) -> list[Any]:
    """The values of a marker; number formats by any of their names."""
    branches = made.get("anyOf", [made])
    if any(branch.get("enum") == list(SPELLINGS) for branch in branches):
        names = [name for name in SPELLINGS if only.accepts(short_dtype(name))]
        return [*names, *([None] if only.accepts(None) else [])]
    return [list(value) if isinstance(value, tuple) else value for value in only.values]
