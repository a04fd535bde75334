"""The tensors of a module by their upstream names, and which part of each this rank holds."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mm_core.sharding.plan import bare_name

#: torch's types by the names that safetensors files give them.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a type, such as `BF16`.

    Raises:
        KeyError: its files cannot hold the type.
    """
    return _NAMES[dtype]


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with the names that they have without wrappers; a tied one once."""
    for name, parameter in module.named_parameters():
        yield bare_name(name), parameter


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by upstream name; sharded ones are DTensors."""
    return {bare_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The storage of this rank and the slices of the whole tensor that it holds (all of it, for a plain
    tensor).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple(slice(0, size) for size in tensor.shape)
    # torch's own checkpoints use the same function, so the two always agree; there is no public one.
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    slices = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    return tensor.to_local().detach(), slices


def whole_tensor(tensor: DTensor) -> torch.Tensor:
    """What `full_tensor()` returns, without the long warning of each rank about tensors that are cut over two dimensions
    of a mesh, as experts are. Every rank of the mesh calls this.
    """
    # What was cut last is put together first: a `_StridedShard`, which FSDP2 makes; else the last dimension.
    cut = [i for i, place in enumerate(tensor.placements) if not place.is_replicate()]
    for i in sorted(cut, key=lambda i: (type(tensor.placements[i]) is Shard, -i))[:-1]:
        placements = list(tensor.placements)
        placements[i] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.full_tensor()


def compare_keys(
    wanted: Iterable[str], offered: Iterable[str], *, limit: int = 20
) -> tuple[list[str], list[str]]:
    """Lines about missing and unexpected keys, each unexpected one with the closest missing name."""
    wanted, offered = set(wanted), set(offered)
    missing, unexpected = sorted(wanted - offered), sorted(offered - wanted)
    lines = [f"  missing: {key}" for key in missing]
    extra = []
    for index, key in enumerate(unexpected):
        # difflib is quadratic; when everything differs, the first names say what is the matter.
        near = difflib.get_close_matches(key, missing[:500], n=1, cutoff=0.6) if index < limit else []
        extra.append(f"  unexpected: {key}" + (f" (closest missing: {near[0]})" if near else ""))
    return shortened(lines, limit), shortened(extra, limit)


def shortened(lines: Sequence[str], limit: int) -> list[str]:
    """At most `limit` lines, and how many were left out."""
    if len(lines) <= limit:
        return list(lines)
    return [*lines[:limit], f"  … and {len(lines) - limit} more"]
