"""Finding plugins: our discovery against the standard library's and stevedore's, and what `mm list` costs.

A fresh virtual environment gets our two packages, and 200 or 1,000 synthetic distributions as pip leaves them: one in
twenty declares entries of ours, half declare others, the rest none. Every measurement is a process of its own, with
compiled modules and a warm file cache; the candidates take turns, and medians are compared.

* discovery: from the start of the import to the last entry, wall-clock and CPU time, in the process itself.
  Ours: `PluginManager().discover()` (which decides every entry's status too); the standard library's:
  `importlib.metadata.entry_points()`; stevedore's: the entry points of one group, its cache off, nothing loaded.
  Target: at most 1.0 times the standard library's time.
* `mm list --format json`: the whole process, against `python -c pass`. Target: at most 5 times.
* an unknown id: from the question to the message, in a process that has discovered. Target: at most 5 ms.

    python benchmarks/discovery.py [--repeats 25] [--sizes 200 1000] [--output FILE]

stevedore is left out if it is not installed (`pip install stevedore`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "mm_core", ROOT / "registry" / "mm_registry")
OURS = ("mmzoo-core", "mmzoo-registry")
DEPENDENCIES = ("importlib-metadata", "lazy-importer", "zipp", "packaging", "pluggy")

TIMED = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
{program}
print((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3, count)
"""
GROUP = "mm_core.predictor_models"
DISCOVERY = {
    "ours": (
        "import mm_registry\n"
        "found = mm_registry.PluginManager().discover().entries\n"
        f"count = sum(entry.group == {GROUP!r} for entry in found)"
    ),
    "importlib.metadata": (
        f"import importlib.metadata\ncount = len(importlib.metadata.entry_points().select(group={GROUP!r}))"
    ),
    "stevedore": (
        f"import stevedore\ncount = len(stevedore.NamedExtensionManager({GROUP!r}, ['nothing']).list_entry_points())"
    ),
}
UNKNOWN_ID = """
import time
import mm_registry
predictors = mm_registry.Registry("mm_core.predictor_models")
len(predictors)
wall, cpu = time.perf_counter(), time.process_time()
try:
    predictors["syntetic_id_7"]
except mm_registry.UnknownIdError as error:
    message = str(error)
print((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3, len(message.encode()))
"""


def make_environment(folder: Path) -> tuple[Path, Path]:
    """Make a virtual environment with our packages as copies; return its interpreter and site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for package in PACKAGES:
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in OURS:
        distribution = importlib.metadata.distribution(name)
        info = site / f"{name.replace('-', '_')}-{distribution.version}.dist-info"
        info.mkdir()
        for file in ("METADATA", "entry_points.txt"):
            text = distribution.read_text(file)
            if text is not None:
                (info / file).write_text(text, encoding="utf-8")
    for name in (*DEPENDENCIES, "stevedore"):
        copy_distribution(name, site)
    script = folder / "bin" / "mm"
    script.write_text(
        f"#!{python}\nimport sys\nfrom mm_core.cli.main import run\nif __name__ == '__main__':\n    sys.exit(run())\n"
    )
    script.chmod(0o755)
    return python, site


def copy_distribution(name: str, site: Path) -> None:
    """Copy the files of an installed distribution, if there is one."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        source = Path(str(file.locate()))
        if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, site / file)


def add_distributions(site: Path, start: int, stop: int) -> None:
    """Add the synthetic distributions of these numbers, as pip leaves a wheel."""
    for number in range(start, stop):
        name = f"synthetic-{number}"
        info = site / f"{name.replace('-', '_')}-1.{number}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.{number}\nRequires-Dist: numpy>=2\n"
        if number % 20 == 0:
            metadata += "Requires-Dist: mmzoo-core>=0.1,<0.2\n"
            (info / "entry_points.txt").write_text(
                f"[mm_core.predictor_models]\nsynthetic_id_{number} = synthetic_{number}.predictor:Predictor\n\n"
                f"[mm_core.configs]\npredictor/synthetic_id_{number} = synthetic_{number}.config:Config\n"
            )
        elif number % 2:
            (info / "entry_points.txt").write_text(
                f"[console_scripts]\nsynthetic-{number} = synthetic_{number}.cli:main\n\n"
                f"[pytest11]\nsynthetic_{number} = synthetic_{number}.plugin\n"
            )
        (info / "METADATA").write_text(f"{metadata}\n{'A description of some length. ' * 150}\n")
        (info / "RECORD").write_text("".join(f"synthetic_{number}/m{i}.py,,\n" for i in range(30)))
        (info / "INSTALLER").write_text("pip\n")


