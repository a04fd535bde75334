"""Positions of datasets and loaders as JSON: what `state_dict()` returns may hold a little more than JSON can."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mm_core.data.errors import DataError

_KIND = "$kind"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip


def to_json(value: Any, place: str = "state") -> Any:
    """Return JSON-able data from which `from_json` makes an equal value: numbers, texts, lists, tuples, sets, bytes, mappings,
    tensors, arrays.

    Args:
        place: of the value, for messages.

    Raises:
        DataError: there is something else in it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple | set | frozenset):
        items = [to_json(item, place) for item in (value if isinstance(value, tuple) else sorted(value))]
        return {_KIND: "tuple" if isinstance(value, tuple) else "set", "items": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: to_json(item, f"{place}.{key}") for key, item in value.items()}
        pairs = [[to_json(key, place), to_json(item, f"{place}.{key}")] for key, item in value.items()]
        return {_KIND: "mapping", "items": pairs}
    if isinstance(value, bytes | bytearray):
        return {_KIND: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return to_json(value.item(), place)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_KIND: "array", "dtype": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, torch.Tensor) and (name := str(value.dtype).removeprefix("torch.")) in _DTYPES:
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {
            _KIND: "tensor",
            "dtype": name,
            "shape": list(value.shape),
            "data": base64.b64encode(raw).decode(),
        }
    raise DataError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold; return numbers, texts, lists, "
        "mappings, tensors or arrays from state_dict"
    )


def from_json(value: Any) -> Any:
    """Return what `to_json` was given; sets, tuples and tensors as such.

    Raises:
        DataError: it is not what `to_json` makes.
    """
    try:
        return _decoded(value)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"a stored position cannot be read: {error}") from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {key: _decoded(item) for key, item in value.items()}
    match value[_KIND]:
        case "tuple":
            return tuple(_decoded(item) for item in value["items"])
        case "set":
            return {_decoded(item) for item in value["items"]}
        case "mapping":
            return {_decoded(key): _decoded(item) for key, item in value["items"]}
        case "bytes":
            return base64.b64decode(value["data"])
        case "array":
            dtype = np.dtype(value["dtype"])
            if dtype.kind not in "biuf":
                raise ValueError(f"no array has dtype {value['dtype']}")
            return np.frombuffer(base64.b64decode(value["data"]), dtype).reshape(value["shape"]).copy()
        case "tensor":
            raw = torch.frombuffer(
                bytearray(base64.b64decode(value["data"])) or bytearray(1), dtype=torch.uint8
            )
            dtype = _DTYPES[value["dtype"]]
            numel = int(np.prod(value["shape"]))
            return raw[: numel * dtype.itemsize].view(dtype).reshape(value["shape"]).clone()
    raise ValueError(f"nothing is of kind {value[_KIND]!r}")
