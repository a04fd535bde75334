"""Files of tensors that are read one at a time: a folder of safetensors, a distributed checkpoint, a file of `torch.save`.

All of them know names, dtypes and shapes before a value is read, and hold one tensor at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import header_texts, locate_all
from mm_core.weights.hf_folder import weight_files
from mm_core.weights.metadata import SafeReader, read_metadata
from mm_core.weights.reading import Read, read_all
from mm_core.weights.tensors import TORCH_DTYPES
from mm_core.weights.tensors_only import SavedFile, SavedTensor
from mm_registry.errors import UserError
from mm_registry.words import clip, described


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Where tensors are read from.

    Attributes:
        path: the folder or file, for messages.
        tensors: name -> what is known of it.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, as it is stored.

        Raises:
            WeightsError: the files cannot be read, or are damaged.
        """
        ...


class FolderSource:
    """A folder of safetensors files.

    Raises:
        WeightsError: as `weight_files` and `locate_all`; there are no tensors, or torch has no such dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = weight_files(path)
        self._located = locate_all(self.files)
        if not self._located:
            raise WeightsError(f"{path} has no tensors.")
        for name, found in self._located.items():
            if found.tensor.dtype not in TORCH_DTYPES:
                raise WeightsError(
                    f"{path}: {clip(name)} has dtype {found.tensor.dtype!r}; it is one of {', '.join(TORCH_DTYPES)}."
                )
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(TORCH_DTYPES[found.tensor.dtype], found.tensor.shape)
            for name, found in self._located.items()
        }

    def header_texts(self) -> dict[str, str]:
        """What the headers of its files say besides, such as the settings of an adapter.

        Raises:
            WeightsError: as `header_texts`.
        """
        return {name: text for file in self.files for name, text in header_texts(file).items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor; see `TensorSource`."""
        info = self.tensors[name]
        values = torch.empty(info.shape, dtype=info.dtype)
        whole = tuple(slice(0, size) for size in info.shape)
        read_all([Read(self._located[name], whole, values)])
        return values


class CheckpointSource:
    """The tensors of a distributed checkpoint of torch. Whatever else it holds is stored as pickles, and not read.

    Args:
        path: the folder with `.metadata`.
        only_tensors: whether a checkpoint that holds anything else is refused, as ours never does.

    Raises:
        WeightsError: as `read_metadata`.
    """

    def __init__(self, path: Path, *, only_tensors: bool = True) -> None:
        self.path = path
        self._metadata = read_metadata(path, only_tensors=only_tensors)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(entry.properties.dtype, tuple(entry.size))
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor; see `TensorSource`."""
        info = self.tensors[name]
        values = torch.empty(info.shape, dtype=info.dtype)
        try:
            with warnings.catch_warnings():
                # It tells that there is no process group, which is what is meant here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({name: values}, storage_reader=_KnownReader(self.path, self._metadata), no_dist=True)
        except CheckpointException as error:
            reasons: list[BaseException] = [failure for failure, _ in error.failures.values()]
            said = next((str(reason) for reason in reasons if isinstance(reason, UserError)), None)
            raise WeightsError(
                said or f"{self.path} is damaged: {name} cannot be read ({described(reasons[0])})."
            ) from error
        return values


class SavedSource:
    """The tensors of a file that `torch.save` wrote, in a dictionary of it or of one inside it.

    Args:
        path: the file.
        inside: keys of dictionaries that may hold the tensors; the names of theirs begin with the key.

    Raises:
        WeightsError: as `SavedFile`; or there is no tensor.
    """

    def __init__(self, path: Path, inside: tuple[str, ...] = ("model", "state_dict", "module")) -> None:
        self.path = path
        self._file = SavedFile(path)
        content = self._file.content
        self._saved: dict[str, SavedTensor] = {}
        if isinstance(content, dict):
            self._add(content, "")
            for key in inside:
                self._add(content.get(key), f"{key}.")
        if not self._saved:
            keys = sorted(key for key in content if isinstance(key, str)) if isinstance(content, dict) else []
            found = f"it holds {clip(', '.join(keys))}" if keys else "it is no dictionary with names"
            self._file.close()
            raise WeightsError(f"{path} has no tensors, and no dictionary `model` of tensors; {found}.")
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in self._saved.items()
        }

    def _add(self, found: Any, prefix: str) -> None:
        if isinstance(found, dict):
            for key, value in found.items():
                if isinstance(key, str) and isinstance(value, SavedTensor):
                    self._saved[prefix + key] = value

    def read(self, name: str) -> torch.Tensor:
        """One tensor; see `TensorSource`."""
        return self._file.read(self._saved[name])


class _KnownReader(SafeReader):
    """Reads with metadata that were read before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that it was made with."""
        if self._known.storage_meta is None:
            self._known.storage_meta = StorageMeta()
        self._known.storage_meta.load_id = self.load_id
        return self._known
