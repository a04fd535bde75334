"""Which distributions take part, and which of several claims to an id counts: decided by name, before
anything is imported.

Four places may say so, the outermost first: the environment variable `MM_PLUGINS`, the environment's file
(`<sys.prefix>/etc/mmzoo/plugins.toml`), the project's (the nearest `mmzoo.toml` from the working directory
upwards), the job's `plugins`. Every allow list given must name a distribution; for `disable`, `enable` and
`prefer` the narrowest place that speaks of a distribution, or of an id, decides. MM Zoo's own two distributions
are always in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mm_registry.errors import SelectionError
from mm_registry.groups import COMPANION_GROUPS, GROUPS, ROLES
from mm_registry.spec import RUNTIME, Status, canonical_name
from mm_registry.suggestions import closest
from mm_registry.words import clip, shown

VARIABLE = "MM_PLUGINS"
PROJECT_FILE = "mmzoo.toml"
USUAL = "<the usual place>"  # stands for the environment's file, or the working directory
CORE_DISTRIBUTIONS = frozenset({"mmzoo-core", "mmzoo-registry"})
KEYS = ("allow", "disable", "enable", "prefer")


def environment_file() -> str:
    """Return the path of the environment's selection file, which need not exist."""
    return os.path.join(sys.prefix, "etc", "mmzoo", "plugins.toml")


