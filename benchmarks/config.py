"""Reading and checking a configuration: the cost of places, types and findings, and what `mm check` costs.

The job is the largest of tests/corpus: the model, data, tools and sharding file of Wan2.2 A14B image to video, as
MindSpeed-MM ships them; beside it the combined YAML of Qwen3-VL.

* reading: `read_document`, which keeps the place of every key and value, to plain `json.loads` and `yaml.safe_load` of
  the same files, in one process; the median of many turns.
* reading and checking: `check_file` of each and `check_files_together`, to the same.
* `mm check`: the whole process, wall-clock and CPU time, with compiled modules and a warm file cache, after one run that
  does not count. Target: at most 0.5 s. A run that imported torch fails.

    python benchmarks/config.py [--repeats 10] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
JOB = (
    "wan2.2/A14B/i2v/pretrain_model_high.json",
    "wan2.2/A14B/i2v/data.json",
    "tools.json",
    "wan2.2/A14B/fsdp2_config.yaml",
)
COMBINED = ("qwen3vl_yaml/qwen3vl_full_sft_8B.yaml",)
JOBS = {"Wan2.2 A14B i2v (4 files)": JOB, "Qwen3-VL 8B (combined YAML)": COMBINED}
TARGET_S = 0.5
TURNS = 200
PROBE = """
import sys
from mm_core.cli.main import main
code = main(["check", *sys.argv[1:]])
found = sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "diffusers", "transformers"))
sys.exit(f"imported: {found}" if found else 0 if code in (0, 2) else code)
"""
PLAIN = """
import json, sys, yaml
for name in sys.argv[1:]:
    text = open(name, encoding="utf-8").read()
    json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
"""


def plain(names: Sequence[str]) -> None:
    import yaml

    for name in names:
        text = Path(name).read_text(encoding="utf-8")
        if name.endswith(".json"):
            json.loads(text)
        else:
            yaml.safe_load(text)


def read(names: Sequence[str]) -> None:
    from mm_core.config import read_document

    for name in names:
        read_document(name)


def check(names: Sequence[str]) -> None:
    from mm_core.config import check_file
    from mm_core.config.together import check_files_together

    for name in names:
        check_file(name)
    check_files_together(names)


def in_process(names: Sequence[str], turns: int) -> dict[str, float]:
    """The medians of milliseconds of each way, in turns, in this process."""
    ways: dict[str, Callable[[Sequence[str]], None]] = {
        "plain": plain,
        "reading": read,
        "reading and checking": check,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(turns + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way(names)
            if number:  # the first turn imports and builds the classes
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def processes(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, dict[str, float]]:
    """Run each command `repeats` times in turns, after one run of each that does not count; return the medians of
    wall-clock and CPU milliseconds of the whole process.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode not in (0, 2):
                raise SystemExit(f"{' '.join(command)} failed")
            if number:
                wall = (time.perf_counter() - started) * 1e3
                times[name].append((wall, (usage.ru_utime + usage.ru_stime) * 1e3))
    return {
        name: {
            "wall_ms": statistics.median(w for w, _ in runs),
            "cpu_ms": statistics.median(c for _, c in runs),
        }
        for name, runs in times.items()
    }


def measure(title: str, names: Sequence[str], repeats: int, turns: int) -> dict[str, Any]:
    probe = subprocess.run([sys.executable, "-c", PROBE, *names], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise SystemExit(f"mm check of {title}: {probe.stderr or probe.returncode}")
    inner = in_process(names, turns)
    outer = processes(
        {
            "python -c pass": [sys.executable, "-c", "pass"],
            "json.loads and yaml.safe_load": [sys.executable, "-c", PLAIN, *names],
            "mm check": [sys.executable, "-m", "mm_core", "check", *names],
        },
        repeats,
    )
    return {
        "job": title,
        "files": list(names),
        "bytes": sum(Path(name).stat().st_size for name in names),
        "in_process_ms": inner,
        "processes": outer,
        "ratios": {
            "reading to plain": inner["reading"] / inner["plain"],
            "reading and checking to plain": inner["reading and checking"] / inner["plain"],
            "mm check to python -c pass (CPU)": outer["mm check"]["cpu_ms"]
            / outer["python -c pass"]["cpu_ms"],
        },
        "torch_imported": False,
        "target_met": outer["mm check"]["wall_ms"] <= TARGET_S * 1e3,
    }


def report(row: Mapping[str, Any]) -> str:
    """One job as text."""
    lines = [f"{row['job']}: {row['bytes']} bytes", f"  {'in one process':<42}{'ms':>9}"]
    lines += [f"  {name:<42}{value:>9.2f}" for name, value in row["in_process_ms"].items()]
    lines.append(f"  {'whole process':<42}{'wall ms':>9}{'CPU ms':>9}")
    lines += [
        f"  {name:<42}{result['wall_ms']:>9.1f}{result['cpu_ms']:>9.1f}"
        for name, result in row["processes"].items()
    ]
    lines += [f"  ratio: {name:<47}{ratio:>6.1f}" for name, ratio in row["ratios"].items()]
    verdict = "met" if row["target_met"] else "missed"
    lines.append(f"  mm check at most {TARGET_S} s: {verdict}; torch is not imported")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="processes of each kind")
    parser.add_argument("--turns", type=int, default=TURNS, help="turns in one process")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    output = options.output.resolve() if options.output else None
    # The run that does not count compiles what is not compiled yet.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.chdir(CORPUS)
    sys.stdout.write(
        f"Python {platform.python_version()}, {platform.machine()}, {options.repeats} runs each\n"
    )
    rows = []
    for title, names in JOBS.items():
        rows.append(measure(title, names, options.repeats, options.turns))
        sys.stdout.write(report(rows[-1]))
        sys.stdout.flush()
    if output:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
