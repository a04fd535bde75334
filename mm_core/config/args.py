"""The arguments of the running job, as MindSpeed-MM's code asks for them: `get_args().mm.model`.

Where a source checkout of Megatron-LM offers `megatron.training` (the PyPI wheels hold `megatron.core` alone), its
`get_args` returns the same object. Imports no torch and no pydantic by itself.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mm_core.config.classic import MMConfig
from mm_core.config.findings import closest
from mm_core.megatron.arguments import arguments_of_megatron, hand_over, take_back
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.job import TrainingJob

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
    args = arguments_of_megatron()
    if args is not None:
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
    args.mm_model, args.mm_data, args.mm_tool = (flags.source(name) for name in ("model", "data", "tools"))
    documents = {"model": "model", "data": "data", "tool": "tools"}
    args.mm = MMConfig.from_documents(
        {
            name: job.documents[section]
            for name, section in documents.items()
            if job.documents[section].data or flags.source(section)
        }
    )
    _current = args
    hand_over(args)


def clear_args() -> None:
    """Forget the arguments: the job has ended."""
    global _current
    if _current is not None:
        take_back(_current)
    _current = None
