"""The section of a component: strict, plain, and read without torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mm_core.testing.case import Case
from mm_core.testing.check import CheckFailed, CheckSkipped, check, require

_STRANGER = "mm_conformance_unknown_key"
_NETWORK = "transformers_model"
_WITH_SECTION = ("predictor", "ae", "text_encoder", "diffusion", "i2v_processor", "dataset", "pipeline")


@check(
    "a section of its own example, or of defaults, is accepted",
    stage="light",
    roles=(*_WITH_SECTION, _NETWORK),
)
def section_is_accepted(case: Case) -> None:
    """Read as `mm train` reads it, hooks included. Without an example, a component must do with its defaults."""
    _ = case.component


@check("a key that it does not have is refused by name", stage="light", roles=(*_WITH_SECTION, _NETWORK))
def config_refuses_unknown_keys(case: Case) -> None:
    """A misspelt key that is passed over would train another model than the one that was meant."""
    section = case.section
    _, findings = case.read({**section, _STRANGER: 1})
    if case.config_spec is None and any(f.code in ("unchecked-key", "unchecked-section") for f in findings):
        raise CheckSkipped("it has no config class, and its constructor does not tell which keys it takes")
    said = [finding for finding in findings if finding.level == "error" and _STRANGER in finding.text]
    require(
        said,
        f"the key {_STRANGER!r} is accepted; derive the config class from mm_core.config.section.SectionModel",
    )


@check("a value of another type is refused by name", stage="light", roles=_WITH_SECTION)
def config_refuses_wrong_types(case: Case) -> None:
    """A number or a switch written as a text, a switch for a number, a number for a switch."""
    values = dict(case.component.fields)
    if case.config_spec is None:  # the section is as written then; the constructor knows the rest
        values = {**_constructor_defaults(case), **values}
    fields = {key: value for key, value in values.items() if isinstance(value, bool | int | float)}
    places = _properties(case)
    section, tried = case.section, 0
    for key, value in fields.items():
        for wrong in _wrong_values(value):
            if places is not None and _allows(places.get(key, {}), wrong):
                continue
            _, findings = case.read({**section, key: wrong})
            if any(f.level == "error" and (f.path.endswith(key) or f'"{key}"' in f.text) for f in findings):
                tried += 1
            elif places is not None:
                raise CheckFailed(
                    f"{key}: {wrong!r} is accepted where {value!r} stands; "
                    "derive the config class from mm_core.config.section.SectionModel, which is strict"
                )
    if not tried:
        raise CheckSkipped(
            "it has no field of a plain type" if places is not None else "its arguments tell no types"
        )


@check("the defaults of its config class pass its own checks", stage="light", roles=_WITH_SECTION)
def config_defaults_validate(case: Case) -> None:
    """Pydantic does not look at a default; a user who writes it out must not be refused."""
    from pydantic import ValidationError
    from pydantic_core import PydanticUndefined

    from mm_core.config.keys import Legacy
    from mm_core.config.section import markers

    config, cls = case.component.config, case.config_class
    if config is None or cls is None:
        raise CheckSkipped("it has no config class")
    written = {name: getattr(config, name) for name in config.model_fields_set}
    defaults: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name not in written and not markers(field, Legacy):
            factory: Any = field.default_factory
            plain = factory is not None and not field.default_factory_takes_validated_data
            default = factory() if plain else field.default
            if default is not PydanticUndefined:
                defaults[name] = default
    try:
        cls.model_validate({**defaults, **written})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or str(first.get("ctx", {}).get("key", "the whole"))
        raise CheckFailed(f"the default of {where} is refused: {first['msg']}") from error


@check("a JSON schema can be made of its config class", stage="light", roles=(*_WITH_SECTION, _NETWORK))
def config_has_a_schema(case: Case) -> None:
    """Editors complete and check files by it."""
    cls = case.config_class
    if cls is None:
        raise CheckSkipped("it has no config class")
    try:
        json.dumps(cls.model_json_schema())
    except Exception as error:
        raise CheckFailed(f"{cls.__name__} has no JSON schema: {type(error).__name__}: {error}") from error


@check(
    "its fields are plain data and mean the same when they are read again", stage="light", roles=_WITH_SECTION
)
def fields_are_plain_data(case: Case) -> None:
    """Runs and checkpoints keep the section as JSON; a resumed run reads it from there."""
    component = case.component
    try:
        text = json.dumps(dict(component.fields), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"the fields cannot be written as JSON: {error}") from error
    own = {key: value for key, value in case.section.items() if key not in component.fields}
    again, findings = case.read({**own, **json.loads(text)})
    errors = [finding.text for finding in findings if finding.level == "error"]
    require(
        again is not None and not errors, f"written out in full, its section is refused: {'; '.join(errors)}"
    )
    assert again is not None
    differing = [
        key for key, value in again.fields.items() if _plain(value) != _plain(component.fields.get(key))
    ]
    require(not differing, f"written out in full, its section means another {', '.join(differing)}")


@check(
    "its sharding policy is one, and its patterns can be read", stage="light", roles=("predictor", _NETWORK)
)
def policy_is_one(case: Case) -> None:
    """A `ShardingPolicy`, or a function of the section's fields that returns one."""
    from mm_core.config.patterns import syntax_problem
    from mm_core.sharding.policy import ShardingPolicy

    if case.policy_spec is None:
        raise CheckSkipped("it has no sharding policy; blocks are found by structure")
    policy: Any = case.manager.load(case.policy_spec)
    if callable(policy):
        policy = policy(case.component.fields)
    require(
        isinstance(policy, ShardingPolicy), f"the policy is a {type(policy).__name__}, not a ShardingPolicy"
    )
    fields = (
        "units", "recompute", "ignored", "keep_gathered", "offload_activations", "experts", "aligned"
    )  # fmt: skip
    listed = {name: getattr(policy, name) for name in fields}
    for name, patterns in {**listed, "aliases": (*policy.aliases, *policy.aliases.values())}.items():
        require(
            isinstance(patterns, tuple), f"{name} of the policy is a {type(patterns).__name__}, not a tuple"
        )
        for pattern in patterns:
            problem = syntax_problem(pattern)
            require(problem is None, f"the pattern {pattern!r} in {name} of the policy: {problem}")


