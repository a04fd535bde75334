"""The configuration reference as Markdown, from the classes that check configurations:
`python -m mm_core.config.reference docs/configuration-reference.md` writes it.
"""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mm_core.config.component import IdKeys, WeightKeys
from mm_core.config.dtypes import SPELLINGS
from mm_core.config.findings import show
from mm_core.config.flag_table import GROUPS, AcceptedFlags, RefusedFlags
from mm_core.config.flags import flag_name
from mm_core.config.keys import Legacy, NoEffect, NotYet, Only
from mm_core.config.kinds import CLASSES
from mm_core.config.schema_components import plain_properties
from mm_core.config.section import markers, nested_sections
from mm_registry import PluginManager, default_manager
from mm_registry.groups import ROLES

#: Whose components the page of this repository describes.
OURS = ("mmzoo-core", "mmzoo-plugin-wan22", "mmzoo-plugin-qwen3vl")
_HEAD = """\
# Configuration reference

Every key, flag and environment variable, written by `python -m mm_core.config.reference` from the classes that
`mm check` uses; a test compares. [Configuration](configuration.md) explains how files, flags and plugins fit together.
`mm schema` has the same for editors.

Under *meaning*, **without effect** is accepted and does nothing here (a note); an **old spelling** works (a warning);
**refused** is an error, because it would change what is trained; **not yet** is right, and cannot be run by this
version (a warning for a file by itself, an error in a job). Values in parentheses ask for nothing, and are quiet.
Number formats are `bf16`, `fp16`, `fp32`, `fp64` or torch's names.
"""


def reference(distributions: Iterable[str] = OURS, *, manager: PluginManager | None = None) -> str:
    """Return the page, with the components of some installed distributions."""
    manager = manager or default_manager()
    parts, told = [_HEAD], _Told()
    for kind, cls in CLASSES.items():
        title = f"{str(kind)[0].upper()}{str(kind)[1:]}"
        parts += [f"## {title}\n", *_tables(cls, told, f"*{title}*", "###")]
    parts += ["## Components\n", "Keys of every component's section:\n", _table(IdKeys), ""]
    parts += ["Keys of a component with weights (predictor, ae, text_encoder):\n", _table(WeightKeys), ""]
    for distribution in distributions:
        classes = _config_classes(distribution, manager)
        if classes:
            parts.append(f"## Components of {distribution}\n")
        for cls, names in classes.items():
            title = f"{names[0][0]}: {', '.join(f'`{id}`' for _, id in names)}"
            parts += [f"### {title}\n", *_tables(cls, told, f"*{title}*", "####")]
    parts += [*_flags(), *_environment()]
    return "\n".join(parts).rstrip() + "\n"


def _config_classes(
    distribution: str, manager: PluginManager
) -> dict[type[BaseModel], list[tuple[str, str]]]:
    """Each config class of a distribution with the (noun, id) that it describes, by role and id."""
    found: dict[type[BaseModel], list[tuple[str, str]]] = {}
    specs = [spec for spec in manager.specs("mm_core.configs") if spec.distribution == distribution]
    order = list(ROLES)
    for spec in sorted(specs, key=lambda spec: (order.index(spec.id.partition("/")[0]), spec.id)):
        role, _, id = spec.id.partition("/")
        cls: Any = manager.load(spec)
        found.setdefault(cls, []).append((ROLES[role].noun, id))
    return found


class _Told(dict[type[BaseModel], str]):
    """Config classes that the page has described, with the heading under which they stand."""


def _tables(cls: type[BaseModel], told: _Told, where: str, level: str, path: str = "") -> Iterator[str]:
    """The table of a class and those of the sections inside it; each class is described once on the page."""
    told[cls] = where
    if cls.__doc__:
        yield " ".join(cls.__doc__.split()) + "\n"
    yield _table(cls) + "\n"
    again: dict[str, str] = {}
    for name, field in cls.model_fields.items():
        for nested in dict.fromkeys(nested_sections(field.annotation)):
            inner = f"{path}.{name}" if path else name
            if nested in told:
                if nested is not cls:
                    again[inner] = told[nested]
                continue
            which = f"`{inner}`{_which(nested)}"
            yield f"{level} {which}\n"
            root = where.partition(", ")[0]
            yield from _tables(nested, told, f"{root}, {which}", level, inner)
    for inner, place in again.items():
        yield f"`{inner}`: as under {place}.\n"


def _which(cls: type[BaseModel]) -> str:
    """What tells a section from others at the same place: `trans_type` "ResizeVideo"."""
    for name, field in cls.model_fields.items():
        values = typing.get_args(field.annotation)
        if typing.get_origin(field.annotation) is typing.Literal and field.is_required() and len(values) == 1:
            return f" with `{name}` `{show(values[0])}`"
    return ""


