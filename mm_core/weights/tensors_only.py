"""The tensors of a file that `torch.save` wrote, and nothing else of it.

Such a file is a zip archive of a pickle and of the tensors' bytes. Unpickling runs whatever the pickle names; here it may name
what describes a tensor, and everything else (argparse's Namespace, states of generators, an optimizer's classes)
becomes an object that holds nothing and does nothing. No function of a module that the file names is run, and nothing is
allocated that the file has no bytes for.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from mm_core.weights.errors import WeightsError
from mm_core.weights.pickles import PlainKeys, Refused, check_opcodes, shown
from mm_registry.words import described

_LARGEST_PICKLE = 1 << 28  # bytes; that of a million tensors stays below
_MOST_DIMENSIONS = 64
#: Of a zip entry: signature, lengths of its name and of its extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class _Fixed:
    """What a pickle can name and use, and not change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise Refused("it changes what only it describes")


class SavedTensor(_Fixed):
    """A tensor in the file: where its elements are.

    Attributes:
        storage: name of the entry that holds its bytes.
        dtype, shape, stride: as torch's; strides in elements.
        offset: of the first element, in elements.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(
        self, storage: str, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> None:
        self.storage, self.dtype, self.shape, self.stride, self.offset = storage, dtype, shape, stride, offset

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, with what lies between them."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))


class Inert:
    """Stands for an object of a class that tensors do not need."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> Self:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Inert:
        """It may stand for a function too, which is not run."""
        return self

    def append(self, item: object) -> None:
        """Forget it."""

    def extend(self, items: object) -> None:
        """Forget them."""

    def add(self, item: object) -> None:
        """Forget it."""


class _Dict(dict[Any, Any]):
    """An OrderedDict without attributes of its own, which state dicts have (`_metadata`)."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()  # of nothing: what torch writes is put in later, key by key

    def __setstate__(self, state: object) -> None: ...


class _StorageType(_Fixed):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Fixed):
    __slots__ = ("dtype", "entry", "numel")

    def __init__(self, entry: str, dtype: torch.dtype, numel: int) -> None:
        self.entry, self.dtype, self.numel = entry, dtype, numel


class _Rebuild(_Fixed):
    """One of torch's functions that make a tensor of a storage, as a description."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        match self.name, arguments:
            case (("_rebuild_tensor" | "_rebuild_tensor_v2"), (storage, offset, shape, stride, *_)):
                return _described(storage, offset, shape, stride)
            case "_rebuild_tensor_v3", (storage, offset, shape, stride, _, _, torch.dtype() as dtype, *_):
                return _described(storage, offset, shape, stride, dtype)
            case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (data, *_)):
                return data
            case "_rebuild_from_type_v2", (_Rebuild() as rebuild, _, tuple() as inner, *_):
                if rebuild.name == self.name:
                    raise Refused("a tensor is described by itself")
                return rebuild(*inner)
        raise Refused(f"{self.name} is given {shown(arguments)}")


class _Size(_Fixed):
    """torch.Size, as a tuple."""

    __slots__ = ()

    def __call__(self, sizes: Any = ()) -> tuple[Any, ...]:
        # Not of any list: a few bytes of a pickle would copy a long one, again and again.
        if not isinstance(sizes, tuple | list) or len(sizes) > _MOST_DIMENSIONS:
            raise Refused(f"a size is {shown(sizes)}")
        return tuple(sizes)


_SIZE: Final = _Size()
_REBUILDS: Final = {
    name: _Rebuild(name)
    for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
        "_rebuild_parameter_with_state", "_rebuild_from_type_v2",
    )
}  # fmt: skip


def _described(
    storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> SavedTensor:
    """Check that a tensor lies inside its storage, and has no more elements than that."""
    if not isinstance(storage, _Storage):
        raise Refused(f"a tensor has no storage but {shown(storage)}")
    sizes, steps = _sizes(shape), _sizes(stride)
    if not _is_size(offset) or sizes is None or steps is None or len(sizes) != len(steps):
        raise Refused(f"a tensor has size {shown(shape)}, stride {shown(stride)}, offset {shown(offset)}")
    dtype = dtype or storage.dtype
    tensor = SavedTensor(storage.entry, dtype, sizes, steps, offset)
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if offset + tensor.extent > available or math.prod(sizes) > available:
        raise Refused(f"a tensor of size {shown(list(sizes))} does not fit into its {available} elements")
    return tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS and all(map(_is_size, value)):
        return value
    return None


class _Unpickler(PlainKeys):
    key_types = (Inert, _Fixed, torch.dtype)

    def __init__(self, data: bytes, entries: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._entries = entries

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return _Dict
            case "torch", "Size":
                return _SIZE
            case (("torch._utils" | "torch._tensor"), _) if name in _REBUILDS:
                return _REBUILDS[name]
            case (("torch" | "torch.cuda" | "torch.storage"), _) if name in _STORAGES:
                return _StorageType(_STORAGES[name])
            case "torch", _ if name in _DTYPES:
                return _DTYPES[name]
        return Inert

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), _, numel) if _is_size(numel):
                entry = f"data/{key}"
                size = self._entries.get(entry)
                if size is None:
                    raise Refused(f"it names {shown(entry)}, which is not in the file")
                if size != numel * dtype.itemsize:
                    raise Refused(
                        f"{shown(entry)} has {size} bytes, and {numel} elements of {dtype} were written"
                    )
                return _Storage(entry, dtype, numel)
        raise Refused(f"it asks for {shown(pid)}")


