"""`check_plugin`: the whole kit on one plugin, each thing that imports it in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_core.testing.case import Plugin
from mm_core.testing.check import Check
from mm_core.testing.execute import (
    STOPS,
    find_plugin,
    pairs,
    run_checks,
    selected_checks,
    subjects,
    with_expectation,
)
from mm_core.testing.result import Outcome, Report, Result
from mm_core.testing.survey import (
    TIME_LIMIT,
    ImportRecord,
    absolute_path,
    child_environment,
    describe_exit,
    merged,
)
from mm_registry.manager import PluginManager, default_manager

_MAX_WORKERS = 5
"""A plugin that ended this many processes is not given another."""


def check_plugin(
    distribution: str,
    *,
    only: Collection[str] | None = None,
    stages: Collection[str] | None = None,
    in_process: bool = False,
    with_imports: bool = False,
    time_limit: float = TIME_LIMIT,
) -> Report:
    """Check an installed plugin and return what was found.

    Checks of the stage `metadata` read files. All others run in a worker process: nothing of the plugin is imported into
    this one, and a plugin that ends or hangs its process gets a `crashed` result for what it was at; a new worker goes on
    with the rest.

    Args:
        distribution: `mmzoo-plugin-haar`.
        only: names of checks; all by default.
        stages: names of stages (see `mm_core.testing.check.STAGES`); all by default.
        in_process: run everything here, with `default_manager()`; for tests of checks.
        with_imports: import every target even if no chosen check needs that, for `Report.imports`.
        time_limit: seconds that one import or check may take.

    Raises:
        UserError: the distribution is not installed or is no plugin; there is no such check or stage.
    """
    start = time.perf_counter()
    checks = selected_checks(only, stages)
    with tempfile.TemporaryDirectory(prefix="mm-conformance-") as name:
        folder = Path(name).resolve()
        manager = default_manager() if in_process else PluginManager()
        plugin = replace(find_plugin(distribution, manager, folder), time_limit=time_limit)
        if in_process:
            results = run_checks(checks, plugin, folder, with_examples=True)
            imports: list[dict[str, Any]] = []
        else:
            results, imports = _in_worker(plugin, checks, with_imports)
    seconds = time.perf_counter() - start
    return Report(plugin.distribution, plugin.version, tuple(results), tuple(imports), seconds)


def _in_worker(
    plugin: Plugin, checks: list[Check], with_imports: bool
) -> tuple[list[Result], list[dict[str, Any]]]:
    here = [check for check in checks if check.stage == "metadata"]
    there = [check for check in checks if check.stage != "metadata"]
    found = {
        (result.subject, result.check): result
        for result in run_checks(here, plugin, plugin.folder, with_examples=False)
    }
    order = list(subjects(plugin, plugin.folder, with_examples=False))
    wanted = [(subject.subject, check.name) for subject in order for check in pairs(there, subject)]
    job = _Job(plugin, [check.name for check in there], with_imports, wanted, list(found.values()))
    if wanted or with_imports:
        job.run()
    found.update(job.results)
    ordered = [found[subject.subject, check.name] for subject in order for check in pairs(checks, subject)]
    return ordered, merged([job.imports])


@dataclass
class _Job:
    """What is to be run in workers, and what came of it."""

    plugin: Plugin
    checks: list[str]
    with_imports: bool
    wanted: list[tuple[str, str]]
    before: list[Result]  # of checks that ran in this process
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    imports: dict[tuple[str, str], ImportRecord] = field(default_factory=dict)
    _checking: Mapping[str, Any] | None = None  # what the worker is at
    _importing: Mapping[str, Any] | None = None
    _surveying: float = 0.0  # seconds that it may take for light imports, in processes of their own
    _ended: bool = False

    def run(self) -> None:
        """Start workers until everything has a result."""
        for number in range(_MAX_WORKERS):
            if self._worker(number):
                break
        for subject, check in self.wanted:
            if (subject, check) not in self.results:
                text = f"it was not run: {_MAX_WORKERS} processes ended before it"
                self.results[subject, check] = Result(check, subject, Outcome.CRASHED, text)

    def _worker(self, number: int) -> bool:
        """Run one worker; True if it came to its end, else what it was at is recorded as crashed."""
        folder = self.plugin.folder / f"worker-{number}"
        (folder / "cwd").mkdir(parents=True)
        reader, writer = os.pipe()
        log = folder / "log"
        (folder / "job.json").write_text(json.dumps(self._description(folder, writer)), encoding="utf-8")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mm_core.testing.worker", str(folder / "job.json")],
                cwd=folder / "cwd",
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                start_new_session=True,  # so that what it starts can be ended with it
            )
        os.close(writer)
        hung = spoilt = self._ended = False
        try:
            for event in _events(reader, process, self._patience):
                if event is None:
                    hung = True
                    break
                self._take(event)
        except (ValueError, KeyError, TypeError):  # no line of the worker's: the plugin writes into its files
            spoilt = hung = True
        finally:
            os.close(reader)
            # A worker that closed its pipe is about to end; one that did not is hung, or this process is interrupted.
            if not hung:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._ended and not spoilt:
            return True
        tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        if spoilt:
            ended = "it wrote into the files of the process that ran it"
        elif hung:
            ended = f"it did not end within {self.plugin.time_limit:g} s"
        else:
            ended = f"the process ended {describe_exit(process.returncode)}"
        self._crashed(ended, tail)
        return False

    def _patience(self) -> float:
        """Seconds to wait for what the worker is at; it may take its time to start."""
        if self._surveying:
            return self._surveying
        busy = self._checking is not None or self._importing is not None
        return self.plugin.time_limit if busy else max(TIME_LIMIT, self.plugin.time_limit)

    def _description(self, folder: Path, pipe: int) -> dict[str, Any]:
        return {
            "distribution": self.plugin.distribution,
            "only": self.checks,
            "stages": None,
            "path": absolute_path(),
            "folder": str(folder),
            "pipe": pipe,
            "done": [list(pair) for pair in self.results],
            "failed": [
                result.to_dict()
                for result in (*self.before, *self.results.values())
                if result.status in STOPS
            ],
            "imports": [record.to_dict() for record in self.imports.values()],
            "with_imports": self.with_imports,
            "time_limit": self.plugin.time_limit,
        }

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "start":
                self._checking = event
            case "result":
                result = Result.from_dict(event["result"])
                self.results[result.subject, result.check] = result
                self._checking = None
            case "survey":
                self._surveying = event["seconds"]
            case "survey done":
                self._surveying = 0.0
            case "import":
                self._importing = event
            case "import done":
                self._importing = None
            case "imported":
                record = ImportRecord.from_dict(event["record"])
                self.imports[record.key] = record
                self._importing = None
            case "end":
                self._ended = True

    def _crashed(self, ended: str, tail: str) -> None:
        importing, checking = self._importing, self._checking
        self._importing = self._checking = None
        if importing is not None:
            fields = (importing["group"], importing["id"], importing["target"])
            record = ImportRecord(*fields, crashed=f"{ended} while it was imported", traceback=tail)
            self.imports[record.key] = record
        elif checking is not None:
            result = Result(checking["check"], checking["subject"], Outcome.CRASHED, ended, detail=tail)
            self.results[result.subject, result.check] = with_expectation(result, checking["expected"])
        else:
            raise RuntimeError(f"the worker of the conformance kit failed: {ended}\n{tail}")


def _events(
    reader: int, process: subprocess.Popen[bytes], patience: Callable[[], float]
) -> Iterator[Mapping[str, Any] | None]:
    """Yield what the worker tells, until it ends; None, and nothing after it, if it tells nothing for too long."""
    buffer, heard = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([reader], [], [], 0.1)
        if not ready:
            # What it forked may hold the pipe open after its own end.
            if process.poll() is not None:
                return
            if time.monotonic() > heard + patience():
                yield None
                return
            continue
        data = os.read(reader, 65536)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
            heard = time.monotonic()
