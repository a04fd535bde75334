"""Names, dtypes and shapes of a safetensors file, from its header: no tensor is read.

A file is 8 bytes with the length of the header (little-endian), the header (a JSON object), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.weights.errors import WeightsError

_LENGTH = 8
_LARGEST = 100_000_000  # bytes of a header, safetensors' own limit
_METADATA = "__metadata__"
#: torch has no more dimensions; the product of very many sizes would take hours.
_MOST_DIMENSIONS = 64
_LONGEST_DTYPE = 16
#: Bits of an element, by the format's names; others are taken as they come.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: by safetensors' name, such as `BF16`.
        shape: of the whole tensor.
        nbytes: what it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Located:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        offset: of its first byte in the file.
        tensor: what it is.
    """

    file: Path
    offset: int
    tensor: StoredTensor


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        WeightsError: it cannot be read, is none, or has not as many bytes as its header says.
    """
    return {name: found.tensor for name, found in locate(file).items()}


def locate(file: Path) -> dict[str, Located]:
    """Return the tensors of a safetensors file by name, and where their bytes are.

    Raises:
        WeightsError: as `read_header`.
    """
    data, tensors, first = _parsed(file)
    return {
        name: Located(file, first + data[name]["data_offsets"][0], tensor) for name, tensor in tensors.items()
    }


def header_texts(file: Path) -> dict[str, str]:
    """Return what the header of a safetensors file says besides its tensors, such as the settings of an adapter.

    Raises:
        WeightsError: as `read_header`; or these are no texts.
    """
    texts = _parsed(file)[0].get(_METADATA, {})
    if not isinstance(texts, dict) or not all(map(_is_text, (*texts, *texts.values()))):
        raise WeightsError(
            f"{file} is no safetensors file: its {_METADATA} are {_short(texts)}, and may be texts only"
        )
    return texts


def _parsed(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor], int]:
    """The header, its tensors by name, and where their bytes begin."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise WeightsError(f"{file} is no regular file")  # opening a pipe would wait for a writer
        with open(file, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            length = int.from_bytes(source.read(_LENGTH), "little")
            if size < _LENGTH or length > size - _LENGTH:
                raise WeightsError(_cut_short(file, size, length))
            if length > _LARGEST:
                raise WeightsError(
                    f"{file} is no safetensors file: its header would have {length} bytes, and {_LARGEST} are the most"
                )
            raw = source.read(length)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}") from error
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise WeightsError(f"{file} is no safetensors file: its header is no JSON ({why})") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{file} is no safetensors file: its header is no JSON object")
    tensors = {name: _tensor(file, name, entry) for name, entry in data.items() if name != _METADATA}
    _check_bytes(file, data, size - _LENGTH - length)
    return data, tensors, _LENGTH + length


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of all files of a folder by name.

    Raises:
        WeightsError: as `read_header`; or a name is in two files.
    """
    return {name: found.tensor for name, found in locate_all(files).items()}


def locate_all(files: Iterable[Path]) -> dict[str, Located]:
    """Return the tensors of all files of a folder by name, and where their bytes are.

    Raises:
        WeightsError: as `read_headers`.
    """
    tensors: dict[str, Located] = {}
    for file in files:
        for name, found in locate(file).items():
            if name in tensors:
                short = name if len(name) <= 120 else name[:119] + "…"
                raise WeightsError(
                    f"{file.parent}: {short} is in {tensors[name].file.name} and in {file.name}"
                )
            tensors[name] = found
    return tensors


def _cut_short(file: Path, size: int, length: int) -> str:
    if size < _LENGTH:
        return f"{file} is no safetensors file: it has {size} bytes, and the length of its header alone takes {_LENGTH}"
    return (
        f"{file} is no safetensors file, or was cut off: its header would have {length} bytes, but only "
        f"{size - _LENGTH} follow"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is written twice in one object")
    return result


def _constant(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _is_text(value: object) -> bool:
    """Whether a text can be written: half a surrogate pair, which JSON can spell, cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _tensor(file: Path, name: str, entry: object) -> StoredTensor:
    if not name or not name.isprintable():
        raise WeightsError(f"{file} is no safetensors file: {_short(name)} is no name of a tensor")
    if isinstance(entry, Mapping):
        dtype, shape, offsets = (
            entry.get("dtype"),
            _sizes(entry.get("shape")),
            _sizes(entry.get("data_offsets")),
        )
        if (
            isinstance(dtype, str)
            and len(dtype) <= _LONGEST_DTYPE
            and dtype.isprintable()
            and shape is not None
            and len(shape) <= _MOST_DIMENSIONS
            and math.prod(size or 1 for size in shape) < 2**63  # an empty tensor has strides too
            and offsets is not None
            and len(offsets) == 2
        ):
            begin, end = offsets
            bits = _BITS.get(dtype)
            wanted = None if bits is None else math.prod(shape) * bits // 8
            if begin <= end and wanted in (None, end - begin):
                return StoredTensor(dtype, tuple(shape), end - begin)
    raise WeightsError(
        f"{file} is no safetensors file: its header describes {_short(name)} as {_short(entry)}"
    )


def _sizes(value: object) -> list[int] | None:
    if isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value):
        return value
    return None


def _check_bytes(file: Path, data: Mapping[str, Any], stored: int) -> None:
    wanted = max((entry["data_offsets"][1] for name, entry in data.items() if name != _METADATA), default=0)
    if stored < wanted:
        raise WeightsError(
            f"{file} was cut off: {wanted - stored} of its {wanted} bytes of tensors are missing; fetch it again"
        )
    if stored > wanted:
        raise WeightsError(f"{file} is no safetensors file: {stored - wanted} bytes follow its last tensor")
    end = 0
    places = ((entry["data_offsets"], name) for name, entry in data.items() if name != _METADATA)
    for (first, last), name in sorted(places):
        if first != end:
            what = "begin inside another tensor" if first < end else "do not follow the tensor before"
            raise WeightsError(f"{file} is no safetensors file: the bytes of {_short(name)} {what}")
        end = last


def _short(entry: object) -> str:
    text = repr(entry)
    return text if len(text) <= 120 else text[:119] + "…"
