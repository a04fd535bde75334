"""Does a job suit the machine and the environment it starts in? Told without torch: device files are counted."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mm_core.config.environment import check_environment, read
from mm_core.config.findings import Finding, Level
from mm_core.config.flags import TrainFlags

#: Ranks for each core of a machine without accelerator: above the first they crawl, which is said; above the second
#: they would not even start (each is a process of some 300 MB that must meet the others in time), which is refused.
_CROWDED, _TOO_MANY = 2, 8
_DEVICE_FILES = {
    "CUDA": (re.compile(r"nvidia\d+"), "CUDA_VISIBLE_DEVICES"),
    "NPU": (re.compile(r"davinci\d+"), "ASCEND_RT_VISIBLE_DEVICES"),
}


def check_surroundings(
    flags: TrainFlags,
    *,
    to_run: bool,
    environ: Mapping[str, str] | None = None,
    folder: Path = Path("/dev"),
    cores: int | None = None,
) -> list[Finding]:
    """Return what there is to say about environment variables, and, for a job that is about to run, about the
    number of its processes and their communication on this machine.

    Variables without effect are left to `mm doctor`, so that scripts that set many stay quiet.

    Args:
        to_run: whether it is this machine on which the job will run.
        folder: where devices have their files.
        cores: those of this process; counted by default.
    """
    findings = [finding for finding in check_environment(environ) if finding.level != "note"]
    if to_run:
        devices = count_devices(environ, folder)
        findings += _processes(flags, devices, cores or _cores())
        findings += _backend(flags, devices)
    return findings


def count_devices(environ: Mapping[str, str] | None = None, folder: Path = Path("/dev")) -> int:
    """Return how many CUDA devices or NPUs this process may see, as far as device files and variables tell."""
    if read("MM_DEVICE", environ) == "cpu":
        return 0
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:  # no such folder: a system without device files
        names = []
    for pattern, variable in _DEVICE_FILES.values():
        count = sum(pattern.fullmatch(name) is not None for name in names)
        visible = read(variable, environ)
        if count:
            return (
                count
                if visible is None
                else min(count, len([part for part in visible.split(",") if part.strip()]))
            )
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(flags: TrainFlags, devices: int, cores: int) -> list[Finding]:
    ranks = flags.nproc_per_node or 1
    if devices:
        if ranks <= devices:
            return []
        text = f"{ranks} ranks, but this machine shows {devices} device{'s' if devices > 1 else ''}"
        return [_about(flags, "nproc_per_node", "warning", text, f"Use {devices}, one rank a device")]
    machine = f"{cores} core{'s' if cores > 1 else ''} and no accelerator"
    if ranks > _TOO_MANY * cores:
        text = f"{ranks} ranks are too many for a machine with {machine}: each is a process that needs a core"
        return [_about(flags, "nproc_per_node", "error", text, f"Use at most {_TOO_MANY * cores}")]
    if ranks > _CROWDED * cores:
        text = f"{ranks} ranks on a machine with {machine} will take turns, and each waits for the others"
        return [_about(flags, "nproc_per_node", "warning", text, f"Use {cores} for speed")]
    return []


def _backend(flags: TrainFlags, devices: int) -> list[Finding]:
    wanted = flags.distributed_backend
    if devices or wanted not in ("nccl", "hccl"):
        return []
    text = f"{wanted} is for accelerators; this machine shows none, and gloo is used on the CPU"
    return [_about(flags, "distributed_backend", "note", text)]


def _about(flags: TrainFlags, name: str, level: Level, text: str, suggestion: str = "") -> Finding:
    return dataclasses.replace(flags.finding(name, "machine", text, suggestion), level=level)
