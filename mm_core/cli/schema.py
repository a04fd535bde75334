"""`mm schema`: the JSON Schema of a file or a component, for editors. Imports config classes, and no torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import only_word, take_option
from mm_core.cli.tables import json_text
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_registry import PluginManager
    from mm_registry.spec import EntrySpec

_HELP = """\
usage: mm schema WHAT [--output FILE]

Print the JSON Schema (draft 2020-12) of a kind of file (job, model, data, tools, fsdp2, inference, transformers) or of
one component's section (`predictor/wandit`, or `wandit` where only one registry has it). It knows the components that
are installed here. --output writes it to FILE; a FILE that is there already is replaced only if it is a schema of ours.
"""
_MAX_BYTES = 64 * 1024 * 1024


def run(argv: list[str]) -> int:
    """Print or write one schema and return 0.

    Raises:
        UserError: there is no such kind or component, or the file cannot be written or is another one.
    """
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    output, rest = take_option(argv, "--output")
    text = json_text(_schema(only_word(rest, "mm schema", "a kind of file or an id")))
    if output is None:
        sys.stdout.write(text)
    else:
        _write(Path(output), text)
    return 0


def _schema(what: str) -> dict[str, Any]:
    from mm_core.config.schema import KINDS, file_schema
    from mm_core.config.schema_components import component_schema
    from mm_registry import default_manager

    if what in KINDS:
        return file_schema(what)
    spec, role = _component(what, default_manager())
    return component_schema(spec, role)


def _component(what: str, manager: PluginManager) -> tuple[EntrySpec, str]:
    from mm_core.cli.ids import claims_named, unknown_everywhere
    from mm_core.config.schema import KINDS
    from mm_core.config.schema_components import SECTION_ROLES
    from mm_registry.groups import ROLES
    from mm_registry.suggestions import closest

    role, _, name = what.partition("/")
    if what in SECTION_ROLES:
        ids = ", ".join(f"{what}/{id}" for id in manager.ids(ROLES[what].name))
        raise UserError(f"mm schema: {what!r} is a role; write one of its components: {ids}.")
    if name and role in ROLES:
        if role not in SECTION_ROLES:
            raise UserError(
                f"mm schema: a {ROLES[role].noun} has no section of its own, only an id; ask for `model`."
            )
        return manager.resolve(ROLES[role].name, name), role
    groups = [ROLES[role] for role in SECTION_ROLES if claims_named(manager, ROLES[role], what)]
    if len(groups) == 1:
        return manager.resolve(groups[0].name, what), groups[0].role
    if groups:
        which = " or ".join(f"{group.role}/{what}" for group in groups)
        raise UserError(f"mm schema: more than one registry has {what!r}; write {which}.")
    near = closest(what, KINDS, 1)
    if near:
        raise UserError(f"mm schema: there is no file kind {what!r}; did you mean `{near[0]}`?")
    raise unknown_everywhere(manager, what, [ROLES[role] for role in SECTION_ROLES])


def _write(path: Path, text: str) -> None:
    """Write all or nothing.

    Raises:
        UserError: the file is there and no schema of ours, or it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: this is a folder; name a file in it.")
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        if target.exists() and not _is_ours(target):
            raise UserError(
                f"--output {path}: there is such a file, and `mm schema` did not write it; "
                "name another file, or remove this one first."
            )
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {path}: it cannot be written: {error.strerror or error}; name a file in a folder that is "
            "there and may be written to."
        ) from error


def _is_ours(path: Path) -> bool:
    from mm_core.config.schema_components import WRITTEN

    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return False  # a device can be read without end
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and str(data.get("$comment", "")).startswith(WRITTEN)
