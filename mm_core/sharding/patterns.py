"""Patterns that name modules, resolved against the paths of a module tree. This module imports no torch.

A pattern is a dotted path. Braces stand for several children of one module:

- `blocks.{*}`: every child of `blocks`;
- `blocks.{0-20,25,30-40}`: numbered children; ranges include both ends;
- `towers.{text,vision}.layers.{*}`: named children (of a `ModuleDict`, say); any number of braces;
- `layer_{0-3}`: braces may be part of a name.

Every item must match: a pattern is written by someone who believes that the modules exist.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from mm_registry.errors import UserError

_PIECE = re.compile(r"\{([^{}]*)\}|([^{}]+)")
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_ANY = "\0"  # stands for {*} inside an expanded name; no module name holds it


class PlanError(UserError):
    """A policy, fsdp2.yaml and a model do not fit together.

    Attributes:
        problem, suggestion: the two parts of the message; the second may be empty.
        field, pattern: of fsdp2.yaml, the pattern as it is written there, where one of its patterns is to
            blame; else None.
    """

    def __init__(self, problem: str, suggestion: str = "") -> None:
        super().__init__(f"{problem} {suggestion}" if suggestion else problem)
        self.problem = problem
        self.suggestion = suggestion
        self.field: str | None = None
        self.pattern: str | None = None


class PatternError(PlanError):
    """A pattern is malformed, or does not fit the model."""


@contextmanager
def blaming(field: str | None, pattern: str | None) -> Iterator[None]:
    """Tell an error that leaves the block which pattern of fsdp2.yaml it is about, if it is about one."""
    try:
        yield
    except PlanError as error:
        if error.field is None and field is not None and pattern is not None:
            error.field, error.pattern = field, pattern
        raise


class ModulePaths:
    """The paths of a module tree, `""` for its root, and how to find some of them by pattern.

    Args:
        paths: dotted paths in registration order, as `named_modules()` gives them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._children: dict[str, list[str]] = {"": []}
        for path in paths:
            if path:
                parent, _, name = path.rpartition(".")
                self._children.setdefault(parent, []).append(name)
                self._children.setdefault(path, [])

    def __contains__(self, path: str) -> bool:
        return path in self._children

    def children(self, path: str) -> Sequence[str]:
        """Names of the direct children of the module at `path`."""
        return self._children[path]

    def match(self, pattern: str, *, where: str = "", prefix: str = "") -> list[str]:
        """The paths that a pattern names: registration order for `{*}`, ascending for numbers, no path twice.

        Args:
            where: what to call the pattern's place in messages, such as `sub_modules_to_wrap`.
            prefix: what users write before paths of this tree (`predictor`), for messages.

        Raises:
            PatternError: malformed, or some part of it matches no module; the message has the closest paths.
        """
        label = f'{where}: "{_join(prefix, pattern)}"' if where else f'"{_join(prefix, pattern)}"'
        found = [""]
        for component in split_pattern(pattern, label):
            names = expand(component, label)
            found = [path for base in found for path in self._step(base, names, label, prefix)]
        return list(dict.fromkeys(found))

    def has(self, pattern: str) -> bool:
        """Whether a well-formed pattern names something."""
        try:
            return bool(self.match(pattern))
        except PatternError:
            return False

    def closest(self, path: str, prefix: str = "", count: int = 3) -> list[str]:
        """Paths nearest to a wrong one, best first, each with the prefix."""
        near = difflib.get_close_matches(path, [p for p in self._children if p], n=count, cutoff=0.5)
        return [_join(prefix, p) for p in near]

    def _step(self, base: str, names: Sequence[str], label: str, prefix: str) -> list[str]:
        children = self._children[base]
        found: list[str] = []
        for name in names:
            wanted = re.compile(".+".join(re.escape(part) for part in name.split(_ANY)))
            matching = [child for child in children if wanted.fullmatch(child)]
            if not matching:
                raise self._no_match(base, name, label, prefix)
            found += [_join(base, child) for child in matching]
        return found

    def _no_match(self, base: str, name: str, label: str, prefix: str) -> PatternError:
        children = self._children[base]
        shown = name.replace(_ANY, "{*}")
        place = f'"{_join(prefix, base)}"' if _join(prefix, base) else "the model"
        if not children:
            return PatternError(f"{label} matches no module: {place} has no submodules.")
        # A wrong name deep in the tree is often a right one at another depth, so whole paths are compared as
        # well.
        near = difflib.get_close_matches(shown, children, n=2, cutoff=0.5)
        suggestions = [_join(prefix, _join(base, child)) for child in near]
        suggestions += [p for p in self.closest(_join(base, shown), prefix) if p not in suggestions]
        mend = f"Closest: {', '.join(suggestions[:3])}." if suggestions else ""
        return PatternError(
            f'{label} matches no module: {place} has no "{shown}", only {_summary(children)}.', mend
        )


