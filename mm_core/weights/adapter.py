"""Weights adapters: how a published folder names the tensors of a component, and what its config.json says.

A plugin registers one under `mm_core.weights` as `role/id`; without one, a folder's keys are the module's own.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mm_core.weights.errors import WeightsError
from mm_registry import PluginManager, UserError, default_manager
from mm_registry.words import described, shown

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.weights.recipe import Recipe

GROUP = "mm_core.weights"
_RESERVED = "__metadata__"  # by the format of safetensors
_METHODS = ("to_module", "to_folder", "config_to_folder", "config_problems")


@runtime_checkable
class StateDictAdapter(Protocol):
    """What `mm_core.weights` entries are, or return when they are called with the section's fields.

    Keys are renamed one to one; tensors are copied as they are. An adapter of a model whose folders keep tensors
    otherwise than the model (one per expert, on their side, several in one) has two more methods, `ConvertsLayout`'s.
    """

    def to_module(self, key: str) -> str:
        """Return the module's name of a tensor that the folder calls `key`."""
        ...

    def to_folder(self, key: str) -> str:
        """Return the folder's name of a tensor that the module calls `key`; the inverse of `to_module`."""
        ...

    def config_to_folder(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config.json to write beside the weights of a component with these fields."""
        ...

    def config_problems(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        """Say what a folder's config.json describes otherwise than the section's fields; nothing if they
        agree.
        """
        ...


@runtime_checkable
class ConvertsLayout(Protocol):
    """What an adapter may have besides, for tensors that are more than renamed.

    Both methods get all tensors and answer only for those that need it; the rest is renamed.
    """

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Recipe]:
        """Return the module's name of a tensor -> how it is made of the folder's, whose shapes are given."""
        ...

    def folder_layout(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Recipe]:
        """Return the folder's name of a tensor -> how it is made of the module's; the inverse of `layout`."""
        ...


@runtime_checkable
class ReadsForeign(Protocol):
    """What an adapter may have besides, for checkpoints that other software wrote."""

    def from_foreign(self, keys: Iterable[str]) -> Mapping[str, str]:
        """Return the checkpoint's name of a tensor -> the module's; names that it does not know stay."""
        ...


def find_adapter(
    component: ComponentConfig, *, manager: PluginManager | None = None
) -> StateDictAdapter | None:
    """Return the adapter that is registered for a component, or None.

    Raises:
        WeightsError: what is registered is no adapter, or making it from the section's fields failed.
        RegistryError: it is ambiguous, unavailable or broken.
    """
    manager = manager or default_manager()
    name = f"{component.role}/{component.spec.id}"
    spec = manager.find(GROUP, name, component.spec.distribution)
    if spec is None:
        return None
    found: Any = manager.load(spec)
    label = f"the weights adapter {name!r} of {spec.provider} ({spec.target})"
    # An instance may be callable too; a class has the methods, but needs to be called first.
    is_class = isinstance(found, type)
    if callable(found) and (is_class or not isinstance(found, StateDictAdapter)):
        try:
            found = found(dict(component.fields))
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # what exits would end the job, and with its code
            raise WeightsError(
                f"{label} cannot be made from the section's fields: {described(error)}; "
                "it is called with one mapping"
            ) from error
    missing = [method for method in _METHODS if not _has(found, method)]
    if missing:
        raise WeightsError(
            f"{label} is no StateDictAdapter: {type(found).__name__} has no {', '.join(missing)}; "
            "see mm_core.weights.StateDictAdapter"
        )
    adapter: StateDictAdapter = found
    return adapter


def _has(found: object, method: str) -> bool:
    try:
        return callable(getattr(found, method, None))
    except Exception:  # noqa: BLE001 - its own __getattr__
        return False


def problems_of(adapter: StateDictAdapter, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Return what the adapter says that a folder's config.json describes otherwise than the section.

    Raises:
        WeightsError: the adapter fails, or returns no list of texts.
    """
    label = f"{type(adapter).__name__}.config_problems"
    try:
        found = adapter.config_problems(config, dict(fields))
    except (Exception, SystemExit) as error:
        raise WeightsError(f"{label} failed: {described(error)}") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise WeightsError(f"{label} returned {shown(found)}; it must return a list of texts")
    return found


def renamed(
    adapter: StateDictAdapter | None, keys: Mapping[str, Any], *, to_folder: bool = False
) -> dict[str, str]:
    """Return key -> new name, for all keys of a folder (or of a module, with `to_folder`).

    Raises:
        WeightsError: the adapter fails, returns no name, or gives two keys one name.
    """
    if adapter is None:
        return {key: key for key in keys}
    rename, method = (adapter.to_folder, "to_folder") if to_folder else (adapter.to_module, "to_module")
    label = f"{type(adapter).__name__}.{method}"
    names: dict[str, str] = {}
    owner: dict[str, str] = {}
    for key in keys:
        try:
            name = rename(key)
        except (Exception, SystemExit) as error:
            raise WeightsError(f"{label}({key!r}) failed: {described(error)}") from error
        if not isinstance(name, str) or not name or not name.isprintable() or name == _RESERVED:
            raise WeightsError(f"{label}({key!r}) returned {name!r}; it must return the name of a tensor")
        if name in owner:
            raise WeightsError(
                f"{label} gives {owner[name]!r} and {key!r} one name, {name!r}; "
                "a weights adapter renames one to one"
            )
        names[key], owner[name] = name, key
    return names
