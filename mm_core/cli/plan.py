"""`mm plan`: memory, communication and time of a training job, without its devices, weights and data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import output_format, take_option
from mm_core.cli.tables import json_text
from mm_core.config.findings import ConfigError, Finding
from mm_registry.suggestions import closest

_OWN = ("--world-size", "--device", "--png", "--no-advice", "--format")
_HELP = """\
usage: mm plan --mm-model FILE --mm-data FILE --world-size N --device NAME [FLAGS OF mm train] [key.path=value...]
       mm plan job.yaml --world-size N --device NAME [FLAG_OR_OVERRIDE...]

Say what a job needs before it runs: memory of a rank and when it is highest, what ranks send each other, FLOPs, and the
time of a step; whether it fits, and what to change if not. The files and flags are those of mm train; the model is built
without storage, so that neither weights nor data nor a GPU need be here.

--world-size N    ranks; by default those of --nproc-per-node and --nnodes
--device NAME     {devices}, or a JSON or YAML file with the numbers of another
--png FILE        draw the memory of a rank over a step
--no-advice       leave out what could be changed; each change is planned like the job itself, which takes time
--format json     everything as data: `parameters` (trained, of the whole model), `peak_bytes` (of a rank), …
"""


def run(argv: list[str]) -> int:
    """Plan the job that the command line names; return 0, also if it does not fit."""
    from mm_core.planning.devices import DEVICES, find_device  # imports no torch

    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP.format(devices=", ".join(DEVICES)))
        return 0
    pydantic_plugins.disable()
    _refuse_misspelt(argv)
    form, rest = output_format(argv, ("text", "json"))
    name, rest = take_option(rest, "--device")
    picture, rest = take_option(rest, "--png")
    ranks, rest = take_option(rest, "--world-size")
    with_advice = "--no-advice" not in rest
    rest = [word for word in rest if word != "--no-advice"]
    if name is None:
        raise _mistake(
            "--device", "missing-flag", "it is required", f"Write one of {', '.join(DEVICES)}, or a file"
        )
    device = find_device(name)
    from mm_core.config.planned_job import load_planned_job

    job = load_planned_job(rest, _whole(ranks))
    if picture is not None:
        _check_picture(picture)

    from mm_core.planning.plan import plan_job  # imports torch: only once everything written is right
    from mm_core.planning.report import plan_data, plan_text

    result = plan_job(job, device, with_advice=with_advice)
    if picture is not None:
        from mm_core.planning.picture import draw_timeline

        draw_timeline(result, Path(picture))
    if form == "json":
        data: dict[str, Any] = plan_data(result, device)
        data["findings"] = [finding.to_dict() for finding in job.findings]
        sys.stdout.write(json_text(data))
        return 0
    said = "".join(f"{finding}\n" for finding in job.findings)
    sys.stdout.write(plan_text(result, device) + said)
    return 0


def _refuse_misspelt(argv: list[str]) -> None:
    """A misspelling of one of this command's own flags, which the flags of `mm train` are no help against."""
    from mm_core.config.flags import TrainFlags  # after pydantic's plugins are off

    for word in argv:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in _OWN or flag[2:].replace("-", "_") in TrainFlags.model_fields:
            continue
        near = closest(flag, _OWN, 1)
        if near:
            raise _mistake(flag, "unknown-flag", "there is no such flag", f"Did you mean {near[0]}?")


def _whole(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 2**20):
        raise _mistake(
            "--world-size", "wrong-value", f'"{text}" is no number of ranks', "Write a whole number from 1"
        )
    return int(text)


def _check_picture(path: str) -> None:
    """Refuse a picture that could not be written, before the work is done."""
    if not path.lower().endswith(".png"):
        raise _mistake("--png", "wrong-value", f'"{path}" is no PNG file', "Give it a name that ends in .png")
    if not Path(path).absolute().parent.is_dir():
        raise _mistake(
            "--png", "missing-path", f'there is no folder for "{path}"', "Make it, or write elsewhere"
        )


def _mistake(flag: str, code: str, text: str, mend: str) -> ConfigError:
    return ConfigError([Finding("error", code, text, path=flag, suggestion=mend)])
