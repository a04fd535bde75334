"""Which checks apply to what, and one of them run."""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mm_core.testing.case import Case, Plugin
from mm_core.testing.check import CHECKS, Check, CheckCrashed, CheckFailed, CheckSkipped, load_checks
from mm_core.testing.example import Example
from mm_core.testing.prerequisites import cause
from mm_core.testing.result import Outcome, Result
from mm_registry.errors import RegistryError, UserError
from mm_registry.groups import ROLES
from mm_registry.loading import without_hint
from mm_registry.manager import PluginManager
from mm_registry.spec import EntrySpec, canonical_name
from mm_registry.suggestions import closest

STOPS = (Outcome.FAILED, Outcome.CRASHED)
"""Outcomes after which checks that need this one are not tried. A failure that is declared does not stop them."""
_ROLE_OF_GROUP = {group.name: role for role, group in ROLES.items()}


def find_plugin(distribution: str, manager: PluginManager, folder: Path) -> Plugin:
    """Return the installed plugin of that name.

    Raises:
        UserError: it is not installed, or declares nothing of ours.
    """
    record = manager.record(distribution)
    if record is None:
        names = [found.name for found in manager.distributions()]
        unreadable = [
            said.message
            for said in manager.discover().diagnostics
            if said.level == "error" and canonical_name(said.distribution) == canonical_name(distribution)
        ]
        if unreadable:
            raise UserError(unreadable[0])
        if manager.version(distribution) is not None:
            problem = f"the distribution {distribution!r} declares no entry point of MM Zoo"
        else:
            problem = f"the distribution {distribution!r} is not installed"
        near = closest(distribution, names, 1)
        mend = f"did you mean {near[0]!r}?" if near else f"plugins that are: {', '.join(names) or 'none'}"
        raise UserError(f"{problem}; {mend}")
    return Plugin(manager, record, folder)


def selected_checks(only: Collection[str] | None, stages: Collection[str] | None) -> list[Check]:
    """Return the checks of these names and stages, in order; None means all.

    Raises:
        UserError: there is no check, or no stage, of that name.
    """
    checks = load_checks()
    known_stages = dict.fromkeys(check.stage for check in checks.values())
    for what, written, known in (("check", only, list(checks)), ("stage", stages, list(known_stages))):
        for name in written or ():
            if name not in known:
                near = closest(name, known, 1)
                listed = ", ".join(known) if what == "stage" else "listed in docs/conformance.md"
                mend = f"did you mean {near[0]!r}?" if near else f"they are {listed}"
                raise UserError(f"the conformance kit has no {what} {name!r}; {mend}")
    return [
        check
        for check in checks.values()
        if (only is None or check.name in only) and (stages is None or check.stage in stages)
    ]


def make_case(plugin: Plugin, spec: EntrySpec, folder: Path, *, with_example: bool = True) -> Case:
    """Return the case of one component.

    Args:
        folder: for files of checks; made and removed around each check.
        with_example: whether its example is imported. One that cannot be counts as none; `example-is-valid` says so.
    """
    case = Case(plugin.manager, spec, _ROLE_OF_GROUP[spec.group], spec.id, None, folder, plugin)
    example: Example | None = None
    if with_example:
        with contextlib.suppress(CheckFailed, RegistryError):
            example = load_example(case)
    return replace(case, example=example)


def load_example(case: Case) -> Example | None:
    """Return the example that the plugin declares for a component; None if it declares none.

    Raises:
        CheckFailed: what it declares is no example.
        RegistryError: it cannot be imported.
    """
    spec = case.example_spec
    if spec is None:
        return None
    case.plugin.must_not_crash(spec)
    found = case.manager.load(spec)
    if callable(found) and not isinstance(found, Example):
        try:
            found = found()
        except Exception as error:
            raise CheckFailed(f"{spec.target} raised {_told(error)}", traceback.format_exc()) from error
    if not isinstance(found, Example):
        raise CheckFailed(f"{spec.target} is a {type(found).__name__}, not a mm_core.testing.Example")
    return found


