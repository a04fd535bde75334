"""A mapping from ids to what plugins offer, which imports a plugin only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast, overload

from mm_registry.errors import UnknownIdError
from mm_registry.manager import PluginManager, default_manager
from mm_registry.spec import EntrySpec

T_co = TypeVar("T_co", covariant=True)
Obj = TypeVar("Obj")


class Registry(Mapping[str, T_co]):
    """The ids of one entry-point group, as a mapping.

    `in`, `len`, `iter`, `bool`, `repr` and `specs()` read metadata and import nothing; `registry[id]` imports
    that one target, once (`values()` and `items()` import what they yield). `id` may be written
    `distribution/id`, or be an old id that a plugin still knows (a warning is logged, once); iteration gives
    plain, present ids.

    Every id that an installed distribution claims is a key, usable or not. Asking for an unusable one raises
    the error that says why (`AmbiguousIdError`, `UnavailablePluginError`, `BrokenPluginError`); none of these
    is a `KeyError`, so `.get(id)` hides only ids that nobody offers (`UnknownIdError`).

    Two registries are equal if they are the same object: comparing contents would import every plugin.

    Args:
        group: `"mm_core.predictor_models"`, see `mm_registry.GROUPS`.
        manager: where to look; None means `default_manager()` at each question.
    """

    def __init__(self, group: str, manager: PluginManager | None = None) -> None:
        self.group = group
        self._manager = manager

    @property
    def manager(self) -> PluginManager:
        return default_manager() if self._manager is None else self._manager

    def __getitem__(self, id: str) -> T_co:
        spec = self.spec(id)
        if spec.id != id:  # asked as distribution/id, or by an old id, which is worth a word
            self._say_old_id(id)
        return cast(T_co, self.manager.load(spec))

    def __iter__(self) -> Iterator[str]:
        return iter(self.manager.ids(self.group))

    def __len__(self) -> int:
        return len(self.manager.ids(self.group))

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.manager.offers(self.group, id)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Registry {self.group}: {', '.join(self) or 'empty'}>"

    def specs(self) -> tuple[EntrySpec, ...]:
        """Return the entries with their provenance, by id, then distribution."""
        return self.manager.specs(self.group)

    def spec(self, id: str) -> EntrySpec:
        """Return the entry that `registry[id]` would import; raises as `registry[id]` does, short of
        importing.
        """
        if not isinstance(id, str):
            raise UnknownIdError(
                f"an id is a string, not {type(id).__name__}", group=self.group, id=repr(id)[:60]
            )
        return self.manager.resolve(self.group, id)

    @overload
    def register(self, id: str, obj: None = None, *, replace: bool = False) -> Callable[[Obj], Obj]: ...
    @overload
    def register(self, id: str, obj: Obj, *, replace: bool = False) -> Obj: ...
    def register(
        self, id: str, obj: Obj | None = None, *, replace: bool = False
    ) -> Obj | Callable[[Obj], Obj]:
        """Offer an object of the running program as `id`: `register("mine", Mine)`, or `@register("mine")`
        above a class.

        It is one more claim, by a distribution called "runtime": if an installed one offers the id too,
        asking for it is ambiguous, unless `replace` is set. Other processes do not see it.

        Raises:
            RegistryError: the program registered another object as `id` before, the id is malformed, or the
                registry is frozen.
        """
        if obj is not None:
            self.manager.register(self.group, id, obj, replace=replace)
            return obj

        def decorate(decorated: Obj) -> Obj:
            self.manager.register(self.group, id, decorated, replace=replace)
            return decorated

        return decorate

    @contextmanager
    def temporary(self) -> Iterator[Registry[T_co]]:
        """Undo, at the end of the block, what was registered or frozen in it. For one thread at a time."""
        with self.manager.temporary(self.group):
            yield self

    def freeze(self) -> None:
        """Refuse from now on to register anything in this registry; `PluginManager.freeze` does so for all."""
        self.manager.freeze(self.group)

    def _say_old_id(self, id: str) -> None:
        manager = self.manager
        new = manager.alias(self.group, id)
        if new is not None and (self.group, id) not in manager.warned_of:
            import logging

            manager.warned_of.add((self.group, id))
            logging.getLogger(__name__).warning(
                "%r is an old id in %s; write %r instead", id, self.group, new
            )
