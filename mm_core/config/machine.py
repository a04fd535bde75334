"""Does a job suit the machine and the environment it starts in? Told without torch: device files are counted."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mm_core.config.devices import TYPES, communication, read_backend, visible_devices
from mm_core.config.environment import check_environment, read
from mm_core.config.findings import Finding, Level
from mm_registry.errors import UserError

if TYPE_CHECKING:  # `mm doctor`, which counts device files with this, imports no pydantic
    from mm_core.config.flags import TrainFlags

#: Ranks for each core of a machine without accelerator: above the first they crawl, which is said; above the second
#: they would not even start (each is a process of some 300 MB that must meet the others in time), which is refused.
_CROWDED, _TOO_MANY = 2, 8
_DEVICE_FILES = {"cuda": re.compile(r"nvidia\d+"), "npu": re.compile(r"davinci\d+")}


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
    wrong = _backend_spelling(flags)
    findings += wrong
    if to_run:
        device, devices = find_devices(environ, folder)
        if device == "cpu" or devices:
            findings += _processes(flags, devices, cores or _cores())
        if not wrong:
            findings += _backend(flags, device)
    return findings


def find_devices(environ: Mapping[str, str] | None = None, folder: Path = Path("/dev")) -> tuple[str, int]:
    """Return the type of device that a job here computes on, and how many of them this process may see, as far as
    device files and variables tell; `("cpu", 0)` without any.

    A type that MM_DEVICE insists on is believed; 0 of them only means that their files are elsewhere.
    """
    wanted = read("MM_DEVICE", environ)
    counts = {device: device_files(device, folder) for device in _DEVICE_FILES}
    for device in counts:
        visible = visible_devices(device, environ)
        if visible is not None and not any(name.startswith("MIG-") for name in visible):  # parts of one GPU
            counts[device] = min(counts[device], len(visible))
    if wanted in TYPES:
        return wanted, counts.get(wanted, 0)
    return next(((device, count) for device, count in counts.items() if count), ("cpu", 0))


def device_files(device: str, folder: Path = Path("/dev")) -> int:
    """Return how many devices of a type, `cuda` or `npu`, have files here."""
    try:
        return sum(_DEVICE_FILES[device].fullmatch(entry.name) is not None for entry in os.scandir(folder))
    except OSError:  # no such folder: a system without device files
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


def _backend_spelling(flags: TrainFlags) -> list[Finding]:
    if flags.distributed_backend is None:
        return []
    try:
        read_backend(flags.distributed_backend)
    except UserError as error:
        return [_about(flags, "distributed_backend", "error", _without_flag(error))]
    return []


def _backend(flags: TrainFlags, device: str) -> list[Finding]:
    try:
        _, said = communication(flags.distributed_backend, device)
    except UserError as error:
        return [_about(flags, "distributed_backend", "error", _without_flag(error))]
    return [_about(flags, "distributed_backend", "note", said)] if said else []


def _without_flag(error: UserError) -> str:
    """A finding names its flag by itself."""
    return str(error).removeprefix("--distributed-backend ").removesuffix(".")


def _about(flags: TrainFlags, name: str, level: Level, text: str, suggestion: str = "") -> Finding:
    return dataclasses.replace(flags.finding(name, "machine", text, suggestion), level=level)
