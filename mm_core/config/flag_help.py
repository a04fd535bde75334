"""How a flag is written and what it takes: its name, type, range, default and kind; the help page of `mm train`."""

from __future__ import annotations

import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mm_core.config import flag_table as table
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import markers

_TYPES = {int: "whole number", float: "number", list: "list", str: "text", bool: "switch"}
_PLACEHOLDERS = {int: "N", float: "X", list: "A,B", str: "TEXT", bool: ""}


@dataclass(frozen=True, slots=True)
class FlagFacts:
    """What a user has to know of one flag.

    Attributes:
        flag: as it is typed, with hyphens.
        type: `whole number`, `number`, `list`, `text`, `switch`, or the words to choose from.
        range: such as `from 1 to 1024`, `above 0`; empty if any value of the type will do.
        default: empty if there is none, or if it is computed (the text says how).
        kind: `effective`, `without effect`, `not yet` or `refused`.
        text: meaning and unit; why, for the other three kinds.
    """

    flag: str
    type: str
    range: str
    default: str
    kind: str
    text: str


def flag_name(attribute: str) -> str:
    """`micro_batch_size` is `--micro-batch-size`."""
    return "--" + attribute.replace("_", "-")


def kind_of(field: FieldInfo) -> type:
    """Return bool, int, float, list or str: how a flag's text is read."""
    annotation = field.annotation
    names = {annotation, typing.get_origin(annotation), *typing.get_args(annotation)}
    names |= {typing.get_origin(arg) for arg in typing.get_args(annotation)}
    return next((kind for kind in (bool, int, float, list) if kind in names), str)


def metavar(field: FieldInfo) -> str:
    """Return what stands for a flag's value on the help page; a switch has none."""
    return "|".join(_choices(field)) or _PLACEHOLDERS[kind_of(field)]


def facts_of(name: str, field: FieldInfo) -> FlagFacts:
    """Return what the table says about the flag of one attribute."""
    kind, text = "effective", field.description or ""
    available = ""
    for idle in markers(field, NoEffect):
        if idle.when is None:
            kind, text = "without effect", idle.reason
    for later in markers(field, NotYet):
        available = _values(later.values)
        # Some values are honoured: the flag has an effect, and the others have to wait.
        kind = "effective" if text else "not yet"
        text = text or later.reason
    for only in markers(field, Only):
        kind, text = "refused", only.reason
        available = _values(only.values)
    ending = " yet" if kind == "effective" else ""  # the reason of the other kinds says it
    limits = f"only {available}{ending}" if available else _range(field)
    choices = "|".join(_choices(field))
    return FlagFacts(
        flag_name(name), choices or _TYPES[kind_of(field)], limits, _default(field, text), kind, text
    )


def train_help(width: int = 110) -> str:
    """Return the help page of `mm train`."""
    lines = [
        "usage: mm train --mm-model FILE --mm-data FILE [--mm-tool FILE] [--fsdp2-config-path FILE] [FLAGS]",
        "       mm train job.yaml [FLAGS] [key.path=value ...]   (one file for all; an override wins over files)",
        "",
        "Check a job, then build, shard and train it. Underscores are accepted for hyphens, and "
        "--flag=value.",
    ]
    for group in table.GROUPS:
        lines += ["", f"{(group.__doc__ or '').strip()}:", *group_help(group, width)]
    return "\n".join(lines) + "\n"


def group_help(group: type[BaseModel], width: int) -> list[str]:
    """Return the lines about one group of flags: name, meaning, range and default of each; the names alone where
    they are only known.
    """
    if group in (table.AcceptedFlags, table.UnavailableFlags, table.RefusedFlags):
        names = ", ".join(map(flag_name, group.model_fields))
        return textwrap.wrap(
            names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    lines = []
    for name, field in group.model_fields.items():
        head = f"  {flag_name(name)} {metavar(field)}".rstrip()
        body = textwrap.wrap(_sentence(facts_of(name, field)), width - 34)
        if len(head) > 32:
            lines.append(head)
            head = ""
        lines += [f"{head:<33} {body[0]}", *(" " * 34 + line for line in body[1:])]
    return lines


def _sentence(facts: FlagFacts) -> str:
    if facts.kind == "without effect":
        return f"accepted without effect: {facts.text}"
    if facts.kind != "effective":
        refused = "refused" if facts.kind == "refused" else "not available yet"
        return f"{facts.range or refused}: {facts.text}"
    more = [facts.range, f"default {facts.default}" if facts.default else ""]
    said = "; ".join(filter(None, more))
    return f"{facts.text} ({said})" if said else facts.text


def _choices(field: FieldInfo) -> list[str]:
    for annotation in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(annotation) is typing.Literal:
            return [str(value) for value in typing.get_args(annotation)]
    return []


def _values(values: tuple[Any, ...]) -> str:
    return " or ".join(str(value) for value in values if value not in (None, False, ()))


def _range(field: FieldInfo) -> str:
    limits = {
        name: getattr(mark, name)
        for mark in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(mark, name)
    }
    low = next(
        (
            f"{word} {_number(limits[name])}"
            for name, word in (("ge", "from"), ("gt", "above"))
            if name in limits
        ),
        "",
    )
    high = next(
        (
            f"{word} {_number(limits[name])}"
            for name, word in (("le", "to"), ("lt", "below"))
            if name in limits
        ),
        "",
    )
    if low.startswith("from") and not high:
        return f"at least {low.removeprefix('from ')}"
    return f"{low} {high}".strip()


def _default(field: FieldInfo, text: str) -> str:
    """The default, unless it is computed or unsaid: then the text tells it, if there is something to tell."""
    if field.default is None or field.default is False or "default" in text or "required" in text:
        return ""
    return str(field.default)


def _number(value: float) -> str:
    """A limit as people write it: 2^40 rather than 1099511627776."""
    power = int(value).bit_length() - 1
    return f"2^{power}" if power >= 20 and value == 2**power else f"{value:g}"