@check("its weights adapter is one", stage="light", roles=("predictor",))
def weights_adapter_is_one(case: Case) -> None:
    """An instance, or a function of the section's fields that returns one, with the methods of `StateDictAdapter`."""
    from mm_core.weights.adapter import find_adapter

    if case.weights_spec is None:
        raise CheckSkipped("it has no weights adapter; a folder's keys are the module's own")
    require(find_adapter(case.component, manager=case.manager) is not None, "it is not found")


def _wrong_values(value: bool | int | float) -> Iterator[Any]:
    if isinstance(value, bool):
        yield from ("true" if value else "false", int(value))
    else:
        yield from (str(value), True)


def _constructor_defaults(case: Case) -> dict[str, Any]:
    try:
        parameters = inspect.signature(case.target).parameters
    except (TypeError, ValueError):
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}


def _properties(case: Case) -> Mapping[str, Any] | None:
    """The JSON schema of each field; None without a config class."""
    cls = case.config_class
    if cls is None:
        return None
    schema = cls.model_json_schema()
    definitions = schema.get("$defs", {})
    found: dict[str, Any] = {}
    for name, field in schema.get("properties", {}).items():
        reference = field.get("$ref", "").rpartition("/")[2]
        found[name] = definitions.get(reference, field)
    return found


def _allows(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a field's schema admits the type of a value."""
    options = [schema, *schema.get("anyOf", ())]
    kinds = {option["type"] for option in options if isinstance(option.get("type"), str)}
    chosen = [item for option in options for item in (*option.get("enum", ()), option.get("const"))]
    if not kinds and not any("enum" in option or "const" in option for option in options):
        return True  # anything goes
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, str):
        return "string" in kinds and (value in chosen or not any("enum" in option for option in options))
    return bool(kinds & {"integer", "number"})


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
