"""What an autoencoder's section says about its latents, before anything is built.

An autoencoder's config class may have, torch-free:

- `latent_channels`: a property (or field), channels of the latents, None if it cannot be told;
- `latent_strides`: a property (or field), how many frames, rows and columns of the video one of the latents stands for;
- `size_problem(frames, height, width)`: why a video of these sizes cannot be encoded, None if it can. A
  text that begins with `frames`, `height` or `width` is shown at that number.

All speak of the network that the section describes, defaults included. For a pretrained one the fields that
the section leaves open are first filled from the folder's `config.json`; without that file nothing is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, expanded
from mm_core.config.findings import Finding
from mm_core.config.origin import KeyPath
from mm_core.config.parts import effective_fields
from mm_core.config.section import SectionModel
from mm_registry.errors import UserError

_MAX_HF_CONFIG_BYTES = 4 * 1024 * 1024


def latent_channels(ae: ComponentConfig) -> int | None:
    """Return the channels of the latents as the autoencoder's config class tells them.

    Raises:
        UserError: the property of a plugin's class raised; its distribution is named.
    """
    channels = _told(ae, _described(ae), "latent_channels")
    return channels if isinstance(channels, int) and not isinstance(channels, bool) else None


def latent_strides(ae: ComponentConfig | None, predictor: ComponentConfig) -> tuple[int, int, int] | None:
    """Return how many frames, rows and columns of the video one of the latents stands for, as the autoencoder's config
    class tells them; if it does not, or there is none, as the predictor's tells of the latents that it was made for.

    Raises:
        UserError: as `latent_channels`.
    """
    asked = [] if ae is None else [(ae, _described(ae))]
    for component, config in (*asked, (predictor, predictor.config)):
        strides = _told(component, config, "latent_strides")
        if (
            isinstance(strides, list | tuple)
            and len(strides) == 3
            and all(type(s) is int and s > 0 for s in strides)
        ):
            return strides[0], strides[1], strides[2]
    return None


def _told(component: ComponentConfig, config: BaseModel | None, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{component.label}: {name} of {component.spec.provider}'s config class raised {text}"
        ) from error


def check_size(
    ae: ComponentConfig, document: Document, places: Mapping[str, KeyPath], sizes: Mapping[str, Any]
) -> Iterator[Finding]:
    """The autoencoder must be able to encode a video of these sizes.

    Args:
        places: where `frames`, `height` and `width` stand in `document`.
        sizes: their values; nothing is checked unless all are whole numbers.
    """
    numbers = [sizes.get(axis) for axis in ("frames", "height", "width")]
    described = _described(ae)
    ask = getattr(described, "size_problem", None)
    if not callable(ask) or not all(type(number) is int for number in numbers):
        return
    try:
        problem = ask(*numbers)
    except Exception as error:  # noqa: BLE001 - a plugin's method may raise anything
        cls = type(described)
        text = f"{cls.__module__}.{cls.__qualname__}.size_problem failed, {type(error).__name__}: {error}"
        yield Finding.at(document.origin(places["frames"]), "error", "broken-config", text)
        return
    if not isinstance(problem, str):
        return
    axis = problem.split(" ", 1)[0]
    path = places.get(axis, places["frames"])
    size = str(sizes[axis]) if axis in places else " × ".join(map(str, numbers))
    text = f"{_name(path)} is {size}, which {ae.label} cannot encode: {problem}"
    yield Finding.at(document.origin(path), "error", "size", text, path=path)


def read_hf_config(folder: Path) -> Mapping[str, Any]:
    """Return the `config.json` of a folder of weights; nothing if it cannot be read."""
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > _MAX_HF_CONFIG_BYTES:
            return {}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the loader opens it again and says what is wrong with it
    return data if isinstance(data, dict) else {}


def _described(ae: ComponentConfig) -> BaseModel | None:
    config = ae.config
    weightless = isinstance(config, SectionModel) and not config.has_weights
    if config is None or weightless or ae.init == "random":
        return config
    folder = read_hf_config(expanded(ae.from_pretrained)) if ae.from_pretrained else {}
    if not folder:
        return None
    fields = dict(effective_fields(config))
    for name in type(config).model_fields:
        if name in folder and fields.get(name) is None:
            fields[name] = folder[name]
    try:
        return type(config).model_validate(fields)
    except Exception:  # noqa: BLE001 - the folder's own values; the loader says what is wrong with them
        return None


def _name(path: KeyPath) -> str:
    return f"{path[-2]}[{path[-1]}]" if isinstance(path[-1], int) else str(path[-1])
