"""Weights of one kind of file into a Hugging Face folder, tensor by tensor: memory holds a few of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.config.document import expanded
from mm_core.observe.transfer import byte_progress
from mm_core.weights.adapter import StateDictAdapter
from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import read_headers
from mm_core.weights.hf_folder import inside, weight_files
from mm_core.weights.hf_save import config_text, save_hf_folder
from mm_core.weights.hf_writer import LARGEST_FILE, FolderWriter, PlannedTensor, split_files
from mm_core.weights.library_config import read_config
from mm_core.weights.sources import FolderSource, TensorSource
from mm_core.weights.stored import StoredWeights
from mm_core.weights.tensors import compare_keys, dtype_name, shortened, state_tensors

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig

_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers, at the top
_LIBRARY_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
#: What a folder of weights has beside them that is small and no program.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_LARGEST_SMALL = 100_000_000  # bytes; a tokenizer.json may have tens of millions


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        source, folder: where from and where to.
        kind: of the source, in words.
        files: names of the safetensors files.
        tensors, parameters, nbytes: how many there are, elements of all of them, and what they take.
        dtypes: by safetensors' name, and how many tensors have each.
        left_out: names of the source's tensors that belong to something else.
        has_config: whether there is a config.json.
    """

    source: Path
    folder: Path
    kind: str
    files: tuple[str, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    left_out: tuple[str, ...]
    has_config: bool

    def as_json(self) -> dict[str, Any]:
        """For `--format json`."""
        return {
            "from": str(self.source), "kind": self.kind, "to": str(self.folder), "files": list(self.files),
            "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes,
            "dtypes": dict(self.dtypes), "left_out": len(self.left_out), "config": self.has_config,
        }  # fmt: skip


def names_in_source(
    module: nn.Module, source: TensorSource, names: Mapping[str, str], *, label: str = "the model"
) -> dict[str, str]:
    """Compare a source's tensors with a module's.

    Args:
        module: usually on the meta device.
        names: the module's name -> the source's.
        label: what the module is called in the message.

    Returns:
        The module's name -> the source's, for all of the module's names: also those of tied tensors, which are stored
        once, under any of them.

    Raises:
        WeightsError: tensors are missing, unexpected, or of another shape or kind; all of these are listed together.
    """
    tensors = state_tensors(module)
    stored = {id(tensors[name]): key for name, key in names.items() if name in tensors}
    wanted = {name for name, tensor in tensors.items() if name in names or id(tensor) not in stored}
    missing, unexpected = compare_keys(wanted, names)
    renames = [
        f"  renamed: {names[name]} of the checkpoint is {name} to the weights adapter"
        for name in sorted(names.keys() - tensors.keys())
        if not names[name].endswith(name)
    ]
    wrong = []
    for name in sorted(names.keys() & tensors.keys()):
        info, tensor = source.tensors[names[name]], tensors[name]
        if info.shape != tuple(tensor.shape):
            wrong.append(
                f"  shape: {name} is {list(info.shape)} in the checkpoint, {list(tensor.shape)} in the model"
            )
        elif info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            wrong.append(f"  kind: {name} is {info.dtype} in the checkpoint, {tensor.dtype} in the model")
    if missing or unexpected or wrong:
        lines = [*missing, *unexpected, *shortened(renames, 20), *shortened(wrong, 20)]
        raise WeightsError(f"{source.path} does not fit {label}:\n" + "\n".join(lines))
    return {name: stored[id(tensor)] for name, tensor in tensors.items()}


def convert_tensors(
    module: nn.Module,
    source: TensorSource,
    names: Mapping[str, str],
    folder: Path,
    *,
    kind: str,
    adapter: StateDictAdapter | None = None,
    config: Mapping[str, Any] | None = None,
    stored: StoredWeights | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = LARGEST_FILE,
    left_out: Iterable[str] = (),
    beside: Sequence[Path] = (),
) -> Conversion:
    """Write a component's tensors as a folder, with the names and layout that its weights adapter, or its library,
    gives them.

    Args:
        module: the component on the meta device.
        names: the module's name -> the source's, as `names_in_source` returns them.
        folder: does not exist yet, or is empty; it appears whole or not at all.
        config: the content of config.json; None writes none.
        stored: dtypes and layout of the folder that the weights came from long ago; else the source's dtypes.
        dtype: of all floating-point tensors, whatever they are in the source.
        beside: small files that are copied, such as a tokenizer's.

    Raises:
        WeightsError: the source is damaged, a value is too large for the dtype, or the folder cannot be written.
    """
    stored = stored or StoredWeights()
    dtypes = {}
    for name, key in names.items():
        info = source.tensors[key]
        if dtype is not None and info.dtype.is_floating_point:
            dtypes[name] = dtype_name(dtype)
        else:
            dtypes[name] = stored.dtypes.get(name) or _dtype_name(key, info.dtype)
    total = sum(_nbytes(source, key) for key in set(names.values()))
    with byte_progress(f"writing {folder}", total) as advance:
        save_hf_folder(
            module, folder, adapter, config, dtypes=dtypes, layout=stored.layout or None,
            read=_reader(source, names, dtype, advance), max_file_bytes=max_file_bytes, beside=beside,
        )  # fmt: skip
    return described_conversion(source.path, folder, kind, tuple(left_out))


def copy_folder(
    source: FolderSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = LARGEST_FILE,
) -> Conversion:
    """Write a Hugging Face folder anew: in another dtype, or in files of another size. Its small files (config.json,
    tokenizer) are copied, and config.json tells the dtype.

    Args:
        folder: does not exist yet, or is empty; it appears whole or not at all.
        dtype: of all floating-point tensors; None keeps them.

    Raises:
        WeightsError: the source is damaged, a value is too large for the dtype, or the folder cannot be written.
    """
    planned = {
        name: PlannedTensor(dtype if dtype is not None and info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in source.tensors.items()
    }  # fmt: skip
    names = {name: name for name in planned}
    beside = small_files(source.path)
    text = None
    if dtype is not None and (source.path / _CONFIG) in beside:
        text = config_text(_with_dtype(read_config(source.path / _CONFIG), dtype))
    files = split_files(planned, max_file_bytes)
    total = sum(_nbytes(source, name) for name in names)
    with (
        byte_progress(f"writing {folder}", total) as advance,
        FolderWriter(folder, planned, files, stem=_stem(source), metadata=source.header_texts()) as writer,
    ):
        read = _reader(source, names, dtype, advance)
        for name in names:
            writer.write(name, read(name))
        for file in beside:
            if file.name == _CONFIG and text is not None:
                writer.write_text(_CONFIG, text)
            else:
                writer.copy_file(file)
        writer.publish()
    return described_conversion(source.path, folder, "a Hugging Face folder", ())


def _reader(
    source: TensorSource,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    advance: Callable[[int], None] | None,
) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        values = source.read(names[name])
        if dtype is not None and values.is_floating_point() and values.numel():
            _check_range(names[name], values, dtype)
        if advance is not None:
            advance(values.numel() * values.element_size())
        return values

    return read


def _check_range(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    if values.dtype.itemsize == 1:
        values = values.float()  # torch compares no float8
    limit = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= limit:
        return
    low, high = values.aminmax()
    if low >= -limit and high <= limit:
        return
    # NaN is not larger than anything, and infinity was so before.
    largest = values[values.isfinite()].abs().max().item() if bool(values.isfinite().any()) else 0.0
    if largest > limit:
        raise WeightsError(
            f"{name} has values up to {largest:.3g}, and the largest of {dtype_name(dtype)} is {limit:.3g}; convert to "
            "another dtype."
        )


def _nbytes(source: TensorSource, name: str) -> int:
    info = source.tensors[name]
    return PlannedTensor(info.dtype, info.shape).nbytes


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    try:
        return dtype_name(dtype)
    except KeyError:
        raise WeightsError(
            f"{name} is {dtype}, which a safetensors file cannot hold; give --dtype."
        ) from None


def small_files(folder: Path) -> list[Path]:
    """What lies beside the weights and describes them or their tokenizer."""
    found = []
    for file in sorted({path for pattern in _SMALL_FILES for path in folder.glob(pattern)}):
        if file.name.endswith(".safetensors.index.json") or not file.is_file():
            continue
        if file.stat().st_size > _LARGEST_SMALL:
            raise WeightsError(f"{file} is too large to be copied with the weights; move it away.")
        found.append(inside(folder, file))
    return found


def files_beside(component: ComponentConfig | None) -> list[Path]:
    """What a folder of a model of the transformers library has beside weights and config.json (tokenizer, chat template,
    settings of images): who loads the trained weights needs it too. Nothing for other components.

    Raises:
        WeightsError: a file is too large to be one of those.
    """
    if component is None or component.role != "transformers_model" or not component.from_pretrained:
        return []
    folder = expanded(component.from_pretrained)
    return [file for file in small_files(folder) if file.name != _CONFIG] if folder.is_dir() else []


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the dtype that transformers writes there, if it says one."""
    return {
        key: _LIBRARY_NAMES.get(dtype, str(dtype).removeprefix("torch.")) if key in _DTYPE_KEYS else value
        for key, value in config.items()
    }


def _stem(source: FolderSource) -> str:
    """What the names of the source's files begin with, before their numbers."""
    return re.sub(r"-\d+-of-\d+$", "", source.files[0].name.removesuffix(".safetensors"))


def described_conversion(source: Path, folder: Path, kind: str, left_out: tuple[str, ...]) -> Conversion:
    """Read the headers of what was written."""
    files = weight_files(folder)
    tensors = read_headers(files)
    return Conversion(
        source,
        folder,
        kind,
        tuple(file.name for file in files),
        len(tensors),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        sum(tensor.nbytes for tensor in tensors.values()),
        dict(Counter(tensor.dtype for tensor in tensors.values()).most_common()),
        left_out,
        (folder / _CONFIG).is_file(),
    )