def split_pattern(pattern: str, label: str = "") -> list[str]:
    """Split a pattern at the dots outside braces.

    Raises:
        PatternError: unbalanced braces, an empty component, or a `*` or `?` outside braces.
    """
    label = label or f'"{pattern}"'
    depth, components, current = 0, [], ""
    for character in pattern.strip():
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth not in (0, 1):
            raise PatternError(f"{label}: unbalanced braces; each {{ needs one }} and they do not nest.")
        if character == "." and depth == 0:
            components.append(current)
            current = ""
        else:
            current += character
    if depth != 0:
        raise PatternError(f"{label}: unbalanced braces; a {{ is not closed.")
    components.append(current)
    if any(not component.strip() for component in components):
        raise PatternError(f"{label}: empty name; write a path such as blocks.{{*}}.")
    for component in components:
        if re.search(r"[*?\[\]]", re.sub(r"\{[^}]*\}", "", component)):
            raise PatternError(f"{label}: * and ? stand in braces here; write blocks.{{*}}.")
    return components


def expand(component: str, label: str = "") -> list[str]:
    """The names that one component stands for; a wildcard is kept as a placeholder.

    Raises:
        PatternError: an empty item, or a range that runs backwards.
    """
    label = label or f'"{component}"'
    pieces = [
        [match.group(2)] if match.group(1) is None else _items(match.group(1), label)
        for match in _PIECE.finditer(component)
    ]
    return list(dict.fromkeys("".join(choice) for choice in itertools.product(*pieces)))


def _items(text: str, label: str) -> list[str]:
    numbers: set[int] = set()
    names: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        if item == "*":
            names.append(_ANY)
        elif match := _RANGE.fullmatch(item):
            first, last = int(match.group(1)), int(match.group(2))
            if first > last:
                raise PatternError(f"{label}: the range {item} runs backwards; write {{{last}-{first}}}.")
            if last - first > 100_000:
                raise PatternError(f"{label}: the range {item} is absurdly long.")
            numbers.update(range(first, last + 1))
        elif item.isdecimal():
            numbers.add(int(item))
        elif item and not re.search(r"[*?.\s]", item) and not item.startswith("-"):
            names.append(item)
        else:
            what = f'"{item}"' if item else "an empty item"
            raise PatternError(
                f"{label}: {what} in braces is neither *, a number, a range such as 0-20 nor a name."
            )
    return [str(number) for number in sorted(numbers)] + names


def apply_aliases(pattern: str, aliases: Mapping[str, str], paths: ModulePaths) -> str:
    """Rewrite a pattern that begins with a foreign module path into ours.

    An alias that names real modules of the tree is passed over: nothing real is hidden. `{*}` in an alias
    stands for whatever the pattern has there and is carried over. The longest alias wins.
    """
    components = split_pattern(pattern)
    for alias in sorted(aliases, key=lambda a: -len(a.split("."))):
        foreign = split_pattern(alias)
        if len(foreign) > len(components):
            continue
        carried: list[str] = []
        for theirs, ours in zip(foreign, components, strict=False):
            if theirs == "{*}":
                carried.append(ours)
            elif theirs != ours:
                break
        else:
            if paths.has(alias):
                continue
            own = iter(carried)
            target = [next(own) if part == "{*}" else part for part in split_pattern(aliases[alias])]
            return ".".join([*target, *components[len(foreign) :]])
    return pattern


def _summary(names: Sequence[str]) -> str:
    if all(name.isdecimal() for name in names) and len(names) > 1:
        return f"{names[0]}-{names[-1]}"
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base and name else base or name
