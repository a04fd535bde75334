"""Byte ranges of files into tensors: the right numbers, and no byte that is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_core.weights import WeightsError, reading
from mm_core.weights.headers import locate
from mm_core.weights.reading import Read, planned_bytes, read_all


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "cube": torch.randn(7, 33, 50), "half": torch.randn(40, 70).bfloat16(), "scalar": torch.tensor(3.5),
        "flags": torch.rand(9) > 0.5, "small": torch.randn(6, 8).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    return tensors


def part(tensor: torch.Tensor, generator: torch.Generator) -> tuple[slice, ...]:
    return tuple(
        slice(low, low + 1 + int(torch.randint(size - low, (), generator=generator)))
        for size in tensor.shape
        for low in [int(torch.randint(size, (), generator=generator))]
    )


@pytest.mark.parametrize("chunk", [1 << 22, 1 << 10, 64])
@pytest.mark.parametrize("gap", [32 << 10, 16])
def test_any_part_of_any_tensor(
    chunk: int, gap: int, stored: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    monkeypatch.setattr(reading, "_GAP", gap)
    located = locate(tmp_path / "x.safetensors")
    generator = torch.Generator().manual_seed(chunk + gap)
    for _ in range(6):
        reads, expected = [], []
        for name, tensor in stored.items():
            box = part(tensor, generator)
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            target = torch.zeros(tensor[box].shape, dtype=dtype)
            if tensor.ndim == 2:  # into what lies otherwise, too
                target = torch.zeros(tensor[box].shape[::-1], dtype=dtype).t()
            reads.append(Read(located[name], box, target))
            expected.append(tensor[box].to(dtype))
        seen: list[int] = []
        assert read_all(reads, advance=seen.append) == sum(seen) == planned_bytes(reads)
        assert all(torch.equal(read.target, value) for read, value in zip(reads, expected, strict=True))


def test_rows_cost_their_bytes_and_far_columns_only_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.arange(64 * 512.0).view(64, 512)}, tmp_path / "x.safetensors")
    source = locate(tmp_path / "x.safetensors")["a"]
    rows = Read(source, (slice(16, 32), slice(0, 512)), torch.empty(16, 512))
    columns = Read(source, (slice(0, 64), slice(128, 256)), torch.empty(64, 128))
    assert read_all([rows]) == 16 * 512 * 4
    monkeypatch.setattr(reading, "_GAP", 1024)  # the gaps are 1536 bytes long
    assert read_all([columns]) == 64 * 128 * 4
    assert torch.equal(columns.target, torch.arange(64 * 512.0).view(64, 512)[:, 128:256])


def test_what_was_cut_off_since(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    source = locate(file)["cube"]
    file.write_bytes(file.read_bytes()[:-10_000])
    target = torch.empty(source.tensor.shape)
    with pytest.raises(WeightsError, match="was cut off while it was read"):
        read_all([Read(source, tuple(slice(0, n) for n in target.shape), target)])
    file.unlink()
    with pytest.raises(WeightsError, match="cannot be read: no such file"):
        read_all([Read(source, (slice(0, 1),) * 3, torch.empty(1, 1, 1))])
