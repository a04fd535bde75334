"""`key.path=value` on the command line: one value of a section, or one flag, said anew. It wins over every file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_core.config.document import Document
from mm_core.config.findings import ConfigError, Finding, clip, closest, show
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.secrets import HIDDEN, hide, in_secret, names_secret

#: Section of a job -> the flag that names its file.
FLAG_OF = {"model": "mm_model", "data": "mm_data", "tools": "mm_tool", "fsdp2": "fsdp2_config_path"}
SECTIONS = tuple(FLAG_OF)
#: Names under which a job file has flags.
FLAG_SECTIONS = ("gpt_args", "flags", "lora_args")
_KNOWN = (*SECTIONS, "plugins", *FLAG_SECTIONS)
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(?:[.\[][^=]*)?=")
_SHOWN = 60  # characters of a value in `mm explain` and config.json


@dataclass(frozen=True)
class Override:
    """One such word.

    Attributes:
        section: `model`, `data`, `tools`, `fsdp2`, or `gpt_args` for a flag.
        path: from the section; digits may be an index, which only the section tells.
        value: plain data.
        origin: the command line; a secret value is not in it.
    """

    section: str
    path: tuple[str, ...]
    value: Any
    origin: Origin


def is_override(word: str) -> bool:
    """Whether a word of the command line is `key.path=value`, rather than a flag or a file."""
    return _OVERRIDE.match(word) is not None


def parse_override(word: str) -> Override:
    """Read `section.key.key=value`. The value is YAML on one line: a number, true, null, text, `[1, 2]`, `{a: 1}`.

    Raises:
        ConfigError: there is no such section, no key, no value, or the value is malformed.
    """
    place, _, text = word.partition("=")
    names = tuple(place.replace("[", ".").replace("]", "").split("."))
    origin = _origin(place, names, text)
    section, path = names[0], names[1:]
    if section not in _KNOWN:
        near = closest(section, _KNOWN)
        mend = f'Did you mean "{near}"?' if near else f"Known sections: {', '.join(_KNOWN)}"
        raise _mistake(origin, f'there is no section "{clip(section)}"', mend)
    if not all(path):
        raise _mistake(origin, "a name of its path is empty", "Write section.key=value")
    if not path and section not in ("fsdp2", "plugins", *SECTIONS):
        raise _mistake(origin, "it names no flag", f"Write {section}.lr=1e-4, say")
    if not text.strip():
        raise _mistake(origin, "the value is missing", "Write null for no value, or '\"\"' for an empty text")
    value = _value(text.strip(), origin)
    if section in FLAG_SECTIONS:
        section = "gpt_args"
    elif section == "plugins":
        section, path = "model", ("plugins", *path)
    return Override(section, path, value, origin)


def apply_overrides(
    document: Document, overrides: Iterable[Override], section: str
) -> tuple[Document, list[Finding]]:
    """Return a section with the overrides that are for it, in their order, and errors for those that lead into a
    scalar or out of a list. Whether their keys are known is found when the section is checked.
    """
    findings: list[Finding] = []
    for override in overrides:
        if override.section != section:
            continue
        if not override.path:
            value = override.value if isinstance(override.value, Mapping) else {}
            document = Document.from_data(value, override.origin)
            continue
        path, problem = _place(document, override.path, section)
        if problem:
            findings += _mistake(override.origin, problem).findings
        else:
            document = document.replaced(path, override.value, override.origin)
    return document, findings


def _place(document: Document, names: tuple[str, ...], section: str) -> tuple[KeyPath, str]:
    """Return where the names lead in a document, digits as indices of lists, and what is in the way."""
    path: KeyPath = ()
    node: Any = document.data
    for index, name in enumerate(names):
        here = dotted((section, *path))
        if isinstance(node, list):
            if not (name.isascii() and name.isdigit() and int(name) < len(node)):
                count = len(node)
                allowed = f"0 to {count - 1}" if count > 1 else "0" if count else "none: it is empty"
                return path, f'{here} is a list, and "{clip(name)}" is no item of it ({allowed})'
            path = (*path, int(name))
            node = node[int(name)]
        elif isinstance(node, Mapping):
            path = (*path, name)
            if name not in node:
                return (*path, *names[index + 1 :]), ""
            node = node[name]
        else:
            shown = HIDDEN if in_secret(path) else show(node)
            return path, f"{here} is {shown}, no object, so nothing can be set in it"
    return path, ""


def _value(text: str, origin: Origin) -> Any:
    """Return what a value says. A text needs no quotes, whatever YAML means by the signs in it."""
    from mm_core.config.yaml_reader import parse_yaml

    marked = text[0] in "[{\"'"
    try:
        text.encode("utf-8")
        value: Any = parse_yaml(text, "").data
    except UnicodeEncodeError:
        raise _mistake(origin, "the value is not UTF-8 text", "Write it in UTF-8") from None
    except ConfigError as error:
        if not marked:
            return text
        raise _mistake(origin, f"the value is malformed: {error.findings[0].message}") from None
    plain = not marked and (isinstance(value, dict | list) or " #" in text or text[0] in "!&#")
    return text if plain else value


def _origin(place: str, names: tuple[str, ...], text: str) -> Origin:
    secret = in_secret(names) or (text.strip()[:1] in ("[", "{") and names_secret(text))
    shown = HIDDEN if secret else hide(text)
    if len(shown) > _SHOWN:
        shown = shown[: _SHOWN - 1] + "…"
    return Origin("flag", detail=f"command line: {clip(place)}={shown}")


def _mistake(origin: Origin, message: str, suggestion: str = "") -> ConfigError:
    return ConfigError([Finding.at(origin, "error", "bad-override", message, suggestion=suggestion)])
