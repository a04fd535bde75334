"""Networks of diffusers and transformers without their weights: built on the meta device from a folder's config.json,
and compared with the headers of its weights.

Wrappers of such networks load them by `mm_core.models.pretrained.load_pretrained`; within `collect_skeletons()` that
gives skeletons, so that a wrapper's own checks run and no tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

from mm_core.weights.errors import WeightsError
from mm_core.weights.fit import FolderFit, fit_problems
from mm_core.weights.headers import StoredTensor, read_headers
from mm_core.weights.hf_folder import known_recipes, weight_files
from mm_core.weights.mapping import module_recipes
from mm_core.weights.recipe import result_shape
from mm_registry.errors import UserError
from mm_registry.words import described

M = TypeVar("M", bound=torch.nn.Module)

_COLLECTED: ContextVar[list[FolderFit] | None] = ContextVar("collected skeletons", default=None)


@contextmanager
def collect_skeletons() -> Iterator[list[FolderFit]]:
    """Let `load_pretrained` build skeletons, in this thread; yields the list of what the folders' headers said."""
    found: list[FolderFit] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


def collecting() -> bool:
    """Whether `load_pretrained` is to build skeletons."""
    return _COLLECTED.get() is not None


def build_skeleton(cls: type[M], folder: Path, *, dtype: torch.dtype | None, what: str) -> M:
    """Build the network that a folder's config.json describes on the meta device; what its headers say otherwise is
    collected.

    Args:
        cls: a class of diffusers or transformers.
        dtype: of the parameters; None is fp32.
        what: the configuration's section, for messages.

    Raises:
        UserError: config.json cannot be used.
        WeightsError: the files cannot be read.
    """
    try:
        with torch.device("meta"):
            model = _construct(cls, folder).to(dtype or torch.float32)
    except Exception as error:
        raise UserError(
            f"{what}: {cls.__name__} cannot be built from {str(folder / 'config.json')!r}: {described(error)}"
        ) from error
    files = weight_files(folder)
    stored = read_headers(files)
    shapes, tied, exact = _as_loaded(model, stored)
    problems = (
        fit_problems(
            dict(model.state_dict(keep_vars=True)),
            shapes,
            tied=tied,
            unexpected_allowed=True,  # both libraries pass over them; a whole model's folder may hold a tower's weights
            label=cls.__name__,
        )
        if exact
        else []
    )
    collected = _COLLECTED.get()
    if collected is not None:
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        collected.append(FolderFit(folder, len(files), len(stored), nbytes, tuple(problems), compared=exact))
    return model


def _construct(cls: Any, folder: Path) -> Any:
    if hasattr(cls, "config_class") and hasattr(cls.config_class, "from_pretrained"):  # transformers
        return cls(cls.config_class.from_pretrained(str(folder), local_files_only=True))
    return cls.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _as_loaded(
    model: torch.nn.Module, stored: dict[str, StoredTensor]
) -> tuple[dict[str, tuple[int, ...]], set[str], bool]:
    """Return the shapes by the names that the library gives them when it loads, names that need not be stored, and
    whether that can be told.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    ties = getattr(model, "all_tied_weights_keys", None)
    if ties is None:  # diffusers
        fix = getattr(model, "_fix_state_dict_keys_on_load", None)
        if callable(fix):
            fix(shapes)  # attention of old folders is renamed, in place
        return shapes, set(), True
    own = model.state_dict(keep_vars=True)
    try:
        recipes = known_recipes(model, module_recipes(model, None, shapes), own)
        renamed = {name: result_shape(recipe, shapes) for name, recipe in recipes.items()}
    except (
        WeightsError
    ):  # an operation of transformers that has no recipe, or tensors that do not go together
        return shapes, set(), False
    stored_once = any(name in renamed for pair in ties.items() for name in pair)
    optional = {*ties, *ties.values()} if stored_once else set()
    for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ():
        optional |= {name for name in own if re.search(pattern, name)}
    return renamed, optional, True
