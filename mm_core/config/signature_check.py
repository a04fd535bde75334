"""The check of a section whose component registers no config class: against the constructor's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mm_core.config.document import Document
from mm_core.config.findings import Finding, did_you_mean, show
from mm_core.config.signature import Parameter, Signature, UnreadableError, read_signature
from mm_registry.errors import RegistryError
from mm_registry.spec import RUNTIME

if TYPE_CHECKING:
    from mm_core.config.parts import Part
    from mm_registry.manager import PluginManager

#: Arguments that the core gives beside the section's fields, by role.
_GIVEN: Mapping[str, frozenset[str]] = {"pipeline": frozenset({"device"})}
_OPTIONAL: Mapping[str, frozenset[str]] = {"dataset": frozenset({"seed"})}
#: Arguments that it gives by position, first.
_POSITIONS: Mapping[str, int] = {"pipeline": 2}
_LOADED = frozenset({"ae", "text_encoder"})

_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text in quotes"}


def check_signature(
    part: Part,
    document: Document,
    section: Mapping[str, Any],
    manager: PluginManager,
    *,
    pretrained: bool = False,
    also_known: Collection[str] = (),
) -> Iterator[Finding]:
    """Yield what is wrong with the keys of a section, as far as the constructor's arguments tell.

    A key that it does not take and an argument without a default that is not given are errors; so is a value of
    another type where the annotation is `int`, `float`, `bool` or `str` (or `None` beside them). Nothing is
    imported; if the source does not tell, a note says so, and the section is checked when the component is built.

    Args:
        section: the section's keys without those that the core reads itself.
        pretrained: whether `from_pretrained` is called rather than the constructor.
        also_known: keys that are checked elsewhere, for suggestions.
    """
    assert part.spec is not None
    try:
        signature = _signature(part, manager, pretrained and part.role in _LOADED)
    except UnreadableError as reason:
        text = f"{part.label} is checked when it is built, not here: it has no config class, and {reason}"
        origin = document.key_origin(part.path)
        yield Finding.at(origin, "note", "unchecked-section", text, path=part.path)
        return
    for key, value in section.items():
        path = (*part.path, key)
        parameter = signature.parameters.get(key)
        if parameter is None and signature.open:
            text = f'"{key}" is passed on unchecked: {part.spec.target} takes any key (**kwargs)'
            yield Finding.at(document.key_origin(path), "note", "unchecked-key", text, path=path)
        elif parameter is None:
            text = f'unknown key "{key}" in {part.label}'
            mend = did_you_mean(key, [*signature.parameters, *also_known])
            origin = document.key_origin(path)
            yield Finding.at(origin, "error", "unknown-key", text, path=path, suggestion=mend)
        elif (expected := _mismatch(value, parameter.annotation)) is not None:
            text = f'"{key}" is {show(value, path)}, expected {expected}'
            yield Finding.at(document.origin(path), "error", "wrong-type", text, path=path)
    for parameter in signature.parameters.values():
        if parameter.required and parameter.name not in section:
            path = (*part.path, parameter.name)
            text = f'{part.label} needs "{parameter.name}"'
            mend = f'Add "{parameter.name}"'
            origin = document.key_origin(part.path)
            yield Finding.at(origin, "error", "missing-key", text, path=path, suggestion=mend)


def _signature(part: Part, manager: PluginManager, loaded: bool) -> Signature:
    """The arguments that a section can give: without those that the core gives itself."""
    assert part.spec is not None
    if part.spec.distribution == RUNTIME:
        signature = _of_object(part, manager)
    elif loaded:
        signature = _of_loader(part.spec.target)
    else:
        signature = read_signature(part.spec.target)
    skipped = set(list(signature.parameters)[: _POSITIONS.get(part.role, 0)])
    skipped |= _GIVEN.get(part.role, frozenset())
    optional = _OPTIONAL.get(part.role, frozenset())
    parameters = {
        name: Parameter(name, parameter.required and name not in optional, parameter.annotation)
        for name, parameter in signature.parameters.items()
        if name not in skipped
    }
    return Signature(parameters, signature.open)


def _of_loader(target: str) -> Signature:
    """`from_pretrained(folder, *, dtype, **fields)`: what it does not name goes to the constructor."""
    loader = read_signature(target, "from_pretrained")
    own = dict(list(loader.parameters.items())[1:])
    own.pop("dtype", None)
    if not loader.open:
        return Signature(own)
    # The folder may fill what the constructor asks for.
    rest = read_signature(target)
    filled = {name: Parameter(name, False, p.annotation) for name, p in rest.parameters.items()}
    return Signature({**filled, **own}, rest.open)


def _of_object(part: Part, manager: PluginManager) -> Signature:
    """Of what the program registered itself, and so imported already."""
    assert part.spec is not None
    try:
        found = inspect.signature(manager.load(part.spec))  # type: ignore[arg-type]
    except (RegistryError, TypeError, ValueError) as error:
        raise UnreadableError(f"it has no signature ({error})") from error
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {
        name: Parameter(name, parameter.default is parameter.empty, _written(parameter.annotation))
        for name, parameter in found.parameters.items()
        if parameter.kind in named
    }
    return Signature(parameters, any(p.kind is p.VAR_KEYWORD for p in found.parameters.values()))


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _mismatch(value: Any, annotation: str) -> str | None:
    """What was expected, if the annotation is plain enough to tell that the value is not it."""
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", annotation)
    kinds = [kind.strip() for kind in (optional[1] if optional else annotation).split("|")]
    if optional:
        kinds.append("None")
    if not set(kinds) <= {*_EXPECTED, "None"} or kinds == ["None"]:
        return None
    fits = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "None": value is None,
    }
    if any(fits[kind] for kind in kinds):
        return None
    return " or ".join(_EXPECTED.get(kind, "null") for kind in kinds)
