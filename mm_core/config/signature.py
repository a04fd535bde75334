"""Reads which arguments a component's constructor takes, from its source file, without importing anything.

`mm check` must not import torch, so a component that registers no config class is checked by what its source
says: the module's file is found step by step (importing a dotted name would run its parent package), parsed,
and the constructor looked up through re-exports and base classes. What cannot be told this way is
`UnreadableError`, never a guess.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any, TypeAlias

#: Bases whose constructor takes no argument of its own; they are not read.
_BARE_BASES = frozenset(
    {
        "object",
        "abc.ABC",
        "typing.Generic",
        "typing.Protocol",
        "torch.nn.Module",
        "torch.nn.modules.Module",
        "torch.nn.modules.module.Module",
    }
)
#: Decorators that leave the arguments as they are.
_PLAIN_DECORATORS = frozenset({"final", "override", "register_to_config", "runtime_checkable"})
_MAX_STEPS = 24  # re-exports and base classes; more is a circle

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_Found: TypeAlias = tuple["_Module", ast.ClassDef | _Function]


class UnreadableError(Exception):
    """The arguments cannot be told from the source; the message is the reason, a part of a sentence."""


@dataclass(frozen=True)
class Parameter:
    """An argument that can be given by name; `annotation` is as written, empty if there is none."""

    name: str
    required: bool
    annotation: str = ""


@dataclass(frozen=True)
class Signature:
    """The arguments of a callable; `open` if it takes any other name as well (`**kwargs`)."""

    parameters: Mapping[str, Parameter]
    open: bool = False


@dataclass
class _Module:
    """A parsed source file; `bound` is what its top level binds, name -> statements that do."""

    name: str
    is_package: bool
    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)


def read_signature(target: str, method: str = "__init__") -> Signature:
    """Return the arguments of `package.module:Class` (or of a function), `self` left out.

    Args:
        method: the constructor, or a class method such as `from_pretrained`.

    Raises:
        UnreadableError: there is no such source, or it does not tell: a class made at run time, a decorator or a
            metaclass of unknown effect, a base class that cannot be found.
    """
    module, _, path = target.partition(":")
    try:
        found = _lookup([*module.split("."), *path.split(".")], _Steps())
        return _signature(found, method, target)
    except UnreadableError:
        raise
    except SyntaxError as error:
        raise UnreadableError(f"the source of {target} has a syntax error (line {error.lineno})") from error
    except Exception as error:  # finders and loaders of strangers may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnreadableError(f"the source of {target} cannot be read ({text[:200]})") from error


@dataclass
class _Steps:
    """Counts what was followed, and keeps modules parsed."""

    left: int = _MAX_STEPS
    modules: dict[str, _Module] = field(default_factory=dict)

    def take(self, what: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise UnreadableError(f"{what} is defined in a circle")


def _lookup(names: Sequence[str], steps: _Steps) -> _Found:
    """Find what a dotted name means: the longest module, then a name in it."""
    steps.take(".".join(names))
    for cut in range(len(names) - 1, 0, -1):
        module = _parse(".".join(names[:cut]), steps)
        if module is not None:
            return _in_module(module, names[cut:], steps)
    raise UnreadableError(f"there is no source of the module {'.'.join(names[:-1])}")


def _in_module(module: _Module, names: Sequence[str], steps: _Steps) -> _Found:
    statements = module.bound.get(names[0], [])
    where = f"{module.name}.{'.'.join(names)}"
    if len(statements) != 1:
        how = "more than once" if statements else "nowhere that the source shows"
        raise UnreadableError(f"{where} is defined {how}")
    (node,) = statements
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        for name in names[1:]:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            classes = [item for item in inner if isinstance(item, ast.ClassDef) and item.name == name]
            if len(classes) != 1:
                raise UnreadableError(f"{where} is no class in the source")
            node = classes[0]
        return module, node
    meant = _meaning(module, node, names[0])
    if meant is None:
        raise UnreadableError(f"{where} is made when the module is imported")
    return _lookup([*meant, *names[1:]], steps)


def _meaning(module: _Module, node: ast.stmt, name: str) -> list[str] | None:
    """The full name behind an import or a plain `Name = Other`; None if it is anything else."""
    if isinstance(node, ast.ImportFrom):
        source = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
        base = package[: len(package) - node.level + 1] if node.level else []
        return [*base, *(node.module or "").split("."), source] if node.module else [*base, source]
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname == name:
                return alias.name.split(".")
        return [name]
    if isinstance(node, ast.Assign):
        path = _dotted(node.value)
        return _qualified(module, path) if path else None
    return None


def _qualified(module: _Module, path: Sequence[str]) -> list[str]:
    """The full name of what a dotted path in a module's source means."""
    statements = module.bound.get(path[0], [])
    if not statements:
        return list(path) if path[0] == "object" else [*module.name.split("."), *path]
    if len(statements) == 1 and isinstance(statements[0], ast.Import | ast.ImportFrom):
        meant = _meaning(module, statements[0], path[0])
        if meant is not None:
            return [*meant, *path[1:]]
    return [*module.name.split("."), *path]


