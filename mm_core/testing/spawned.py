"""What a process started by `multiprocessing` with "spawn" makes of a plugin's ids."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from mm_core.testing.survey import LIGHT_GROUPS, TIME_LIMIT
from mm_registry.groups import HOOKS, ROLES
from mm_registry.spec import EntrySpec

if TYPE_CHECKING:
    from mm_core.testing.case import Plugin


def resolved_in_a_worker(plugin: Plugin) -> dict[str, str | None]:
    """Return subject (`predictor/wandit`) -> what is wrong with it in a spawned process; None if nothing is."""
    specs = [
        *plugin.components,
        *(spec for group in LIGHT_GROUPS if group != HOOKS for spec in plugin.specs(group)),
    ]
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(specs, writer), daemon=True)
    process.start()
    writer.close()
    try:
        if not reader.poll(TIME_LIMIT):
            return {}
        answers: dict[str, str | None] = reader.recv()
        return answers
    except EOFError:
        process.join(TIME_LIMIT)
        ended = f"it ended with exit code {process.exitcode}"
        return {subject: ended for spec in specs if (subject := _subject(spec)) is not None}
    finally:
        process.kill()
        process.join()
        reader.close()


def _answer(specs: list[EntrySpec], pipe: Connection) -> None:
    """Runs in the worker."""
    from mm_registry import RegistryError, default_manager

    answers: dict[str, str | None] = {}
    for spec in specs:
        subject = _subject(spec)
        answers.setdefault(subject, None)
        try:
            found = default_manager().resolve(spec.group, spec.id, spec.distribution)
            if (found.target, found.provider) != (spec.target, spec.provider):
                answers[subject] = f"{spec.id!r} means {found.target} of {found.provider}, here {spec.target}"
            elif spec.group in LIGHT_GROUPS:  # the others bring torch, which takes long
                default_manager().load(found)
        except RegistryError as error:
            answers[subject] = str(error)
    pipe.send(answers)
    pipe.close()


def _subject(spec: EntrySpec) -> str:
    role = next((role for role, group in ROLES.items() if group.name == spec.group), None)
    return f"{role}/{spec.id}" if role is not None else spec.id
