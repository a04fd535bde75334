"""Imports the target of an entry, and tells what is wrong when that fails."""

from __future__ import annotations

import importlib
import sys

from mm_registry.errors import BrokenPluginError
from mm_registry.groups import GROUPS
from mm_registry.spec import EntrySpec, Status
from mm_registry.suggestions import closest
from mm_registry.words import described


class Imports:
    """What was imported, and what failed to be: each target is tried once."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str, str], object] = {}
        self._failures: dict[tuple[str, str, str], BrokenPluginError] = {}

    def load(self, spec: EntrySpec) -> object:
        """Return the object that an entry's target is.

        Raises:
            BrokenPluginError: it cannot be imported. A second call says the same without trying again.
        """
        self.refuse_failed(spec)
        if spec.key not in self._objects:
            # Not under a lock: a module that registers something at its top holds its import lock.
            try:
                found = import_target(spec)
            except BrokenPluginError as error:
                if not _half_imported(spec):
                    self._failures[spec.key] = error
                raise
            self._objects.setdefault(spec.key, found)
        return self._objects[spec.key]

    def refuse_failed(self, spec: EntrySpec) -> None:
        """Raise what an earlier import of the entry raised."""
        failure = self._failures.get(spec.key)
        if failure is not None:
            raise BrokenPluginError(failure.message, failure.spec) from failure.__cause__

    def failed(self, spec: EntrySpec) -> EntrySpec | None:
        """Return the entry as `broken` if its import failed, else None."""
        failure = self._failures.get(spec.key)
        return failure.spec if failure is not None else None


def _half_imported(spec: EntrySpec) -> bool:
    """Whether the target's module is being imported, by this thread or another: what is not there yet may come."""
    module = sys.modules.get(spec.target.partition(":")[0])
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def import_target(spec: EntrySpec) -> object:
    """Import `spec.target` and return the object.

    Raises:
        BrokenPluginError: the target's module or object does not exist, a module that it needs is missing, or
            its import raised (`SystemExit` counts); `__cause__` is what Python raised.
    """
    module_name, _, attributes = spec.target.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise broken(
            spec, _why_import_failed(spec, module_name, error), mend=_see(spec.distribution)
        ) from error
    for attribute in attributes.split(".") if attributes else ():
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            if _half_imported(spec):
                reason = f"its target {spec.target} was asked for while its module is still being imported"
                raise broken(spec, f"{reason}; ask for it later, not at the top of a module") from error
            near = closest(attribute, _public_names(found), 1)
            mend = f"; did it mean {near[0]!r}?" if near else ""
            reason = f"its target {spec.target} is missing: {_name_of(found)} has no {attribute!r}{mend}"
            raise broken(spec, reason, mend=_see(spec.distribution)) from error
        except (
            Exception,
            SystemExit,
        ) as error:  # a module's own __getattr__ imports lazily, so it fails in the same ways
            raise broken(
                spec, _why_import_failed(spec, module_name, error), mend=_see(spec.distribution)
            ) from error
    return found


def broken(spec: EntrySpec, reason: str, *, mend: str = "") -> BrokenPluginError:
    """The error for an entry that exists and cannot be used, `reason` being its second half; `mend` is where to
    learn more.
    """
    reason = f"{reason}; {mend}" if mend else reason
    message = f"the {GROUPS[spec.group].noun} {spec.id!r} of {spec.provider} is broken: {reason}"
    return BrokenPluginError(message, spec._replace(status=Status.BROKEN, detail=reason))


def _why_import_failed(spec: EntrySpec, module: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        if f"{module}.".startswith(f"{error.name}."):
            return (
                f"its target {spec.target} is missing: there is no module {error.name!r}; "
                f"reinstall {spec.distribution}, or report it to its authors"
            )
        top = module.partition(".")[0]
        if f"{error.name}.".startswith(f"{top}."):
            return (
                f"its target {spec.target} needs its own module {error.name!r}, which is missing; "
                f"reinstall {spec.distribution}"
            )
        return (
            f"its target {spec.target} needs the module {error.name!r}, which is not installed; "
            "install the distribution that provides it, into this environment"
        )
    return f"importing its target {spec.target} raised {described(error)}{_place(error)}"


def _see(distribution: str) -> str:
    return f"run `mm plugin check {distribution} --import` for the traceback"


def without_hint(message: str, distribution: str) -> str:
    """Return a message without the advice to run `mm plugin check`: for those who read it in the output of just that."""
    return message.replace(f"; {_see(distribution)}", "")


def _place(error: BaseException) -> str:
    """Where it was raised, unless the message of a SyntaxError says so already."""
    if isinstance(error, SyntaxError):
        return ""
    import traceback  # only failures need it

    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _public_names(found: object) -> list[str]:
    try:
        return [name for name in dir(found) if name[:1] != "_"]
    except Exception:  # noqa: BLE001 - a module's own __dir__; the names are only a suggestion
        return []


def _name_of(found: object) -> str:
    name = getattr(found, "__name__", None)
    return str(name) if name else type(found).__name__
