"""What importing the targets of a plugin does: time, modules, and traces left in the process.

Light targets (config classes, policies, weights adapters, examples, hooks) are imported one by one, each in a fork of
a fresh process without torch. Components are imported one after the other in one process with torch, the worker that
goes on to build them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.testing.import_timer import timed_imports
from mm_core.testing.snapshot import cuda_calls, differences, take_snapshot
from mm_registry.errors import BrokenPluginError
from mm_registry.loading import import_target, without_hint
from mm_registry.spec import EntrySpec

if TYPE_CHECKING:
    from mm_core.testing.case import Plugin

LIGHT_GROUPS = (
    "mm_core.configs",
    "mm_core.sharding_policies",
    "mm_core.weights",
    "mm_core.examples",
    "mm_core.hooks",
)
HEAVY = frozenset(
    {
        *(
            "torch",
            "torchvision",
            "torchaudio",
            "torch_npu",
            "triton",
            "transformers",
            "diffusers",
            "accelerate",
        ),
        *(
            "peft",
            "tensorflow",
            "jax",
            "megatron",
            "mindspeed",
            "scipy",
            "pandas",
            "sklearn",
            "matplotlib",
            "cv2",
        ),
        "av",
    }
)
"""Packages that take long to import; what is read while a job is checked must not bring them."""

# What a light target may use without being charged for it.
_LIGHT_BASE = (
    "mm_core.config.section",
    "mm_core.config.keys",
    "mm_core.config.patterns",
    "mm_core.sharding.policy",
    "mm_core.weights.adapter",
    "mm_core.testing.example",
    "mm_registry.hooks",
)
TIME_LIMIT = 120.0
"""Seconds that one import, or one check, may take before it counts as hanging."""
_TO_START = 60.0
"""Seconds that a process of a survey may take to start and to import what is common."""
_SLOWEST = 8


@dataclass(frozen=True)
class ImportRecord:
    """What importing one target did.

    Attributes:
        group, id, target: of the entry.
        error: why it failed, in one sentence; empty if it did not.
        traceback: of the failure.
        crashed: how the process ended, if it did; the other fields then say nothing.
        seconds: of wall-clock time. What an earlier target brought is not counted again.
        modules: number of modules that it brought.
        heavy: packages of `HEAVY` that it brought.
        slowest: (module, seconds of its own execution), slowest first.
        cuda: places that initialised CUDA.
        printed: what it wrote to standard output.
        changes: kind (torch, distributed, environment, files, threads, interpreter) -> what it changed.
    """

    group: str
    id: str
    target: str
    error: str = ""
    traceback: str = ""
    crashed: str = ""
    seconds: float = 0.0
    modules: int = 0
    heavy: tuple[str, ...] = ()
    slowest: tuple[tuple[str, float], ...] = ()
    cuda: tuple[str, ...] = ()
    printed: str = ""
    changes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.id

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-able."""
        return asdict(self)

    def described(self) -> dict[str, Any]:
        """Return the fields and the three questions that people ask, JSON-able."""
        answers = {
            "touched_cuda": bool(self.cuda),
            "initialised_distributed": bool(self.changes.get("distributed")),
            "changed_torch_state": bool(self.changes.get("torch")),
        }
        return {**self.to_dict(), **answers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImportRecord:
        """Return the record that `to_dict` described."""
        listed = {name: tuple(data[name]) for name in ("heavy", "cuda")}
        slowest = tuple((name, seconds) for name, seconds in data["slowest"])
        return cls(**{**data, **listed, "slowest": slowest})


Survey = Mapping[tuple[str, str], ImportRecord]
"""(group, id) -> what importing it did."""


def import_and_watch(spec: EntrySpec) -> ImportRecord:
    """Import one target into this process and return what that did. Never raises what the plugin raised."""
    before, known, process = take_snapshot(), set(sys.modules), os.getpid()
    output = io.StringIO()
    error = trace = ""
    start = time.perf_counter()
    with timed_imports() as timer, cuda_calls() as cuda, contextlib.redirect_stdout(output):
        try:
            import_target(spec)
        except BrokenPluginError as broken:
            said = broken.spec.detail if broken.spec is not None else str(broken)
            error = without_hint(said, spec.distribution)
            trace = _traceback(broken.__cause__)
    if os.getpid() != process:  # a fork of the plugin's that came back; one process tells what happened
        os._exit(0)
    seconds = time.perf_counter() - start
    new = set(sys.modules) - known
    slowest = sorted(timer.self_seconds.items(), key=lambda item: -item[1])[:_SLOWEST]
    return ImportRecord(
        *(spec.group, spec.id, spec.target, error, trace),
        seconds=round(seconds, 4),
        modules=len(new),
        heavy=tuple(sorted(HEAVY & {name.partition(".")[0] for name in new})),
        slowest=tuple((name, round(own, 4)) for name, own in slowest),
        cuda=tuple(dict.fromkeys(cuda)),
        printed=output.getvalue()[:500],
        changes=differences(before, take_snapshot()),
    )


def _traceback(error: BaseException | None) -> str:
    """The traceback from the plugin's code on, without the machinery that imports it."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    machinery = ("importlib", "mm_registry", "mm_core/testing")
    own = [frame for frame in frames if not any(word in frame.filename for word in machinery)]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(own)]
    return "".join([*lines, *traceback.format_exception_only(error)])


def light_specs(plugin: Plugin) -> list[EntrySpec]:
    """The entries of a plugin whose targets must be light."""
    return [spec for group in LIGHT_GROUPS for spec in plugin.specs(group)]


def survey_light(plugin: Plugin) -> Survey:
    """Import each light target of a plugin in a process of its own."""
    return _survey_elsewhere(plugin, light_specs(plugin), _LIGHT_BASE, "light")


def survey_limit(plugin: Plugin, specs: Sequence[EntrySpec]) -> float:
    """Seconds that a survey of these entries may take, should each hang and each process have to be started again."""
    return len(specs) * (plugin.time_limit + _TO_START)


def survey_components(plugin: Plugin) -> Survey:
    """Import each component of a plugin in one process of their own."""
    return _survey_elsewhere(plugin, plugin.components, ("torch",), "components", together=True)


def _survey_elsewhere(
    plugin: Plugin, specs: Sequence[EntrySpec], base: Sequence[str], name: str, *, together: bool = False
) -> Survey:
    told: dict[tuple[str, str], ImportRecord] = {}
    rest = list(specs)
    while rest:
        folder = plugin.folder / f"survey-{name}-{len(rest)}"
        folder.mkdir()
        records, ended = _survey_process(folder, rest, base, together, plugin.time_limit)
        told.update({record.key: record for record in records})
        rest = rest[len(records) :]
        if rest:  # the process ended in the first of them; the others are tried in another one
            lost = rest.pop(0)
            told[lost.group, lost.id] = _ended(lost, ended)
    return told


def _survey_process(
    folder: Path, specs: Sequence[EntrySpec], base: Sequence[str], together: bool, limit: float
) -> tuple[list[ImportRecord], str]:
    """Return the records that one process made, and how it ended."""
    job = {
        "path": absolute_path(),
        "specs": [spec_to_dict(spec) for spec in specs],
        "base": list(base),
        "together": together,
        "folder": str(folder),
        "time_limit": limit,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "mm_core.testing.survey", str(folder / "job.json")]
    with (folder / "log").open("w") as log:
        try:
            done = subprocess.run(
                command,
                env=child_environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                timeout=_TO_START + (limit + 1) * len(specs),
                check=False,
            )
            ended = f"the process ended {describe_exit(done.returncode)} while it was imported"
        except subprocess.TimeoutExpired:
            ended = f"it was not imported within {limit:g} s"
    results = folder / "results"
    if not results.exists():
        tail = (folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the survey of imports could not start\n{tail}")
    records = []
    for line in results.read_bytes().splitlines():
        try:
            records.append(ImportRecord.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError):  # written by what was imported
            return records, "it wrote into the files of the process that imported it"
    return records, ended


def absolute_path() -> list[str]:
    """`sys.path` for a process with another working directory.

    What is no path stays as it is: editable installs of packages without `__init__.py` put the name of an import hook there.
    """
    return [
        os.path.abspath(entry) if not entry or os.path.exists(entry) else entry
        for entry in sys.path
        if isinstance(entry, str)
    ]


def child_environment() -> dict[str, str]:
    """The environment of the processes that import plugins: one thread, no network, our own `mm_core`."""
    import mm_core

    root = str(Path(mm_core.__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def spec_to_dict(spec: EntrySpec) -> dict[str, Any]:
    """Return an entry as plain data, JSON-able."""
    return {**spec._asdict(), "status": str(spec.status)}


def spec_from_dict(data: Mapping[str, Any]) -> EntrySpec:
    """Return the entry that `spec_to_dict` described."""
    from mm_registry.spec import Status

    listed = {name: tuple(data[name]) for name in ("extras", "required_api")}
    return EntrySpec(**{**data, **listed, "status": Status(data["status"])})


def describe_exit(code: int) -> str:
    """`with exit code 3`, or `by signal SIGSEGV`."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


# The program that runs in the process of its own


def _main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.path[:] = job["path"]
    specs = [spec_from_dict(item) for item in job["specs"]]
    folder = Path(job["folder"])
    for module in job["base"]:
        importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with (folder / "results").open("a", encoding="utf-8") as results:

        def tell(record: ImportRecord) -> None:
            results.write(json.dumps(record.to_dict()) + "\n")
            results.flush()

        for number, spec in enumerate(specs):
            place = folder / f"cwd-{number}"
            place.mkdir()
            os.chdir(place)
            if job["together"]:
                tell(import_and_watch(spec))
            else:
                _in_a_fork(spec, tell, job["time_limit"])


def _in_a_fork(spec: EntrySpec, tell: Callable[[ImportRecord], None], limit: float) -> None:
    """Import a target in a child, so that the next one finds nothing of it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tell(import_and_watch(spec))
            code = 0
        finally:
            os._exit(code)
    ended = _exit_code(child, limit)
    if ended is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tell(_ended(spec, f"it was not imported within {limit:g} s"))
    elif ended != 0:
        tell(_ended(spec, f"the process ended {describe_exit(ended)} while it was imported"))


def _exit_code(child: int, limit: float) -> int | None:
    """How a child ended; None if it did not within so many seconds. Nothing in the child is asked to keep the time:
    what it imports may do anything to its signals.
    """
    deadline = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def _ended(spec: EntrySpec, how: str) -> ImportRecord:
    return ImportRecord(spec.group, spec.id, spec.target, crashed=how)


def merged(surveys: Iterable[Survey]) -> list[dict[str, Any]]:
    """Return the records of several surveys as plain data, slowest first."""
    records = [record for survey in surveys for record in survey.values()]
    return [record.described() for record in sorted(records, key=lambda record: -record.seconds)]


if __name__ == "__main__":
    _main(sys.argv[1])
