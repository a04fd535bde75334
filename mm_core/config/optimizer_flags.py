"""Flags of `mm train` for the optimizer and the learning rate. Names and meanings are Megatron-LM's."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mm_core.config.findings import Finding, clip
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import SectionModel

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


_MUON = "only the Muon optimizer reads it"


def factor_of(entry: str) -> tuple[str, float | None]:
    """Return name and factor of an entry of `--lr-scale-modules`: `name` or `name:factor`; None: that of `--lr-mult`.

    Raises:
        ValueError: there is no name, or the factor is no positive number.
    """
    name, colon, text = (part.strip() for part in entry.partition(":"))
    factor = float(text) if colon else None
    if not name or (factor is not None and not 0.0 < factor < float("inf")):
        raise ValueError(entry)
    return name, factor


def _factors(entries: list[str] | None) -> list[str] | None:
    for entry in entries or ():
        try:
            factor_of(entry)
        except ValueError:
            text = f'"{clip(entry)}" is no NAME and no NAME:FACTOR with a factor above 0, such as head:0.1'
            raise PydanticCustomError("invalid_value", "{why}", {"why": text}) from None
    return entries


class OptimizerFlags(SectionModel):
    """Optimizer"""

    optimizer: Annotated[
        Literal["adam", "sgd", "muon"], NotYet("adam", reason="AdamW is the only optimizer so far")
    ] = "adam"
    optimizer_selection: Annotated[
        Literal["fused_torch_adamw", "torch_adamw", "fused_adamw"], _help("which AdamW; all are torch's")
    ] = "fused_torch_adamw"
    lr: Annotated[float, _help("learning rate after warm-up; required", gt=0.0)] = 1e-5
    min_lr: Annotated[float, _help("learning rate at the end of the decay", ge=0.0)] = 0.0
    adam_beta1: Annotated[float, _help("decay of the first moment", ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, _help("decay of the second moment", ge=0.0, lt=1.0)] = 0.999
    adam_eps: Annotated[float, _help("added to the square root of the second moment", gt=0.0)] = 1e-8
    weight_decay: Annotated[float, _help("decoupled weight decay", ge=0.0)] = 0.01
    clip_grad: Annotated[float, _help("largest 2-norm of the gradient; 0 does not clip", ge=0.0)] = 1.0
    ema_decay: Annotated[
        float | None,
        _help(
            "keep an exponential moving average of the trained weights, of this decay, such as 0.999; it is part of each "
            "checkpoint",
            ge=0.0,
            lt=1.0,
        ),
    ] = None
    lr_mult: Annotated[
        float,
        _help("the learning rate of --lr-scale-modules is multiplied by it", gt=0.0, allow_inf_nan=False),
    ] = 1.0
    lr_scale_modules: Annotated[
        list[str] | None,
        AfterValidator(_factors),
        _help(
            "parameters whose learning rate is another: parts of their names, such as patch_embedding, or patterns of "
            "modules, such as blocks.{0-3}; NAME:FACTOR has a factor of its own. The first one that fits counts"
        ),
    ] = None
    weight_decay_exclude_modules: Annotated[
        list[str] | None,
        _help("parameters without weight decay, named as for --lr-scale-modules, such as bias,norm"),
    ] = None
    enable_dummy_optimizer: Annotated[bool, NoEffect("every rank has parameters to train")] = False
    matched_adamw_rms: Annotated[float | None, NoEffect(_MUON)] = None
    muon_momentum: Annotated[float | None, NoEffect(_MUON)] = None
    ns_steps: Annotated[int | None, NoEffect(_MUON)] = None


class ScheduleFlags(SectionModel):
    """Schedule"""

    train_iters: Annotated[int, _help("optimizer steps of the whole run; required", ge=1, le=2**40)] = 1
    train_samples: Annotated[
        int | None, Only(None, reason="state the length of the run as --train-iters")
    ] = None
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        _help(
            "shape of the learning rate after warm-up; WSD stays high until --lr-wsd-decay-iters before the end"
        ),
    ] = "linear"
    lr_decay_iters: Annotated[
        int | None, _help("optimizer steps until --min-lr; default: --train-iters", ge=1)
    ] = None
    lr_wsd_decay_style: Annotated[
        Literal["exponential", "linear", "cosine", "minus_sqrt"],
        _help("shape of the decay of WSD"),
    ] = "exponential"
    lr_wsd_decay_iters: Annotated[
        int | None, _help("optimizer steps of the decay of WSD, the last ones of --lr-decay-iters", ge=1)
    ] = None
    lr_warmup_iters: Annotated[int, _help("optimizer steps of linear warm-up", ge=0)] = 0
    lr_warmup_fraction: Annotated[
        float | None,
        _help("warm-up as a share of --lr-decay-iters, or of --train-iters without it", ge=0.0, le=1.0),
    ] = None
    lr_warmup_init: Annotated[float, _help("learning rate from which warm-up starts", ge=0.0)] = 0.0
    exit_interval: Annotated[
        int | None, _help("optimizer steps: leave, after saving, at a multiple of it", ge=1)
    ] = None
    override_opt_param_scheduler: Annotated[bool, NoEffect("the flags always decide the schedule")] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool, Only(False, reason="the flags decide the schedule; give the flags of the earlier run")
    ] = False


def check_optimizer(flags: "TrainFlags") -> list[Finding]:
    """Return what flags of these groups do not fit each other, as errors or notes."""
    findings = []
    steps = flags.lr_decay_iters or flags.train_iters
    if flags.lr_decay_style == "WSD":
        if flags.lr_wsd_decay_iters is None:
            text = "WSD needs --lr-wsd-decay-iters: it says how many of the last steps decay"
            mend = f"Add --lr-wsd-decay-iters {max(1, steps // 10)}, a tenth of all steps"
            findings.append(flags.finding("lr_decay_style", "missing-flag", text, mend))
        elif flags.lr_wsd_decay_iters > steps and "train_iters" in flags.model_fields_set:
            text = f"{flags.lr_wsd_decay_iters} steps of decay do not fit into {steps} steps"
            findings.append(flags.finding("lr_wsd_decay_iters", "out-of-range", text))
    else:
        for name in ("lr_wsd_decay_style", "lr_wsd_decay_iters"):
            if name in flags.model_fields_set:
                findings.append(_idle(flags, name, "only --lr-decay-style WSD reads it"))
    plain = [entry for entry in flags.lr_scale_modules or () if factor_of(entry)[1] is None]
    if plain and flags.lr_mult == 1.0:
        text = f"the learning rate of {', '.join(plain)} is multiplied by --lr-mult, which is 1"
        findings.append(_idle(flags, "lr_scale_modules", text))
    elif flags.lr_mult != 1.0 and not plain:
        findings.append(
            _idle(flags, "lr_mult", "--lr-scale-modules names nothing without a factor of its own")
        )
    if flags.weight_decay_exclude_modules and flags.weight_decay == 0.0:
        findings.append(_idle(flags, "weight_decay_exclude_modules", "--weight-decay is 0"))
    return findings


def _idle(flags: "TrainFlags", name: str, why: str) -> Finding:
    return Finding.at(
        flags.origin(name), "note", "no-effect", f"it has no effect: {why}", path=flags.spelling(name)
    )
