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
EMA = "ema."  # before a component's name: the averages of its trained weights, `ema.predictor.<key>`
_REQUIRED = ("step", "consumed_samples", "seed")
_OPTIONAL = ("dataset_samples",)
# Objects that older checkpoints lack; what is inside is checked where it is used, or here if it is simple.
_OBJECTS = ("config", "weights", "loader", "schedule", "fingerprint", "versions", "ema")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, checked: what is used of it is there and of the right kind.

    Of what older checkpoints lack, `state.plugins` is `{}` then, and the rest absent.

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
    `seed`, all integers; `None` if nothing is. It may have

    - `plugins`, `versions`: distribution -> version
    - `config`: the resolved configuration; `schedule`: of the learning rate, name -> number or text
    - `fingerprint`: what the components of the job were
    - `weights`: component -> `dtypes` and `layout` that its folder had; see `mm_core.weights.stored`
    - `loader`: where each rank's stream of data was, by rank under `ranks`
    - `ema`: `decay` of the averaged weights
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
    for key in _OBJECTS:
        if not isinstance(state.get(key, {}), Mapping):
            return f"state.{key} is {_shown(state[key])}, but must be an object"
    for key in ("plugins", "versions"):
        versions = state.get(key, {})
        if not isinstance(versions, Mapping) or not all(isinstance(v, str) for v in versions.values()):
            return f"state.{key} is {_shown(versions)}, but must be an object of versions"
    for component, stored in state.get("weights", {}).items():
        parts = [stored.get(key) if isinstance(stored, Mapping) else None for key in ("dtypes", "layout")]
        if not all(isinstance(part, Mapping) for part in parts):
            return (
                f"state.weights.{component} is {_shown(stored)}, but must have objects `dtypes` and `layout`"
            )
    for key, value in state.get("schedule", {}).items():
        if not isinstance(value, str | int | float):
            return f"state.schedule.{key} is {_shown(value)}, but must be a number or a text"
    return _fault_of_loader(state.get("loader"))


def _fault_of_loader(loader: Any) -> str | None:
    """As `Trainer` made it, or `None`."""
    if loader is None:
        return None
    for key in ("num_workers", "micro_batch_size"):
        if not _is_integer(loader.get(key)) or loader[key] < 0:
            return f"state.loader.{key} is {_shown(loader.get(key))}, but must be an integer that is not negative"
    if not isinstance(loader.get("ranks"), list) or not loader["ranks"]:
        return "state.loader.ranks must be a list of each rank's position"
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
