"""Patterns that name modules, resolved against the paths of a module tree. This module imports no torch.

A pattern is a dotted path. Braces stand for several children of one module:

- `blocks.{*}`: every child of `blocks`;
- `blocks.{0-20,25,30-40}`: numbered children; ranges include both ends;
- `towers.{text,vision}.layers.{*}`: named children (of a `ModuleDict`, say); any number of braces;
- `layer_{0-3}`: braces may be part of a name;
- `blocks.*.attn?`: outside braces `*` stands for any characters within one name, and `?` for one, as long as reading
  them across dots would name the same modules.

The name of a class, `package.module.ClassName` or `ClassName`, stands for all modules of exactly that class.

Every item must match: a pattern is written by someone who believes that the modules exist.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mm_core.config.patterns import (
    ANY,
    ONE,
    STAR,
    PatternSyntaxError,
    is_class_path,
    names_of,
    split_names,
)
from mm_registry.errors import UserError


class PlanError(UserError):
    """A policy, fsdp2.yaml and a model do not fit together.

    Attributes:
        problem, suggestion: the two parts of the message; the second may be empty.
        field, pattern: of fsdp2.yaml, where a field of it is to blame, and the pattern as it is written there,
            where it is one pattern; else None.
    """

    def __init__(self, problem: str, suggestion: str = "") -> None:
        super().__init__(f"{problem} {suggestion}" if suggestion else problem)
        self.problem = problem
        self.suggestion = suggestion
        self.field: str | None = None
        self.pattern: str | None = None


class PatternError(PlanError):
    """A pattern is malformed, or does not fit the model."""


class CombinedPlanError(PlanError):
    """Several of them, in `errors`."""

    def __init__(self, errors: Iterable[PlanError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


@contextmanager
def blaming(field: str | None, pattern: str | None = None) -> Iterator[None]:
    """Tell an error that leaves the block which field and pattern of fsdp2.yaml it is about, if it is about one."""
    try:
        yield
    except PlanError as error:
        if error.field is None and not isinstance(error, CombinedPlanError):
            error.field, error.pattern = field, pattern
        raise


@dataclass
class _Block:
    found: bool = False


class Problems:
    """Collects errors, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[PlanError] = []

    @contextmanager
    def of(self, field: str | None = None, pattern: str | None = None) -> Iterator[_Block]:
        """Keep an error that leaves the block, which is about this field and pattern of fsdp2.yaml.

        Yields:
            Whether there was one, in `found` after the block.
        """
        block = _Block()
        try:
            with blaming(field, pattern):
                yield block
        except PlanError as error:
            block.found = True
            kept = error.errors if isinstance(error, CombinedPlanError) else [error]
            # A traceback would keep what the frames held, such as all names of a long range.
            self.errors += [one.with_traceback(None) for one in kept]

    def raise_any(self) -> None:
        """Raise what was collected: the error if there is one, or `CombinedPlanError`."""
        unique = list({str(error): error for error in self.errors}.values())
        if len(unique) == 1:
            raise unique[0]
        if unique:
            raise CombinedPlanError(unique)


