"""Flags of validation against the dataset that would be validated with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm_core.config.component import ComponentConfig
from mm_core.config.findings import Finding

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need


def check_validation(dataset: ComponentConfig | None, flags: TrainFlags) -> Iterator[Finding]:
    """`--eval-interval` and `--eval-iters` do nothing without a validation set.

    Args:
        dataset: its config class says with `validates` whether it has one; one without that attribute may have one.
    """
    if dataset is None or getattr(dataset.config, "validates", None) is not False:
        return
    for name in ("eval_interval", "eval_iters"):
        if getattr(flags, name) is None:
            continue
        origin, flag = flags.origin(name), flags.spelling(name)
        said = f'"{name}"' if origin.kind == "file" else flag
        text = f"{said} has no effect here: the dataset has no validation set"
        yield Finding.at(origin, "note", "no-effect", text, path=flag)
