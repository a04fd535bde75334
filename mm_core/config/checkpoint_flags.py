"""Flags of `mm train` for checkpoints. Names and meanings are Megatron-LM's."""

from typing import Annotated, Any

from pydantic import Field

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


class CheckpointFlags(SectionModel):
    """Checkpoints"""

    load: Annotated[
        str | None,
        _help(
            "run or checkpoint to continue, or a Hugging Face folder with the predictor's weights",
            min_length=1,
        ),
    ] = None
    save: Annotated[str | None, _help("folder of the run: metrics, logs, checkpoints", min_length=1)] = None
    save_interval: Annotated[
        int | None, _help("optimizer steps between checkpoints; the last one is saved too", ge=1)
    ] = None
    save_hf: Annotated[
        bool,
        _help(
            "with each checkpoint also write <save>/hf/iter_…/predictor, a folder that diffusers and transformers load; "
            "these folders are never removed"
        ),
    ] = False
    ckpt_format: Annotated[
        str, Only("torch_dcp", reason="checkpoints are torch's distributed checkpoints")
    ] = "torch_dcp"
    finetune: Annotated[bool, _help("take only the weights of --load; start at step 0")] = False
    accept_changes: Annotated[
        bool,
        _help(
            "continue --load with other plugins or another configuration than its checkpoint was written with"
        ),
    ] = False
    no_load_optim: Annotated[bool, _help("do not load the optimizer's state")] = False
    no_load_rng: Annotated[bool, _help("do not load the generators' states")] = False
    no_save_optim: Annotated[bool, _help("do not save the optimizer's state")] = False
    no_save_rng: Annotated[bool, _help("do not save the generators' states")] = False
    async_save: Annotated[bool, NoEffect("training goes on while a checkpoint is written, by default")] = (
        False
    )
    no_async_save: Annotated[
        bool,
        _help(
            "let training wait until a checkpoint is written; otherwise it goes on, and the machine's memory holds a copy"
        ),
    ] = False
    keep_last: Annotated[
        int | None,
        _help("checkpoints that stay: so many of the newest ones; default: all", ge=1),
    ] = None
    keep_every: Annotated[
        int | None,
        _help("optimizer steps: with --keep-last, a checkpoint at a multiple of it stays too", ge=1),
    ] = None
    exit_on_missing_checkpoint: Annotated[bool, NoEffect("a missing checkpoint is always an error")] = False
    no_load_strict: Annotated[bool, Only(False, reason="weights are always loaded strictly")] = False