class ModulePaths:
    """The paths of a module tree, `""` for its root, and how to find some of them by pattern.

    Args:
        paths: dotted paths in registration order, as `named_modules()` gives them.
        classes: path -> full name of the module's class (`torch.nn.modules.linear.Linear`), for patterns that
            name classes.
    """

    def __init__(self, paths: Iterable[str], classes: Mapping[str, str] | None = None) -> None:
        self._children: dict[str, list[str]] = {"": []}
        self._classes = dict(classes or {})
        for path in paths:
            if path:
                parent, _, name = path.rpartition(".")
                self._children.setdefault(parent, []).append(name)
                self._children.setdefault(path, [])

    @classmethod
    def of(cls, modules: Mapping[str, object]) -> ModulePaths:
        """Those of a tree's modules by path, as `dict(root.named_modules())` gives them."""
        return cls(modules, {path: class_name(type(module)) for path, module in modules.items()})

    def __contains__(self, path: str) -> bool:
        return path in self._children

    def children(self, path: str) -> Sequence[str]:
        """Names of the direct children of the module at `path`."""
        return self._children[path]

    def match(self, pattern: str, *, where: str = "", prefix: str = "") -> list[str]:
        """The paths that a pattern names: registration order for `{*}`, `*` and classes, ascending for numbers, no
        path twice.

        Args:
            where: what to call the pattern's place in messages, such as `sub_modules_to_wrap`.
            prefix: what users write before paths of this tree (`predictor`), for messages.

        Raises:
            PatternError: malformed, ambiguous, or some part of it matches no module; the message has the closest
                paths.
        """
        label = f'{where}: "{_join(prefix, pattern)}"' if where else f'"{_join(prefix, pattern)}"'
        parts = split_pattern(pattern, label)
        of_class = self._instances(pattern, label) if is_class_path(pattern) else []
        if of_class and parts[0] not in self._children[""]:
            return of_class
        found = [""]
        for i, part in enumerate(parts):
            names, rest = expand(part, label), parts[i + 1 :]
            found = [path for base in found for path in self._step(base, names, rest, label, prefix)]
        found = list(dict.fromkeys(found))
        if of_class and set(of_class) != set(found):
            raise PatternError(
                f"{label} is ambiguous: it is the path of a module, and the name of a class of others "
                f"({_shown(of_class, prefix)}).",
                f"Write the class in full: {self._classes[of_class[0]]}.",
            )
        self._check_readings(parts, found, label, prefix)
        return found

    def has(self, pattern: str) -> bool:
        """Whether a well-formed pattern names something."""
        try:
            return bool(self.match(pattern))
        except PatternError:
            return False

    def has_class(self, pattern: str) -> bool:
        """Whether a pattern is the name of a class of the tree, in full or without its module."""
        return is_class_path(pattern) and any(_is_named(name, pattern) for name in self._classes.values())

    def closest(self, path: str, prefix: str = "", count: int = 3) -> list[str]:
        """Paths nearest to a wrong one, best first, each with the prefix."""
        near = difflib.get_close_matches(path, [p for p in self._children if p], n=count, cutoff=0.5)
        return [_join(prefix, p) for p in near]

    def closest_classes(self, name: str, count: int = 2) -> list[str]:
        """Full names of classes of the tree whose own names are nearest to that of a wrong one."""
        own = {full.rpartition(".")[2]: full for full in self._classes.values()}
        return [own[n] for n in difflib.get_close_matches(name.rpartition(".")[2], own, n=count, cutoff=0.6)]

    def _instances(self, pattern: str, label: str) -> list[str]:
        """The modules of the class that a pattern names; none if there is no such class."""
        pattern = pattern.strip()
        found = [path for path, name in self._classes.items() if _is_named(name, pattern)]
        classes = sorted({self._classes[path] for path in found})
        if len(classes) > 1:
            raise PatternError(
                f"{label} is ambiguous: {len(classes)} classes of this model have that name.",
                f"Write one of {', '.join(classes[:3])}.",
            )
        return found

    def _step(
        self, base: str, names: Sequence[str], rest: Sequence[str], label: str, prefix: str
    ) -> list[str]:
        children = self._children[base]
        found: list[str] = []
        for name in names:
            wanted = _regex(name, any_character="[^.]")
            matching = [child for child in children if wanted.fullmatch(child)]
            if not matching:
                raise self._no_match(base, name, rest, label, prefix)
            found += [_join(base, child) for child in matching]
        return found

    def _check_readings(self, parts: Sequence[str], found: Sequence[str], label: str, prefix: str) -> None:
        """Refuse a `*` or `?` that names other modules when it is read across dots, as MindSpeed's newer stack does."""
        expanded = [names_of(part) for part in parts]
        if not any(STAR in name or ONE in name for names in expanded for name in names):
            return
        text = r"\.".join(
            "(?:" + "|".join(_regex(name, any_character=".").pattern for name in names) + ")"
            for names in expanded
        )
        across = [path for path in self._children if path and re.fullmatch(text, path)]
        more = [path for path in across if path not in set(found)]
        if more:
            better = ".".join(re.sub(r"(?<!\{)\*(?!\})", "{*}", part) for part in parts)
            raise PatternError(
                f"{label} is ambiguous: within one name it means {_shown(found, prefix)}, and across dots "
                f"{_shown(more, prefix)} as well.",
                f"Write {_join(prefix, better)} for the first.",
            )

    def _no_match(self, base: str, name: str, rest: Sequence[str], label: str, prefix: str) -> PatternError:
        children = self._children[base]
        shown = _written(name)
        place = f'"{_join(prefix, base)}"' if _join(prefix, base) else "the model"
        if not children:
            return PatternError(f"{label} matches no module: {place} has no submodules.")
        # A wrong name deep in the tree is often a right one at another depth, so whole paths are compared as
        # well.
        near = difflib.get_close_matches(shown, children, n=2, cutoff=0.5)
        whole = [".".join([_join(base, child), *rest]) for child in near]
        suggestions = [_join(prefix, pattern) for pattern in whole if rest and self.has(pattern)]
        suggestions += [_join(prefix, _join(base, child)) for child in near]
        suggestions += [p for p in self.closest(_join(base, shown), prefix) if p not in suggestions]
        if not base and is_class_path(shown):
            suggestions = [*self.closest_classes(shown), *suggestions]
        mend = f"Closest: {', '.join(suggestions[:3])}." if suggestions else ""
        return PatternError(
            f'{label} matches no module: {place} has no "{shown}", only {_summary(children)}.', mend
        )


