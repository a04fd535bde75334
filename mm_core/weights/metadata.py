"""Reading torch's distributed-checkpoint metadata without trusting it.

`.metadata` is a pickle. Unpickling runs whatever callables the file names, so only the classes that describe
tensors may be named.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from mm_core.weights.errors import WeightsError
from mm_core.weights.layout import older
from mm_core.weights.pickles import PlainKeys, Refused, check_opcodes, shown

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
_SIZE_LIMIT = 1 << 30  # bytes; a model of a million tensors on a thousand ranks stays below


_MOST_ARGUMENTS = 64  # torch has no more dimensions


class _Unpickler(PlainKeys):
    key_types = (MetadataIndex,)
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(PlainKeys.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise Refused(f"it names {module}.{name}, which no tensor's description needs")
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict  # what an OrderedDict is made from would be hashed by itself
        return super().find_class(module, name)

    def _check(self, keys: Collection[object]) -> None:
        super()._check(keys)
        for key in keys:
            if isinstance(key, MetadataIndex) and not _is_plain(vars(key)):
                raise Refused("the place of a tensor is none")

    def _reduce(self) -> None:
        arguments = self.stack[-1]
        parts = [part for part in arguments if isinstance(part, list | tuple | dict | set | frozenset)]
        # A few bytes of a pickle would copy a long list, again and again.
        if any(len(part) > _MOST_ARGUMENTS for part in [arguments, *parts]):
            raise Refused("it makes something of a list that is too long")
        PlainKeys.dispatch[pickle.REDUCE[0]](self)

    def _call(self) -> None:
        raise Refused("it has an opcode that torch does not write")

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.INST[0]] = dispatch[pickle.OBJ[0]] = _call


def _empty_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _is_plain(index: Mapping[str, Any]) -> bool:
    """Whether hashing a `MetadataIndex` of these attributes takes a moment."""
    offset = index.get("offset")
    sizes = () if offset is None else offset
    return (
        type(index.get("fqn")) is str
        and isinstance(sizes, tuple)
        and len(sizes) <= _MOST_ARGUMENTS
        and all(type(size) is int for size in sizes)
    )


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the metadata read by an allowlisting unpickler.

    The tensors themselves are read by torch with `weights_only=True`.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read and check `.metadata`; see `read_metadata`."""
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path, *, only_tensors: bool = True) -> Metadata:
    """The metadata of a checkpoint folder: only descriptions of tensors, all stored in files of this very
    folder.

    Args:
        only_tensors: whether anything else is refused, as it is in a checkpoint of ours; else it is left out of what is
            returned.

    Raises:
        WeightsError: there is none, it holds something else, or points outside the folder.
    """
    file = folder / ".metadata"
    try:
        size = file.stat().st_size
        if size > _SIZE_LIMIT:
            raise WeightsError(f"{file} is {size} bytes long; refused.")
        data = file.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no .metadata; it is no distributed checkpoint.") from None
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error}.") from error
    try:
        check_opcodes(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
        if not only_tensors:
            _leave_objects_out(metadata)
        fault = _fault(metadata, folder)
    # A malformed pickle can raise anything out of the unpickler, and can make objects that lack attributes or
    # hold anything in them.
    except Exception as error:
        raise WeightsError(f"{file} is refused: {error}.{older(folder)}") from error
    if fault is not None:
        raise WeightsError(f"{file} is refused: {fault}.{older(folder)}")
    result: Metadata = metadata
    return result


def _leave_objects_out(metadata: Any) -> None:
    """Forget what is no tensor: it is stored as pickles, which are not read."""
    described = metadata.state_dict_metadata
    metadata.state_dict_metadata = {
        name: entry for name, entry in described.items() if not isinstance(entry, BytesStorageMetadata)
    }


def _fault(metadata: Any, folder: Path) -> str | None:
    """What makes the metadata unusable, or `None`."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        return "it does not describe a checkpoint"
    if not isinstance(metadata.storage_data, dict):
        return "it does not say where the tensors are"
    if not (metadata.storage_meta is None or isinstance(metadata.storage_meta, StorageMeta)):
        return "its storage_meta is of another kind"
    lengths: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            return f"{shown(index)} is no place of a tensor"
        relative = info.relative_path
        if not isinstance(relative, str) or Path(relative).name != relative:
            return f"it points outside its folder, to {shown(relative)}"
        if relative not in lengths:
            path = folder / relative
            if not path.is_file():
                return f"its file {shown(relative)} is missing"
            lengths[relative] = path.stat().st_size
        if not 0 <= info.offset <= info.offset + info.length <= lengths[relative]:
            return f"{index.fqn} lies outside {relative}, at {info.offset} with {info.length} bytes"
        if info.transform_descriptors:
            return f"{index.fqn} is stored in another form, {shown(info.transform_descriptors)}"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            return f"{shown(name)} is no tensor"
        if not isinstance(entry.properties.dtype, torch.dtype):
            return f"{name} has no dtype"
        if not _covered(name, entry, metadata.storage_data):
            return f"the parts of {name} do not make a tensor of shape {list(entry.size)}"
    return None


def _covered(name: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, Any]) -> bool:
    """Whether the parts lie inside the tensor, are stored whole, differ, and have its number of elements together."""
    found = 0
    places = set()
    for chunk in entry.chunks:
        sides = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if not all(0 <= offset <= offset + size <= whole for offset, size, whole in sides):
            return False
        numel = math.prod(chunk.sizes)
        if numel == 0:  # of a rank that holds nothing of a small tensor
            continue
        offsets = tuple(chunk.offsets)
        place = stored.get(MetadataIndex(name, chunk.offsets))
        # A part is stored as torch.save writes it: its elements, and a little more.
        if offsets in places or place is None or place.length < numel * entry.properties.dtype.itemsize:
            return False
        places.add(offsets)
        found += numel
    return found == math.prod(entry.size)