def subjects(plugin: Plugin, folder: Path, *, with_examples: bool = True) -> Iterator[Case | Plugin]:
    """Yield the plugin as a whole, then its components."""
    yield plugin
    for number, spec in enumerate(plugin.components):
        yield make_case(plugin, spec, folder / f"case-{number}", with_example=with_examples)


def pairs(checks: Sequence[Check], subject: Case | Plugin) -> list[Check]:
    """The checks that apply to a subject, in order."""
    return [check for check in checks if check.applies_to(subject)]


def run_check(check: Check, subject: Case | Plugin, failed: Mapping[str, Outcome] | None = None) -> Result:
    """Run one check and return how it ended; whatever the plugin raises is an outcome.

    Args:
        failed: checks of this subject that failed or crashed -> which of the two. What can only fail for their reason
            is skipped.
    """
    why = cause(check, CHECKS, failed or {})
    if failed and why is not None:
        return Result(check.name, subject.subject, Outcome.SKIPPED, f"not tried, because {why} {failed[why]}")
    start = time.perf_counter()
    status, message, detail = _outcome(check, subject)
    message = without_hint(message, subject.distribution)
    seconds = time.perf_counter() - start
    example = subject.example if isinstance(subject, Case) else None
    expected = example.known_failures.get(check.name) if example is not None else None
    return with_expectation(Result(check.name, subject.subject, status, message, seconds, detail), expected)


def run_checks(checks: Sequence[Check], plugin: Plugin, folder: Path, *, with_examples: bool) -> list[Result]:
    """Run checks in this process, on a plugin and its components, in order."""
    results: list[Result] = []
    for subject in subjects(plugin, folder, with_examples=with_examples):
        failed = stopped(results, subject)
        for check in pairs(checks, subject):
            result = run_check(check, subject, failed)
            results.append(result)
            if result.status in STOPS:
                failed[check.name] = result.status
    return results


def stopped(results: Iterable[Result], subject: Case | Plugin) -> dict[str, Outcome]:
    """Return what failed of a subject, or of the plugin that it belongs to, and how."""
    whole = subject.plugin.subject if isinstance(subject, Case) else subject.subject
    return {
        result.check: result.status
        for result in results
        if result.status in STOPS and result.subject in (subject.subject, whole)
    }


def with_expectation(result: Result, expected: str | None) -> Result:
    """Return the result in the light of a declared failure, `expected` being its reason."""
    fields = (result.check, result.subject)
    if expected is None or result.status is Outcome.SKIPPED:
        return result
    if result.status is Outcome.PASSED:
        message = f"it passes, but its example declares that it fails ({expected}); remove the declaration"
        return Result(*fields, Outcome.UNEXPECTED_PASS, message, result.seconds)
    return Result(
        *fields, Outcome.KNOWN_FAILURE, f"{expected} ({result.message})", result.seconds, result.detail
    )


def _outcome(check: Check, subject: Case | Plugin) -> tuple[Outcome, str, str]:
    folder = subject.folder if isinstance(subject, Case) else None
    if folder is not None:
        folder.mkdir(parents=True)
    try:
        check.function(subject)
    except CheckFailed as failure:
        status = Outcome.CRASHED if isinstance(failure, CheckCrashed) else Outcome.FAILED
        return status, str(failure), failure.detail
    except CheckSkipped as skip:
        return Outcome.SKIPPED, str(skip), ""
    except UserError as error:
        return (
            Outcome.FAILED,
            str(error),
            "".join(traceback.format_exception(error)) if error.__cause__ else "",
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything; it is a result
        return Outcome.FAILED, f"raised {_told(error)}", traceback.format_exc()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return Outcome.PASSED, "", ""


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    told = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    return "; ".join([told, *getattr(error, "__notes__", ())])
