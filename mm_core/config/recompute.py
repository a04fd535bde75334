"""Recomputation in Megatron's words, as flags and sections of models have it, and in those of fsdp2.yaml.

Megatron counts layers; fsdp2.yaml names modules. `block` and a number are the first so many of the modules that are
recomputed by default; `uniform` is all of them, whose number would say how many layers make one checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mm_core.config.findings import Finding, show

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags
    from mm_core.config.fsdp2 import Fsdp2Config

Granularity = Literal["full", "selective"]
Method = Literal["uniform", "block"]
KEYS = ("recompute_granularity", "recompute_method", "recompute_num_layers")


def recompute_problem(
    granularity: Granularity | None, method: Method | None, num_layers: int | None
) -> tuple[str, str, str] | None:
    """Return what is wrong with Megatron's three values: the key to blame, why, and how to mend it; else None."""
    if method is not None and granularity != "full":
        has = "which is missing" if granularity is None else f"not {show(granularity)}"
        why = f'{show(method)} chooses among layers that are recomputed in full: it needs granularity "full", {has}'
        mend = "Add it" if granularity is None else 'Use "full"'
        return "recompute_method", why, f"{mend}, or take the method out"
    if num_layers is not None and method is None:
        why = f'{num_layers} needs a method: "block" recomputes the first {num_layers} layers, "uniform" all of them'
        return "recompute_num_layers", why, "Add one of the two, or take the number out"
    if method == "block" and num_layers is None:
        why = '"block" recomputes the first layers, and no number of layers says how many'
        return "recompute_method", why, 'Add the number, or use "uniform"'
    return None


def with_recompute_flags(fsdp2: Fsdp2Config, flags: TrainFlags) -> tuple[Fsdp2Config, list[Finding]]:
    """Fill what fsdp2.yaml leaves open from `--recompute-granularity`, `--recompute-method` and
    `--recompute-num-layers`.

    Returns:
        The configuration, and errors about flags that do not go together or notes about those without effect.
    """
    given = [name for name in KEYS if getattr(flags, name) is not None]
    if not given:
        return fsdp2, []
    granularity, method, number = (getattr(flags, name) for name in KEYS)
    problem = recompute_problem(granularity, method, number)
    if problem is not None:
        return fsdp2, [flags.finding(problem[0], "missing-flag", *problem[1:])]

    findings = []
    values: dict[str, Any] = {"recompute_granularity": granularity}
    if method is not None:  # None is all of them, whatever a policy says
        values["recompute_num_layers"] = number if method == "block" else None
    if method == "uniform" and number not in (None, 1):
        findings.append(
            _note(flags, "recompute_num_layers", f"{number} layers would be one checkpoint; here each is one")
        )
    written = {name for name in values if fsdp2.source(name) is not None}
    for name in sorted(written):
        if getattr(fsdp2, name) != values[name]:
            decides = f"fsdp2.yaml decides, where {name} is {show(getattr(fsdp2, name))}"
            findings.append(_note(flags, name, f"it has no effect: {decides}"))
    modules = fsdp2.recompute_modules
    if fsdp2.source("recompute_modules") is not None and modules is not None:
        chooses = "recompute_modules in fsdp2.yaml chooses what is recomputed"
        silent = () if modules else ("recompute_granularity",)
        findings += [
            _note(flags, name, f"it has no effect: {chooses}{'' if modules else ', which is nothing'}")
            for name in given
            if name in ("recompute_method", "recompute_num_layers", *silent) and name not in written
        ]
        values.pop("recompute_num_layers", None)
    values = {name: value for name, value in values.items() if name not in written}
    if values.get("recompute_granularity") == "selective" and fsdp2.use_reentrant:
        text = "selective recomputation cannot be done with use_reentrant: true of fsdp2.yaml"
        mend = "Take use_reentrant out, or use full"
        return fsdp2, [*findings, flags.finding("recompute_granularity", "conflict", text, mend)]
    for name, value in values.items():
        fsdp2 = fsdp2.filled({name: value}, flags.spelling(name))
    return fsdp2, findings


def _note(flags: TrainFlags, name: str, text: str) -> Finding:
    return Finding.at(flags.origin(name), "note", "no-effect", text, path=flags.spelling(name))