@dataclass(frozen=True, slots=True)
class _Entry:
    begin: int
    size: int


class SavedFile:
    """A file that `torch.save` wrote (since torch 1.6); a context manager, which closes it.

    Attributes:
        content: what was saved. Dictionaries, lists, tuples, numbers and texts are what they were, tensors are
            `SavedTensor`, everything else is `Inert`.

    Args:
        path: the file.

    Raises:
        WeightsError: it is no such file, was cut off, or what it says of its tensors cannot be true.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise WeightsError(f"{path} is no regular file.")
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
        try:
            self._entries = self._read_entries()
            self.content = self._unpickled()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def read(self, tensor: SavedTensor) -> torch.Tensor:
        """The values of one of the file's tensors, in storage of their own.

        Raises:
            WeightsError: the file cannot be read, or is shorter than when it was opened.
        """
        entry, size = self._entries[tensor.storage], tensor.dtype.itemsize
        values = torch.empty(tensor.extent, dtype=tensor.dtype)
        if tensor.extent:
            try:
                self._stream.seek(entry.begin + tensor.offset * size)
                count = self._stream.readinto(values.view(torch.uint8).numpy().data)
            except OSError as error:
                raise WeightsError(f"{self.path} cannot be read: {error.strerror}.") from error
            if count != tensor.extent * size:
                raise WeightsError(f"{self.path} was cut off while it was read.")
        if 0 in tensor.shape:
            return values.view(tensor.shape)
        return values.as_strided(tensor.shape, tensor.stride).contiguous()

    def _read_entries(self) -> dict[str, _Entry]:
        """Entries by their names below the archive's own folder."""
        total = os.fstat(self._stream.fileno()).st_size
        try:
            with zipfile.ZipFile(self._stream) as archive:
                infos = archive.infolist()
        except zipfile.BadZipFile as error:
            raise WeightsError(
                f"{self.path} is no file of torch.save (a zip archive), or was cut off; files of torch before 1.6 are "
                "not read, save them anew."
            ) from error
        except (OSError, ValueError, NotImplementedError, struct.error) as error:
            raise WeightsError(
                f"{self.path} is no file of torch.save, or was cut off: {described(error)}; files of torch before 1.6 "
                "are not read, save them anew."
            ) from error
        entries: dict[str, _Entry] = {}
        for info in infos:
            name = info.filename.partition("/")[2]
            if name in entries:
                raise WeightsError(f"{self.path} is refused: it has two entries named {shown(name)}.")
            header = b""
            if 0 <= info.header_offset < total:
                self._stream.seek(info.header_offset)
                header = self._stream.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise WeightsError(f"{self.path} is refused: its entry {shown(name)} has no header.")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise WeightsError(
                    f"{self.path} is refused: its entry {shown(name)} is compressed, which torch.save does not do."
                )
            if begin + info.file_size > total:
                raise WeightsError(f"{self.path} was cut off: its entry {shown(name)} is not all there.")
            entries[name] = _Entry(begin, info.file_size)
        return entries

    def _bytes(self, name: str, limit: int) -> bytes:
        entry = self._entries[name]
        if entry.size > limit:
            raise WeightsError(f"{self.path} is refused: its entry {shown(name)} has {entry.size} bytes.")
        self._stream.seek(entry.begin)
        return self._stream.read(entry.size)

    def _unpickled(self) -> Any:
        if "data.pkl" not in self._entries:
            raise WeightsError(f"{self.path} is no file of torch.save: it is an archive without a data.pkl.")
        if "byteorder" in self._entries and self._bytes("byteorder", 16) != b"little":
            raise WeightsError(
                f"{self.path} is refused: its numbers are not little-endian; save it on another machine."
            )
        data = self._bytes("data.pkl", _LARGEST_PICKLE)
        try:
            check_opcodes(data)
            return _Unpickler(data, {name: entry.size for name, entry in self._entries.items()}).load()
        # A malformed pickle can raise anything out of the unpickler.
        except Exception as error:
            why = str(error) if isinstance(error, Refused) else described(error)
            raise WeightsError(f"{self.path} is refused: {why}.") from error