def find_project_file(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Return the path of the nearest `mmzoo.toml` from a folder (the working directory) upwards, or None."""
    try:
        folder = os.path.abspath(os.getcwd() if folder is None else folder)
    except FileNotFoundError:  # the working directory was deleted
        return None
    while True:
        path = os.path.join(folder, PROJECT_FILE)
        if os.path.lexists(path):  # a dangling link, too: what is meant to be said must not go unheard
            return path
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


class SelectionLayer(NamedTuple):
    """What one place says. Names of distributions are canonical.

    Attributes:
        origin: `"MM_PLUGINS"`, or the file as the user knows it.
        allow: distributions that may take part; None when all may.
        disable, enable: distributions that this place takes out, or back in.
        prefer: name of an id (`"predictor/wandit"`) -> the distribution that it means.
        lines: where it stands, `("disable", "mmzoo-plugin-x")`, `("prefer", "predictor/wandit")`, `("allow",)`
            -> line; empty if that is not known.
        written: the variable's value as the user wrote it.
    """

    origin: str
    allow: frozenset[str] | None = None
    disable: frozenset[str] = frozenset()
    enable: frozenset[str] = frozenset()
    prefer: Mapping[str, str] = MappingProxyType({})
    lines: Mapping[tuple[str, ...], int] = MappingProxyType({})
    written: str = ""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> SelectionLayer | None:
        """Return what `MM_PLUGINS` says, a comma-separated allow list: unset, nothing; set but empty, that
        only the core takes part.
        """
        text = environ.get(VARIABLE)
        if text is None:
            return None
        names = (canonical_name(name) for name in text.split(","))
        return cls(VARIABLE, frozenset(name for name in names if name), written=text.strip())

    @classmethod
    def from_table(
        cls, origin: str, table: Mapping[str, Any], lines: Mapping[tuple[str, ...], int] | None = None
    ) -> SelectionLayer:
        """Check `{"allow": […], "disable": […], "enable": […], "prefer": {…}}` and return it as a layer.

        Raises:
            SelectionError: a key is unknown, a value of the wrong type, a name both enabled and disabled, the
                core disabled, or no id is named under `prefer`.
        """
        lines = lines or {}

        def refuse(problem: str, *key: str | int, name: object = None) -> SelectionError:
            place = (str(key[0]), canonical_name(name)) if isinstance(name, str) else tuple(map(str, key))
            return SelectionError(problem, origin, _line(lines, place), key)

        for key in table:
            if key not in KEYS:
                near = closest(str(key), KEYS, 1)
                mend = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(KEYS)}"
                raise refuse(f'"{clip(str(key))}" is no key of a selection of plugins; {mend}', key)
        lists: dict[str, frozenset[str]] = {}
        for key in KEYS[:3]:
            names = table.get(key, [])
            if not isinstance(names, list):
                raise refuse(f'"{key}" is {shown(names)}, expected a list of distributions', key)
            for index, name in enumerate(names):
                if not isinstance(name, str) or not name.strip():
                    raise refuse(
                        f'"{key}" holds {shown(name)}, expected the name of a distribution', key, index
                    )
                if key == "disable" and canonical_name(name) in (*CORE_DISTRIBUTIONS, RUNTIME):
                    is_runtime = canonical_name(name) == RUNTIME
                    what = "what the program registers itself" if is_runtime else "MM Zoo itself"
                    problem = f"{name} is {what} and cannot be disabled"
                    raise refuse(problem, key, index, name=name)
            lists[key] = frozenset(canonical_name(name) for name in names)
        for name in sorted(lists["disable"] & lists["enable"]):
            problem = f"{clip(name)} is listed under both enable and disable; keep one of them"
            index = [canonical_name(written) for written in table["enable"]].index(name)
            raise refuse(problem, "enable", index, name=name)
        prefer = table.get("prefer", {})
        if not isinstance(prefer, Mapping):
            raise refuse(f'"prefer" is {shown(prefer)}, expected a table from ids to distributions', "prefer")
        for key, name in prefer.items():
            no_id = _no_id(key)
            if no_id is not None:
                raise refuse(no_id, "prefer", key)
            if not isinstance(name, str) or not name.strip():
                problem = f'"prefer" has {shown(name)} for {shown(key)}, expected the name of a distribution'
                raise refuse(problem, "prefer", key)
        return cls(
            origin,
            lists["allow"] if "allow" in table else None,
            lists["disable"],
            lists["enable"],
            {key: canonical_name(name) for key, name in prefer.items()},
            lines,
        )

    def where(self, *key: str) -> str:
        """Return `"mmzoo.toml:4"`, or the origin alone when the line is not known."""
        line = _line(self.lines, key)
        return self.origin if line is None else f"{self.origin}:{line}"

    def unmatched(
        self, names: Collection[str], installed: Callable[[str], bool]
    ) -> Iterator[tuple[tuple[str, str], str]]:
        """Yield (key, message) for each name that is no installed distribution; `names` are those to suggest."""
        listed = {(key, name): name for key in KEYS[:3] for name in getattr(self, key) or ()}
        listed |= {("prefer", key): name for key, name in self.prefer.items()}
        for (key, item), name in sorted(listed.items()):
            if name not in names and name != RUNTIME and not installed(name):
                near = closest(name, names, 1)
                mend = f"; did you mean {near[0]!r}?" if near else ""
                what = (
                    f"{key}s {shown(name)} for {shown(item)}"
                    if key == "prefer"
                    else f"{_SAYS[key]} {shown(name)}"
                )
                yield (key, item), f"{self.where(key, item)} {what}, which is not installed{mend}"


def _line(lines: Mapping[tuple[str, ...], int], key: tuple[str, ...]) -> int | None:
    """Where a key stands, or else what holds it."""
    return lines.get(key, lines.get(key[:1], lines.get(())))


_SAYS = {"allow": "lists", "disable": "disables", "enable": "enables"}


class Selection(NamedTuple):
    """What all places say together; `layers` are outermost first."""

    layers: tuple[SelectionLayer, ...] = ()

    def excludes(self, distribution: str) -> tuple[Status, str] | None:
        """Return the status of a distribution that may not take part, with why and what would let it; None if
        it may.
        """
        name = canonical_name(distribution)
        if name in CORE_DISTRIBUTIONS or name == RUNTIME:
            return None
        for layer in self.layers:
            if layer.allow is not None and name not in layer.allow:
                return Status.NOT_ALLOWLISTED, _not_listed(layer, name)
        for layer in reversed(self.layers):
            if name in layer.disable:
                mend = f"take it out there{_or_enable(layer, name)}"
                return Status.BLOCKED, f"{layer.where('disable', name)} disables {name}; {mend}"
            if name in layer.enable:
                return None
        return None

    def preferred(self, key: str) -> tuple[str, str] | None:
        """Return (distribution, where it says so) that an id is to mean, `key` being its `id_key`; None if
        nothing is said.
        """
        for layer in reversed(self.layers):
            if key in layer.prefer:
                return layer.prefer[key], layer.where("prefer", key)
        return None

    def about(self, distributions: Collection[str], key: str) -> tuple[str, ...]:
        """Return, in words and outermost first, every line that speaks of an id or of these distributions."""
        said: list[str] = []
        names = sorted({canonical_name(name) for name in distributions} - CORE_DISTRIBUTIONS - {RUNTIME})
        for layer in self.layers:
            for name in names:
                if layer.allow is not None:
                    listed = "allows" if name in layer.allow else "does not allow"
                    said.append(f"{layer.where('allow', name)} {listed} {name}")
                for verb, listing in (("disable", layer.disable), ("enable", layer.enable)):
                    if name in listing:
                        said.append(f"{layer.where(verb, name)} {verb}s {name}")
            if key in layer.prefer:
                said.append(f"{layer.where('prefer', key)} prefers {layer.prefer[key]} for {key!r}")
        return tuple(said)


def layers_of(
    environ: Mapping[str, str],
    environment: str | os.PathLike[str] | None,
    project: str | os.PathLike[str] | None,
) -> tuple[SelectionLayer, ...]:
    """Return what `MM_PLUGINS`, the environment's file and the project's say; for the last two arguments see
    `PluginManager`.

    Raises:
        SelectionError: a file cannot be used.
    """
    if environment == USUAL:
        environment = environment_file()
    files = [
        environment if environment is not None and os.path.lexists(environment) else None,
        find_project_file(None if project == USUAL else project) if project is not None else None,
    ]
    layers = [SelectionLayer.from_environ(environ)]
    for file in files:
        if file is not None:
            from mm_registry.selection_files import read_layer

            layers.append(read_layer(file))
    return tuple(layer for layer in layers if layer is not None)


def _or_enable(layer: SelectionLayer, name: str) -> str:
    """The command that takes it out of the file that disables it; a job's file is edited by hand."""
    flags = {PROJECT_FILE: " --scope project", os.path.basename(environment_file()): ""}
    scope = flags.get(os.path.basename(layer.origin))
    return "" if scope is None else f", or run `mm plugin enable {name}{scope}`"


def _not_listed(layer: SelectionLayer, name: str) -> str:
    if layer.origin == VARIABLE:
        wanted = f"{layer.written},{name}" if layer.allow else name
        mend = f"set {VARIABLE}={wanted!r}" if len(wanted) <= 200 else f"add ,{name} to it"
        return f"{VARIABLE}={shown(layer.written, 200)} does not list {name}; {mend}, or unset it"
    return f"allow at {layer.where('allow')} does not list {name}; add it there"


def _no_id(key: object) -> str | None:
    """Why a key under `prefer` is the name of no id; None if it is one."""
    roles = [*ROLES, *(GROUPS[group].role for group in sorted(COMPANION_GROUPS))]
    role, slash, rest = key.partition("/") if isinstance(key, str) else ("", "", "")
    inner, inner_slash, last = rest.partition("/")
    if role in ROLES and rest and not inner_slash:
        return None
    if role in roles and role not in ROLES and inner in ROLES and last and "/" not in last:
        return None
    near = closest(role, roles, 1) if slash and role not in roles else []
    mend = f"did you mean {near[0]!r}?" if near else f"the roles are {', '.join(ROLES)}"
    return f"{shown(key)} under prefer is not of the form role/id, such as predictor/wandit; {mend}"
