"""A folder of safetensors files, written tensor by tensor: memory holds one tensor, and the folder appears whole or not
at all.

A file is 8 bytes with the length of the header (little-endian), the header (a JSON object), and the tensors' bytes.
Since the header says where each tensor lies, tensors are written to their places in any order.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mm_core.weights.errors import WeightsError
from mm_core.weights.layout import TEMPORARY, sync_folder, write_text
from mm_core.weights.tensors import dtype_name

LARGEST_FILE = 5 * 10**9  # bytes, as diffusers and transformers split
DIFFUSERS_STEM = "diffusion_pytorch_model"
_CHUNK = 1 << 24  # elements that are converted at once


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What a file will hold under a name.

    Attributes:
        dtype: in the file.
        shape: of the whole tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class _File:
    name: str
    offsets: dict[str, int]
    stream: FileIO | None = None


def check_dtype(name: str, dtype: torch.dtype) -> str:
    """Return what safetensors calls the dtype of a tensor.

    Raises:
        WeightsError: its files cannot hold it.
    """
    try:
        return dtype_name(dtype)
    except KeyError:
        raise WeightsError(f"{name}: a safetensors file cannot hold {dtype}.") from None


def split_files(
    tensors: Mapping[str, PlannedTensor], limit: int, groups: Iterable[Sequence[str]] | None = None
) -> list[list[str]]:
    """The names of each file, in the given order, as full as the limit lets them be.

    Args:
        limit: bytes of a file; a single group may exceed it.
        groups: names that stay in one file; by default each by itself.
    """
    files: list[list[str]] = [[]]
    size = 0
    for group in groups if groups is not None else ([name] for name in tensors):
        nbytes = sum(tensors[name].nbytes for name in group)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    return files


class FolderWriter:
    """Writes a folder of weights; a context manager, which removes what was not published.

    Args:
        folder: does not exist yet, or is empty.
        tensors: name -> what will be written; all of them must be.
        files: the names of each file, from `split_files`.
        stem: of the files' names: `diffusion_pytorch_model` is what diffusers reads, `model` what transformers does.
        names: of the files themselves, which then are no parts of one whole and get no index.
        metadata: texts for the files' headers, beside `format`.

    Raises:
        WeightsError: the folder holds something already, cannot be written, or the disk has no room for it.
    """

    def __init__(
        self,
        folder: Path | str,
        tensors: Mapping[str, PlannedTensor],
        files: Sequence[Sequence[str]],
        *,
        stem: str = DIFFUSERS_STEM,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._target = Path(os.path.realpath(folder))  # a link to an empty folder stays one
        self._temporary = self._target.parent / f"{TEMPORARY}{self._target.name}"
        self._tensors, self._stem, self._names = tensors, stem, names
        self._metadata = {**(metadata or {}), "format": "pt"}
        self._unwritten = set(tensors)
        self._where: dict[str, _File] = {}
        try:
            if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
                raise WeightsError(
                    f"{self.folder} exists already and is not overwritten; name another folder."
                )
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._check_space()
            if self._temporary.exists():
                os.close(self._locked())  # else it was left behind by a crash
                shutil.rmtree(self._temporary)
            self._temporary.mkdir()
            self._lock: int | None = self._locked()
        except OSError as error:
            raise self._cannot(error) from error
        try:
            self._files = [self._plan(self._file_name(i, len(files)), names) for i, names in enumerate(files)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its file, converted to the planned dtype.

        Raises:
            WeightsError: the disk is full, or fails otherwise.
        """
        planned = self._tensors[name]
        if tuple(tensor.shape) != planned.shape:
            raise RuntimeError(f"{name} is {list(tensor.shape)}, but {list(planned.shape)} was planned")
        file = self._where[name]
        try:
            stream = self._opened(file)
            stream.seek(file.offsets[name])
            for part in tensor.detach().reshape(-1).split(_CHUNK):
                data = part.to(planned.dtype).cpu().contiguous()
                left = memoryview(data.view(torch.uint8).numpy())
                while left:  # the system takes 2 GiB at once
                    left = left[stream.write(left) :]
            self._unwritten.discard(name)
            if self._unwritten.isdisjoint(file.offsets):
                self._finish(file)
        except OSError as error:
            raise self._cannot(error) from error

    def write_text(self, name: str, text: str) -> None:
        """Write a small file beside the weights.

        Raises:
            WeightsError: the disk is full, or fails otherwise.
        """
        try:
            write_text(self._temporary / name, text)
        except OSError as error:
            raise self._cannot(error) from error

    def copy_file(self, file: Path) -> None:
        """Put a copy of a small file beside the weights, under its own name.

        Raises:
            WeightsError: it cannot be read, or the disk is full, or fails otherwise.
        """
        try:
            shutil.copyfile(file, self._temporary / file.name)
            with (self._temporary / file.name).open("rb") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            raise self._cannot(error) from error

    def publish(self) -> Path:
        """Give the folder its name, once all its tensors are written, and return it.

        Raises:
            WeightsError: the disk is full, or fails otherwise.
        """
        if self._unwritten:
            raise RuntimeError(f"{len(self._unwritten)} tensors were not written: {min(self._unwritten)} …")
        try:
            for file in self._files:
                self._opened(file)  # one without tensors is written too
                self._finish(file)
            if len(self._files) > 1 and self._names is None:
                self.write_text(f"{self._stem}.safetensors.index.json", self._index())
            sync_folder(self._temporary)
            os.replace(self._temporary, self._target)
            sync_folder(self._target.parent)
        except OSError as error:
            raise self._cannot(error) from error
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        return self.folder

    def close(self) -> None:
        """Remove what was not published."""
        for file in self._files if hasattr(self, "_files") else ():
            if file.stream is not None:
                file.stream.close()
                file.stream = None
        if self._lock is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)  # after publishing it may be another process's
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        """Open the temporary folder and lock it: two processes that write one folder would publish each other's."""
        opened = os.open(self._temporary, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            raise WeightsError(
                f"{self.folder} is being written by another process; wait for it, or name another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        return opened

    def _plan(self, name: str, names: Sequence[str]) -> _File:
        # Readers make views of the file's bytes, so a tensor begins at a multiple of its elements' size.
        ordered = sorted(names, key=lambda key: (-self._tensors[key].dtype.itemsize, key))
        header: dict[str, Any] = {"__metadata__": self._metadata}
        position = 0
        for key in ordered:
            planned = self._tensors[key]
            end = position + planned.nbytes
            header[key] = {
                "dtype": check_dtype(key, planned.dtype),
                "shape": list(planned.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        file = _File(name, {key: begin + header[key]["data_offsets"][0] for key in ordered})
        self._where.update(dict.fromkeys(ordered, file))
        try:
            with (self._temporary / name).open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.truncate(begin + position)
        except OSError as error:
            raise self._cannot(error) from error
        return file

    def _opened(self, file: _File) -> FileIO:
        if file.stream is None:
            # Without a buffer: what a full disk refused would be written once more when the file is closed.
            file.stream = (self._temporary / file.name).open("r+b", buffering=0)
        return file.stream

    def _finish(self, file: _File) -> None:
        stream = self._opened(file)
        os.fsync(stream.fileno())
        stream.close()
        file.stream = None

    def _file_name(self, index: int, count: int) -> str:
        if self._names is not None:
            return self._names[index]
        if count == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{index + 1:05d}-of-{count:05d}.safetensors"

    def _index(self) -> str:
        total = sum(planned.nbytes for planned in self._tensors.values())
        where = {name: self._where[name].name for name in self._tensors}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"

    def _check_space(self) -> None:
        needed = sum(planned.nbytes for planned in self._tensors.values())
        free = shutil.disk_usage(self._target.parent).free
        if free < needed:
            raise WeightsError(
                f"{self.folder} needs {needed / 1e9:.2f} GB, but {self._target.parent} has {free / 1e9:.2f} GB free; "
                "make room, or name a folder on another disk."
            )

    def _cannot(self, error: OSError) -> WeightsError:
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return WeightsError(f"{self.folder} cannot be written ({error.strerror}); {room}name another folder.")
