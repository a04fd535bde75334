"""`mm plugin new`: writes a plugin that works at once, from the text templates in `mm_core/templates`."""

from __future__ import annotations

import json
import keyword
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from mm_core.cli.options import only_word, output_format, take_option
from mm_core.config.findings import ConfigError, Finding, did_you_mean
from mm_registry import ROLES, default_manager
from mm_registry.errors import UserError

_HELP = """\
usage: mm plugin new NAME [--role predictor|ae] [--path DIR] [--format table|json]

Write a plugin that works at once, to start from: the folder mmzoo-plugin-NAME in DIR (by default the working
directory), with a package mm_plugin_NAME, a component NAME with its config class, sharding policy, hook and
example, tests that run the conformance kit, and a model.json. Nothing is overwritten.
"""
_COMMAND = "mm plugin new"
_PREFIX = "mmzoo-plugin-"
#: Role -> what the class is called after the name.
_SUFFIXES = {"predictor": "Predictor", "ae": "Autoencoder"}
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_MAX_LENGTH = 40
_RESERVED = {*keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names}


@dataclass(frozen=True)
class NewPlugin:
    """The names of a plugin that is to be written."""

    role: str
    id: str

    @property
    def distribution(self) -> str:
        return _PREFIX + self.id.replace("_", "-")

    @property
    def package(self) -> str:
        return f"mm_plugin_{self.id}"

    def values(self) -> dict[str, str]:
        """What the templates' `$words` stand for.

        Raises:
            UserError: the running core is not installed, so that no range of it can be named.
        """
        name = "".join(part.capitalize() for part in self.id.split("_"))
        return {
            "id": self.id,
            "distribution": self.distribution,
            "package": self.package,
            "Name": name,
            "Class": name + _SUFFIXES[self.role],
            "core_range": _range("mmzoo-core"),
            "registry_range": _range("mmzoo-registry"),
        }


