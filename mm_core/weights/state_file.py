"""`state.json`: everything of a checkpoint that is no tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_core.weights import layout
from mm_core.weights.errors import WeightsError

STATE = "state.json"
FORMAT = 1
_REQUIRED = ("step", "consumed_samples", "seed")
_OPTIONAL = ("dataset_samples",)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, checked: what is used of it is there and of the right kind.

    `state.plugins`, which older checkpoints lack, is `{}` then.

    Raises:
        WeightsError: it is missing or damaged, or was written by a newer version.
    """
    file = checkpoint / STATE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read: {error}.{layout.older(checkpoint)}") from error
    if not isinstance(content, dict):
        raise _damaged(checkpoint, "it is no object")
    if content.get("format") != FORMAT:
        raise WeightsError(
            f"{file} has format {content.get('format')!r}; this version reads format {FORMAT}."
            f"{layout.older(checkpoint)}"
        )
    for key in ("iteration", "world_size"):
        if not _is_integer(content.get(key)) or content[key] < 0:
            what = f"{key} is {_shown(content.get(key))}, but must be an integer that is not negative"
            raise _damaged(checkpoint, what)
    reason = fault_of_state(content.get("state")) or _fault_of_optimizer(content.get("optimizer"))
    if reason:
        raise _damaged(checkpoint, reason)
    content["state"].setdefault("plugins", {})
    content.setdefault("optimizer", None)
    result: dict[str, Any] = content
    return result


def fault_of_state(state: Any) -> str | None:
    """What is wrong with the state of a run, which must have `step`, `consumed_samples` (not negative) and
    `seed`, all integers, and may have `plugins`, an object of versions; `None` if nothing is.
    """
    if not isinstance(state, Mapping):
        return f"state is {_shown(state)}, but must be an object"
    for key in _REQUIRED:
        if key not in state:
            return f"state has no {key}"
    for key in (*_REQUIRED, *_OPTIONAL):
        if key not in state:
            continue
        value = state[key]
        if not _is_integer(value):
            return f"state.{key} is {_shown(value)}, but must be an integer"
        if key != "seed" and value < 0:
            return f"state.{key} is {value}, but must not be negative"
    plugins = state.get("plugins", {})
    if not isinstance(plugins, Mapping) or not all(isinstance(v, str) for v in plugins.values()):
        return f"state.plugins is {_shown(plugins)}, but must be an object of versions"
    return None


def _fault_of_optimizer(settings: Any) -> str | None:
    """As `NamedOptimizer.settings()` made it, or `None`."""
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        return f"optimizer is {_shown(settings)}, but must be an object"
    groups, scalars = settings.get("groups"), settings.get("scalars")
    if not isinstance(groups, list) or not isinstance(scalars, Mapping):
        return "optimizer must have groups, a list, and scalars, an object"
    for number, group in enumerate(groups):
        if (
            not isinstance(group, Mapping)
            or not isinstance(group.get("params"), list)
            or not all(isinstance(name, str) for name in group["params"])
            or not isinstance(group.get("hyperparameters"), Mapping)
        ):
            return f"optimizer.groups[{number}] must have params, a list of names, and hyperparameters"
    for name, value in scalars.items():
        if value is not None and not isinstance(value, int | float):
            return f"optimizer.scalars[{name!r}] is {_shown(value)}, but must be a number"
    return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _damaged(checkpoint: Path, reason: str) -> WeightsError:
    return WeightsError(f"{checkpoint} is damaged: {STATE}: {reason}.{layout.older(checkpoint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