def _table(cls: type[BaseModel], name_of: Any = str) -> str:
    properties = plain_properties(cls)
    fields = sorted(cls.model_fields.items(), key=lambda item: _rank(item[1]))
    rows = [
        f"| `{name_of(name)}` | {_value(properties.get(name, {}), field)} | {_default(field)} | {_meaning(field)} |"
        for name, field in fields
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def _rank(field: FieldInfo) -> int:
    """Effective keys first, then what does less and less."""
    for rank, kind in enumerate((NotYet, NoEffect, Legacy, Only), 1):
        if markers(field, kind):
            return rank
    return 0


def _default(field: FieldInfo) -> str:
    if field.is_required() or (field.description or "").endswith("; required"):
        return "required"
    if "default:" in (field.description or ""):  # the meaning tells it
        return "–"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        return "`{}`"
    return f"`{show(list(value) if isinstance(value, tuple) else value)}`"


def _meaning(field: FieldInfo) -> str:
    said = [_sentence(field.description.removesuffix("; required"))] if field.description else []
    for only in markers(field, Only):
        said.append(f"**Refused** but {_accepted(only.values)}: {_sentence(only.reason, upper=False)}")
    for later in markers(field, NotYet):
        said.append(f"**Not yet** but {_accepted(later.values)}: {_sentence(later.reason, upper=False)}")
    for idle in markers(field, NoEffect):
        quiet = f" ({', '.join(f'`{show(value)}`' for value in idle.quiet_for)})" if idle.quiet_for else ""
        said.append(f"**Without effect**{quiet}: {_sentence(idle.reason, upper=False)}")
    said += [f"**Old spelling** of `{old.new}`." for old in markers(field, Legacy)]
    return _cell(" ".join(said))


def _accepted(values: Iterable[Any]) -> str:
    return " or ".join(f"`{show(value)}`" for value in values)


def _sentence(text: str, *, upper: bool = True) -> str:
    text = " ".join(text.split())
    word = text.partition(" ")[0].rstrip(":,").replace("-", "")
    text = text[:1].upper() + text[1:] if upper and word.isalpha() else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{*}", "`{*}`").replace("``", "`")


# -- values


def _value(schema: Mapping[str, Any], field: FieldInfo) -> str:
    return _cell(_words(schema)) or "anything"


def _words(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema allows, in a few words."""
    if "enum" in schema:
        values = schema["enum"]
        if values == list(SPELLINGS):
            return "number format"
        return ", ".join(f"`{show(value)}`" for value in values if value is not None)
    if "const" in schema:
        return f"`{show(schema['const'])}`"
    if "$ref" in schema or "allOf" in schema:
        return "object"
    if "anyOf" in schema or "oneOf" in schema:
        branches = schema.get("anyOf") or schema.get("oneOf") or []
        return " or ".join(dict.fromkeys(word for branch in branches if (word := _words(branch))))
    match schema.get("type"):
        case "integer":
            return f"whole number{_range(schema)}"
        case "number":
            return f"number{_range(schema)}"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
        case "object":
            return "object"
        case "array":
            return _list(schema)
    return ""


def _list(schema: Mapping[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items:
        return f"{len(items)} × {_words(items[0])}"
    inner = _words(schema.get("items", {}))
    return f"list of {inner}" if inner else "list"


def _range(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    limits = [
        *([f"≥ {low}"] if low is not None else []), *([f"> {above}"] if above is not None else []),
        *([f"≤ {high}"] if high is not None else []), *([f"< {below}"] if below is not None else []),
    ]  # fmt: skip
    if schema.get("multipleOf"):
        limits.append(f"multiple of {schema['multipleOf']}")
    return f" {', '.join(limits)}" if limits else ""


# -- flags and environment


def _flags() -> Iterator[str]:
    yield "## Flags of mm train\n"
    yield "Underscores are accepted for hyphens, and `--flag=value`. `gpt_args` and `lora_args` of a job file hold the same."
    yield "`mm generate --help` has those of generation, which accepts these as well.\n"
    for group in GROUPS:
        title = " ".join((group.__doc__ or group.__name__).split())
        yield f"### {title}\n"
        if group in (AcceptedFlags, RefusedFlags):
            yield "Known from Megatron-LM's and MindSpeed-MM's scripts.\n"
        yield _table(group, flag_name).replace("| key |", "| flag |") + "\n"


def _environment() -> Iterator[str]:
    from mm_core.config.environment import VARIABLES

    yield "## Environment variables\n"
    yield "`mm doctor` prints those that are set.\n"
    rows = [
        f"| `{variable.name}` | {_cell(variable.allowed)} | {_cell(variable.default) or '–'} "
        f"| {variable.reader or 'nobody here'} | {_cell(_sentence(variable.meaning))} |"
        for variable in VARIABLES
    ]
    yield (
        "\n".join(["| variable | value | default | read by | meaning |", "|---|---|---|---|---|", *rows])
        + "\n"
    )


def _main(file: Path) -> None:
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_text(reference(), encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