def in_turns(
    commands: Mapping[str, Sequence[str]], repeats: int, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Run each command `repeats` times in turns, after one run of each that does not count; return the medians of wall-clock
    and CPU milliseconds of the whole process, and what the last run printed.
    """
    times: dict[str, list[tuple[float, float, str]]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
                assert process.stdout is not None
                output = process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed")
            if number:
                wall = (time.perf_counter() - started) * 1e3
                times[name].append((wall, (usage.ru_utime + usage.ru_stime) * 1e3, output))
    return {name: summary(runs) for name, runs in times.items()}


def summary(runs: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    return {
        "wall_ms": statistics.median(wall for wall, _, _ in runs),
        "cpu_ms": statistics.median(cpu for _, cpu, _ in runs),
        "outputs": [output for _, _, output in runs],
    }


def inner(result: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of what the processes measured themselves; `count` is the third number that they print."""
    lines = [[float(number) for number in output.split()] for output in result["outputs"]]
    wall, cpu, count = (statistics.median(column) for column in zip(*lines, strict=True))
    return {"wall_ms": wall, "cpu_ms": cpu, "count": int(count)}


def measure(python: Path, size: int, repeats: int, environ: Mapping[str, str]) -> dict[str, Any]:
    present = [name for name in DISCOVERY if name != "stevedore" or has_stevedore()]
    scans = {name: [str(python), "-c", TIMED.format(program=DISCOVERY[name])] for name in present}
    found = {name: inner(result) for name, result in in_turns(scans, repeats, environ).items()}
    if len({result["count"] for result in found.values()}) != 1:
        raise SystemExit(f"not all found the same number of entries: {found}")
    processes = {
        "python -c pass": [str(python), "-c", "pass"],
        "mm list --format json": [str(python.with_name("mm")), "list", "--format", "json"],
        "python -m mm_core list --format json": [str(python), "-m", "mm_core", "list", "--format", "json"],
    }
    commands = in_turns(processes, repeats, environ)
    for result in commands.values():
        del result["outputs"]
    unknown = inner(in_turns({"unknown id": [str(python), "-c", UNKNOWN_ID]}, repeats, environ)["unknown id"])
    bare = commands["python -c pass"]
    return {
        "distributions": size,
        "discovery": found,
        "commands": commands,
        "unknown_id": {"wall_ms": unknown["wall_ms"], "cpu_ms": unknown["cpu_ms"], "bytes": unknown["count"]},
        "ratios": {
            **{f"discovery to {name}": ratios(found["ours"], found[name]) for name in present[1:]},
            **{f"{name} to python -c pass": ratios(commands[name], bare) for name in list(commands)[1:]},
        },
    }


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {"wall": ours["wall_ms"] / theirs["wall_ms"], "cpu": ours["cpu_ms"] / theirs["cpu_ms"]}


def has_stevedore() -> bool:
    try:
        importlib.metadata.version("stevedore")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def report(row: Mapping[str, Any]) -> str:
    """One size as text."""
    lines = [f"{row['distributions']} distributions", f"  {'':<42}{'wall ms':>9}{'CPU ms':>9}"]
    shown = {f"discovery: {name}": result for name, result in row["discovery"].items()} | row["commands"]
    shown["unknown id (target <= 5 ms)"] = row["unknown_id"]
    lines += [
        f"  {name:<42}{result['wall_ms']:>9.1f}{result['cpu_ms']:>9.1f}" for name, result in shown.items()
    ]
    lines.append(f"  {'ratio':<42}{'wall':>9}{'CPU':>9}")
    for name, ratio in row["ratios"].items():
        target = " (target <= 1.0)" if "importlib" in name else " (target <= 5)" if "pass" in name else ""
        lines.append(f"  {name:<54}{ratio['wall']:>6.2f}{ratio['cpu']:>9.2f}{target}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000], help="numbers of distributions")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    if not has_stevedore():
        sys.stdout.write("stevedore is not installed and is left out; to compare: pip install stevedore\n")
    with tempfile.TemporaryDirectory() as folder:
        python, site = make_environment(Path(folder) / "environment")
        no_cache = Path(folder) / "cache" / "python-entrypoints" / ".disable"
        no_cache.parent.mkdir(parents=True)
        no_cache.touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MM_"))}
        environ = {**kept, "XDG_CACHE_HOME": str(no_cache.parents[1])}
        os.chdir(folder)
        rows: list[dict[str, Any]] = []
        sys.stdout.write(
            f"Python {platform.python_version()}, {platform.machine()}, {options.repeats} runs each\n"
        )
        there = 0
        for size in sorted(options.sizes):
            add_distributions(site, there, size)
            there = size
            rows.append(measure(python, size, options.repeats, environ))
            sys.stdout.write(report(rows[-1]))
            sys.stdout.flush()
        os.chdir(ROOT)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
