"""Reading torch's distributed-checkpoint metadata without trusting it.

`.metadata` is a pickle. Unpickling runs whatever callables the file names, so only the classes that describe
tensors may be named.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mm_core.weights.errors import WeightsError

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor's description needs")
        return super().find_class(module, name)


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


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint folder: only descriptions of tensors, all stored in files of this very
    folder.

    Raises:
        WeightsError: there is none, it holds something else, or points outside the folder.
    """
    file = folder / ".metadata"
    try:
        if file.stat().st_size > _SIZE_LIMIT:
            raise WeightsError(f"{file} is {file.stat().st_size} bytes long; refused.")
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no .metadata; it is no distributed checkpoint.") from None
    # A malformed pickle can raise almost anything out of the unpickler's opcodes.
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        MemoryError,
    ) as error:
        raise WeightsError(f"{file} is refused: {error}.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise WeightsError(f"{file} is refused: it does not describe a checkpoint.")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise WeightsError(f"{file} is refused: {name!r} is no tensor.")
    for info in (metadata.storage_data or {}).values():
        relative = info.relative_path
        if not isinstance(relative, str) or Path(relative).name != relative:
            raise WeightsError(f"{file} is refused: it points outside its folder, to {relative!r}.")
    return metadata
