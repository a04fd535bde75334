"""The process that imports, builds and runs a plugin for the conformance kit: `python -m mm_core.testing.worker JOB`.

It writes one JSON line for each thing that begins or is done to a pipe; what it was at when the lines end is what ended
it. Only `mm_core.testing.run` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_core.testing.case import Case, Plugin
from mm_core.testing.check import Check, CheckCrashed, CheckFailed
from mm_core.testing.execute import (
    STOPS,
    find_plugin,
    load_example,
    make_case,
    pairs,
    run_check,
    selected_checks,
    stopped,
    subjects,
    with_expectation,
)
from mm_core.testing.result import Outcome, Result
from mm_core.testing.survey import ImportRecord, import_and_watch, light_specs, survey_light, survey_limit
from mm_registry.errors import RegistryError
from mm_registry.groups import HOOKS
from mm_registry.manager import default_manager

Tell = Callable[..., None]


def main(job_file: str) -> None:
    """Run the checks of a job: {distribution, only, stages, path, folder, pipe, done, failed, imports, with_imports,
    time_limit}."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.path[:] = job["path"]
    with os.fdopen(job["pipe"], "w", encoding="utf-8") as pipe:

        def tell(event: str, **what: Any) -> None:
            pipe.write(json.dumps({"event": event, **what}) + "\n")
            pipe.flush()

        os.set_inheritable(pipe.fileno(), False)
        _work(job, tell)
        tell("end")
        # Threads and destructors of libraries must not turn a finished job into a crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _work(job: dict[str, Any], tell: Tell) -> None:
    folder = Path(job["folder"])
    plugin = replace(
        find_plugin(job["distribution"], default_manager(), folder), time_limit=job["time_limit"]
    )
    known = [ImportRecord.from_dict(item) for item in job["imports"]]
    _prepare_surveys(plugin, known, tell)
    surveys = [known, plugin.light_imports.values()]
    done = {tuple(pair) for pair in job["done"]}
    checks = selected_checks(job["only"], job["stages"])
    if job["with_imports"] or any(check.stage in ("build", "ranks") for check in checks):
        # Before anything else imports them, so that each is charged with its own.
        surveys.append(plugin.component_imports.values())
    plugin.crashed.update(
        {record.key: record.crashed for survey in surveys for record in survey if record.crashed}
    )
    _make_examples(plugin, tell)
    # Everything is built on the CPU. After a backward pass that has seen a GPU, forked ranks could do none.
    os.environ.update(CUDA_VISIBLE_DEVICES="", ASCEND_RT_VISIBLE_DEVICES="", MM_DEVICE="cpu")
    results = [Result.from_dict(item) for item in job["failed"]]
    for subject in subjects(plugin, folder):
        failed = stopped(results, subject)
        for check in pairs(checks, subject):
            if (subject.subject, check.name) not in done:
                result = _run(check, subject, failed, tell)
                results.append(result)
                if result.status in STOPS:
                    failed[check.name] = result.status


def _run(check: Check, subject: Case | Plugin, failed: dict[str, Outcome], tell: Tell) -> Result:
    example = subject.example if isinstance(subject, Case) else None
    expected = example.known_failures.get(check.name) if example is not None else None
    tell("start", subject=subject.subject, check=check.name, expected=expected)
    ended = _crash_of(subject) if isinstance(subject, Case) and check.stage != "light" else None
    if ended is None:
        result = run_check(check, subject, failed)
    else:
        result = with_expectation(Result(check.name, subject.subject, Outcome.CRASHED, ended), expected)
    tell("result", result=result.to_dict())
    return result


def _crash_of(case: Case) -> str | None:
    """Why a component cannot be built in this process: importing it, or what belongs to it, ends the process."""
    try:
        with contextlib.suppress(RegistryError):  # one cannot be used, so it is not imported either
            case.plugin.must_not_crash(case.spec, case.config_spec, case.policy_spec, case.weights_spec)
        case.plugin.must_not_crash(*case.plugin.specs(HOOKS))
    except CheckCrashed as crash:
        return str(crash)
    return None


def _make_examples(plugin: Plugin, tell: Tell) -> None:
    """Make the examples, telling of each, so that one that ends the process is known by name."""
    for spec in plugin.components:
        case = make_case(plugin, spec, plugin.folder, with_example=False)
        try:
            found = case.example_spec
        except RegistryError:  # it is there and cannot be used; `companions-can-be-used` says why
            continue
        if found is not None and (found.group, found.id) not in plugin.crashed:
            tell("import", group=found.group, id=found.id, target=found.target)
            with contextlib.suppress(
                CheckFailed, RegistryError
            ):  # `example-is-valid` says what is wrong with it
                load_example(case)
            tell("import done")


def _prepare_surveys(plugin: Plugin, known: list[ImportRecord], tell: Tell) -> None:
    """Make the first question for a survey take it here, and tell of each import as it begins and ends.

    Components are imported into this very process. What an earlier worker found is taken over: its imports are not
    watched again, and one that ended it is not tried.
    """
    told = {record.key: record for record in known}

    def watch() -> dict[tuple[str, str], ImportRecord]:
        import torch

        torch.set_num_threads(1)  # forked ranks hang otherwise
        records = {}
        for number, spec in enumerate(plugin.components):
            record = told.get((spec.group, spec.id))
            if record is None:
                place = plugin.folder / f"cwd-{number}"
                place.mkdir()
                with contextlib.chdir(place):
                    tell("import", group=spec.group, id=spec.id, target=spec.target)
                    record = import_and_watch(spec)
                tell("imported", record=record.to_dict())
            records[record.key] = record
        return records

    def light() -> dict[tuple[str, str], ImportRecord]:
        specs = light_specs(plugin)
        if all((spec.group, spec.id) in told for spec in specs):
            return {(spec.group, spec.id): told[spec.group, spec.id] for spec in specs}
        tell("survey", seconds=survey_limit(plugin, specs))
        found = dict(survey_light(plugin))
        tell("survey done")
        for record in found.values():
            tell("imported", record=record.to_dict())
        return found

    plugin.later("component imports", watch)
    plugin.later("light imports", light)


if __name__ == "__main__":
    main(sys.argv[1])