def _signature(found: _Found, method: str, target: str) -> Signature:
    module, node = found
    if not isinstance(node, ast.ClassDef):
        if method != "__init__":
            raise UnreadableError(f"{target} is a function")
        return _of_function(node, skip=0, where=target)
    function = _method(module, node, method, _Steps())
    if function is None:
        if method != "__init__":
            raise UnreadableError(f"{target} has no {method}")
        return Signature({})
    static = any(_dotted(decorator)[-1:] == ["staticmethod"] for decorator in function.decorator_list)
    return _of_function(function, skip=0 if static else 1, where=f"{target}.{method}")


def _method(module: _Module, cls: ast.ClassDef, method: str, steps: _Steps) -> _Function | None:
    """The method of the class or of its nearest base; None if no base of ours has one."""
    steps.take(f"{module.name}.{cls.name}")
    for decorator in cls.decorator_list:
        if _dotted(decorator)[-1:] not in ([name] for name in _PLAIN_DECORATORS):
            raise UnreadableError(f"{cls.name} is decorated with {ast.unparse(decorator)}")
    for keyword in cls.keywords:
        if keyword.arg != "metaclass" or _dotted(keyword.value)[-1:] != ["ABCMeta"]:
            raise UnreadableError(f"{cls.name} is made with {ast.unparse(keyword)}")
    own = [item for item in cls.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    if method == "__init__" and any(item.name == "__new__" for item in own):
        raise UnreadableError(f"{cls.name} has a __new__ of its own")
    named = [item for item in own if item.name == method]
    if len(named) == 1:
        return named[0]
    if named or method in _assigned(cls.body):
        raise UnreadableError(f"{cls.name}.{method} is made when the class is")
    for base in cls.bases:
        path = _dotted(base.value if isinstance(base, ast.Subscript) else base)
        if not path:
            raise UnreadableError(f"{cls.name} has the base {ast.unparse(base)}")
        full = _qualified(module, path)
        if ".".join(full) in _BARE_BASES:
            continue
        owner, node = _lookup(full, steps)
        if not isinstance(node, ast.ClassDef):
            raise UnreadableError(f"{cls.name} has the base {ast.unparse(base)}, which is no class")
        inherited = _method(owner, node, method, steps)
        if inherited is not None:
            return inherited
    return None


def _of_function(function: _Function, *, skip: int, where: str) -> Signature:
    for decorator in function.decorator_list:
        if _dotted(decorator)[-1:] not in (
            [name] for name in (*_PLAIN_DECORATORS, "staticmethod", "classmethod")
        ):
            raise UnreadableError(f"{where} is decorated with {ast.unparse(decorator)}")
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(positional) - len(arguments.defaults)
    parameters: dict[str, Parameter] = {}
    for index, argument in enumerate(positional):
        required = index < optional
        if index < skip:
            continue
        if index < len(arguments.posonlyargs):
            if required:
                raise UnreadableError(f"{where} takes {argument.arg} by position only")
            continue
        parameters[argument.arg] = Parameter(argument.arg, required, _annotation(argument))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[argument.arg] = Parameter(argument.arg, default is None, _annotation(argument))
    return Signature(parameters, arguments.kwarg is not None)


def _annotation(argument: ast.arg) -> str:
    node = argument.annotation
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node) if node is not None else ""


def _dotted(node: ast.expr) -> list[str]:
    """`["nn", "Module"]` of the expression `nn.Module`; empty if it is anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _assigned(body: Sequence[ast.stmt]) -> set[str]:
    targets = (target for item in body if isinstance(item, ast.Assign) for target in item.targets)
    return {target.id for target in targets if isinstance(target, ast.Name)}


# Source files


def _parse(name: str, steps: _Steps) -> _Module | None:
    if name in steps.modules:
        return steps.modules[name]
    spec = find_module(name)
    if spec is None:
        return None
    get_source: Any = getattr(spec.loader, "get_source", None)
    source = get_source(name) if get_source is not None else None
    if source is None:
        return None  # a namespace package or an extension module
    module = _Module(name, spec.submodule_search_locations is not None)
    for bound, statement in _bindings(ast.parse(source).body):
        module.bound.setdefault(bound, []).append(statement)
    steps.modules[name] = module
    return module


def find_module(name: str) -> ModuleSpec | None:
    """Ask the import system where a module is, parents first, without importing one of them; None if there is
    no such module.
    """
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        if count > 1 and path is None:
            return None  # the parent is no package
        part = ".".join(parts[:count])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next((found for find in finders if find is not None and (found := find(part, path))), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield each name that a module's top level binds, with the statement; branches are looked into."""
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name, node
            case ast.Import():
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], node
            case ast.ImportFrom():
                for alias in node.names:
                    yield alias.asname or alias.name, node
            case ast.Assign():
                for target in node.targets:
                    for inner in ast.walk(target):
                        if isinstance(inner, ast.Name):
                            yield inner.id, node
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                yield from _bindings(list(_branches(node)))


def _branches(node: ast.stmt) -> Iterator[ast.stmt]:
    for name in ("body", "orelse", "finalbody"):
        yield from getattr(node, name, [])
    for handler in getattr(node, "handlers", []):
        yield from handler.body
