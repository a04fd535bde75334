"""The arguments of the running job, as MindSpeed-MM's code asks for them: `get_args().mm.model`.

Where a source checkout of Megatron-LM offers `megatron.training` (the PyPI wheels hold `megatron.core` alone), its
`get_args` returns the same object. Imports no torch and no pydantic by itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mm_core.config.classic import MMConfig
from mm_core.config.findings import closest
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.job import TrainingJob

log = logging.getLogger(__name__)
_PATHS = ("mm_model", "mm_data", "mm_tool")


class JobArgs(argparse.Namespace):
    """Every flag of a job by its attribute (`--micro-batch-size` is `micro_batch_size`), and `mm`, its files."""

    mm: MMConfig

    def __getattr__(self, name: str) -> Any:
        near = closest(name, vars(self))
        mend = f'did you mean "{near}"?' if near else "`mm train --help` lists the flags"
        raise AttributeError(f'the job has no argument "{name}": {mend}')


_current: JobArgs | None = None


def get_args() -> Any:
    """Return the arguments of the running job: its flags, and `mm.model`, `mm.data`, `mm.tool`.

    In `mm train` they are those that were checked: the global batch is filled in, the files are as the hooks of
    plugins left them, defaults of their keys are not added. It is a copy: to change it does not change the run.

    In a program that Megatron-LM's own launcher started, they are `megatron.training`'s, with `mm` added.

    Raises:
        UserError: no job runs in this process.
    """
    if _current is not None:
        return _current
    megatron = _megatron_training()
    if megatron is not None:
        try:
            args = megatron.get_args()
        except AssertionError:  # its way to say that they are not initialized
            pass
        else:
            merge_mm_args(args)
            return args
    raise UserError(
        "get_args(): no job runs in this process; `mm train` sets the arguments once the job is checked. Elsewhere read "
        'files with mm_core.config.MMConfig({"model": PATH}) and flags with mm_core.config.parse_train_flags(WORDS).'
    )


def merge_mm_args(args: Any) -> None:
    """Read the files that `args.mm_model`, `args.mm_data` and `args.mm_tool` name, into `args.mm`; once.

    Raises:
        ConfigError: a file cannot be read.
        UserError: `args` has none of the three.
    """
    if hasattr(args, "mm"):
        return
    if not any(hasattr(args, name) for name in _PATHS):
        raise UserError(
            f"merge_mm_args: the arguments have none of {', '.join(_PATHS)}; add one, as --mm-model does."
        )
    args.mm = MMConfig({name.removeprefix("mm_"): getattr(args, name, None) for name in _PATHS})


def set_args(job: TrainingJob) -> None:
    """Make a checked job the one that `get_args` returns, here and in Megatron-LM where that is installed."""
    global _current
    clear_args()
    flags = job.flags
    args = JobArgs(**{name: getattr(flags, name) for name in type(flags).model_fields})
    given = {"model": flags.mm_model, "data": flags.mm_data, "tool": flags.mm_tool}
    documents = {
        "model": job.documents["model"],
        "data": job.documents["data"],
        "tool": job.documents["tools"],
    }
    args.mm = MMConfig.from_documents({name: documents[name] for name, path in given.items() if path})
    _current = args
    _hand_over(args)


def clear_args() -> None:
    """Forget the arguments: the job has ended."""
    global _current
    megatron = sys.modules.get("megatron.training.global_vars")
    if _current is not None and megatron is not None and getattr(megatron, "_GLOBAL_ARGS", None) is _current:
        megatron.set_args(None)
    _current = None


def _megatron_training() -> ModuleType | None:
    """Return the package `megatron.training`, or `None` if it is not installed."""
    loaded = sys.modules.get("megatron.training")
    if loaded is not None:
        return loaded
    try:
        found = importlib.util.find_spec("megatron.training")
    except ModuleNotFoundError:  # no megatron at all
        return None
    return importlib.import_module("megatron.training") if found else None


def _hand_over(args: JobArgs) -> None:
    """Let `megatron.training.get_args()` return these arguments too, unless it has some of its own."""
    try:
        if _megatron_training() is None:
            return
        megatron = importlib.import_module("megatron.training.global_vars")
    except Exception as error:  # noqa: BLE001 - a checkout that the job itself does not need
        log.warning(
            "megatron.training cannot be imported (%s: %s): its get_args() knows no job",
            type(error).__name__,
            error,
        )
        return
    try:
        megatron.get_args()
    except AssertionError:
        megatron.set_args(args)
    else:
        log.warning("megatron.training has arguments already; its get_args() returns those, not the job's")