def run(argv: list[str]) -> int:
    """Write the plugin, say what to do next, and return 0.

    Raises:
        UserError: the name or role is none, the id or the folder exists, or the folder cannot be written.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    role, rest = take_option(rest, "--role")
    path, rest = take_option(rest, "--path")
    plugin = NewPlugin(_role(role or "predictor"), _id(only_word(rest, _COMMAND, "the plugin's NAME")))
    _refuse_taken(plugin)
    folder, written = write_plugin(plugin, Path(path or ".").expanduser())
    place = shlex.quote(str(folder))
    commands = [f"pip install -e {place}", f"mm check {place}/model.json", f"pytest {place}/tests"]
    if form == "json":
        data = {
            "distribution": plugin.distribution,
            "package": plugin.package,
            "role": plugin.role,
            "id": plugin.id,
            "folder": str(folder),
            "files": written,
            "commands": commands,
        }
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    else:
        lines = [f"{folder}: the {plugin.role} {plugin.id!r}, {len(written)} files", "next:"]
        sys.stdout.write("\n".join([*lines, *(f"  {command}" for command in commands)]) + "\n")
    return 0


def write_plugin(plugin: NewPlugin, parent: Path) -> tuple[Path, list[str]]:
    """Write the plugin's folder into `parent`, whole or not at all; return it and its files' paths in it.

    Raises:
        UserError: there is no such parent, the folder exists, or it cannot be written.
    """
    folder = parent / plugin.distribution
    if not parent.is_dir():
        what = "is no folder" if parent.exists() else "does not exist"
        raise UserError(f"{_COMMAND}: --path {str(parent)!r} {what}; make it first, or name another")
    if os.path.lexists(folder):
        raise UserError(
            f"{_COMMAND}: {folder} exists already and nothing is overwritten; choose another NAME or --path"
        )
    texts = dict(sorted(_rendered(plugin)))
    temporary = parent / f".tmp-{plugin.distribution}-{os.getpid()}"
    try:
        for name, text in texts.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        os.rename(temporary, folder)
    except OSError as error:
        raise UserError(
            f"{_COMMAND}: {folder} cannot be written: {error.strerror}; name another --path"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, list(texts)


def _rendered(plugin: NewPlugin) -> Iterator[tuple[str, str]]:
    """Yield each file of the plugin: its path in the folder, and its text."""
    values = plugin.values()
    templates = files("mm_core") / "templates"
    for name in ("plugin", f"plugin-{plugin.role}"):
        for parts, template in _walk(templates / name, ()):
            *folders, file = (plugin.package if part == "package" else part for part in parts)
            file = file.removesuffix(".tmpl")
            path = "/".join([*folders, ".gitignore" if file == "gitignore" else file])
            yield path, Template(template.read_text(encoding="utf-8")).substitute(values)


def _walk(folder: Traversable, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Traversable]]:
    for entry in folder.iterdir():
        here = (*above, entry.name)
        if entry.is_dir():
            yield from _walk(entry, here)
        elif entry.name.endswith(".tmpl"):
            yield here, entry


def _role(role: str) -> str:
    if role in _SUFFIXES:
        return role
    near = did_you_mean(role, list(_SUFFIXES), what="role")
    if role in ROLES:
        near = (
            f"There are templates for {' and '.join(_SUFFIXES)}; docs/plugin-contract.md has the other roles"
        )
    raise _mistake("wrong-value", f'"{role}" is no role that a plugin can be written for', near, "--role")


def _id(name: str) -> str:
    """The id that NAME means: `my-dit` and `my_dit` are one."""
    if name.startswith(_PREFIX):
        mend = f'Write "{name.removeprefix(_PREFIX)}"'
        raise _mistake("wrong-value", f'NAME is without "{_PREFIX}", which is added', mend)
    if not _NAME.fullmatch(name) or len(name) > _MAX_LENGTH:
        allowed = (
            f"NAME is made of lower-case letters and digits, begins with a letter, has at most {_MAX_LENGTH} "
            "characters, and may be divided by single _ or -"
        )
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:_MAX_LENGTH].strip("_")
        mend = f'Write "{near}"' if _NAME.fullmatch(near) and near not in _RESERVED else ""
        shown = name if len(name) <= _MAX_LENGTH else f"{name[:_MAX_LENGTH]}…"
        raise _mistake("wrong-value", f'"{shown}" cannot be a NAME: {allowed}', mend)
    if name in _RESERVED:
        mend = f'Write "{name}_dit", or what the model is called'
        raise _mistake("wrong-value", f'"{name}" is a name of Python\'s own', mend)
    return name.replace("-", "_")


def _refuse_taken(plugin: NewPlugin) -> None:
    """An id that another distribution offers would be ambiguous as soon as the new plugin is installed."""
    claims = [spec for spec in default_manager().specs(ROLES[plugin.role].name) if spec.id == plugin.id]
    if claims:
        owners = " and ".join(dict.fromkeys(spec.provider for spec in claims))
        text = f"the {plugin.role} {plugin.id!r} is offered by {owners} already"
        raise _mistake("taken-id", text, "Choose another NAME: two plugins with one id are ambiguous")


def _range(distribution: str) -> str:
    installed = default_manager().version(distribution)
    if installed is None:
        raise UserError(
            f"{_COMMAND}: {distribution} is not installed; run `pip install ./registry .` in a clone of MM Zoo"
        )
    return api_range(installed)


def api_range(installed: str) -> str:
    """Return the versions that keep the API of one: `>=0.1,<0.2`, or `>=1.2,<2` from 1.0 on."""
    from packaging.version import Version

    version = Version(installed)
    lowest = version.public if version.is_prerelease else f"{version.major}.{version.minor}"
    highest = str(version.major + 1) if version.major else f"0.{version.minor + 1}"
    return f">={lowest},<{highest}"


def _mistake(code: str, text: str, mend: str, where: str = _COMMAND) -> ConfigError:
    return ConfigError([Finding("error", code, text, path=where, suggestion=mend)])