def class_name(cls: type) -> str:
    """The full name of a class, as a pattern has it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def split_pattern(pattern: str, label: str = "") -> list[str]:
    """Split a pattern at the dots outside braces.

    Raises:
        PatternError: malformed.
    """
    try:
        return split_names(pattern)
    except PatternSyntaxError as error:
        raise _malformed(error, label or f'"{pattern}"') from error


def expand(part: str, label: str = "") -> list[str]:
    """The names that one part of a pattern stands for; wildcards are kept as placeholders.

    Raises:
        PatternError: malformed.
    """
    try:
        return names_of(part)
    except PatternSyntaxError as error:
        raise _malformed(error, label or f'"{part}"') from error


def _malformed(error: PatternSyntaxError, label: str) -> PatternError:
    return PatternError(f"{label}: {error}.")


def _regex(name: str, any_character: str) -> re.Pattern[str]:
    """An expanded name as a regular expression; `{*}` stays within one name always."""
    placeholders = {ANY: "[^.]+", STAR: f"{any_character}*", ONE: any_character}
    return re.compile("".join(placeholders.get(character) or re.escape(character) for character in name))


def _written(name: str) -> str:
    return name.replace(ANY, "{*}").replace(STAR, "*").replace(ONE, "?")


def _is_named(full: str, pattern: str) -> bool:
    return full == pattern.strip() or full.rpartition(".")[2] == pattern.strip()


def apply_aliases(pattern: str, aliases: Mapping[str, str], paths: ModulePaths) -> str:
    """Rewrite a pattern that begins with a foreign module path into ours.

    An alias that names real modules of the tree is passed over: nothing real is hidden. `{*}` in an alias
    stands for whatever the pattern has there and is carried over. The longest alias wins. An alias may be the
    name of a foreign class.
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
            target = [next(own, part) if part == "{*}" else part for part in split_pattern(aliases[alias])]
            return ".".join([*target, *components[len(foreign) :]])
    return pattern


def _shown(paths: Sequence[str], prefix: str) -> str:
    return ", ".join(_join(prefix, path) for path in paths[:2]) + (", …" if len(paths) > 2 else "")


def _summary(names: Sequence[str]) -> str:
    if all(name.isdecimal() for name in names) and len(names) > 1:
        return f"{names[0]}-{names[-1]}"
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base and name else base or name
