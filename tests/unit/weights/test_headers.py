"""Headers of safetensors files: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import StoredTensor, header_texts, read_header, read_headers


def made(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(()), "d": torch.ones(0, 4),
        "e": torch.ones(3, dtype=torch.bool), "f": torch.ones(4, dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header == {
        "a": StoredTensor("F32", (2, 3), 24),
        "b": StoredTensor("BF16", (5,), 10),
        "c": StoredTensor("F32", (), 4),
        "d": StoredTensor("F32", (0, 4), 0),
        "e": StoredTensor("BOOL", (3,), 3),
        "f": StoredTensor("F8_E4M3", (4,), 4),
    }


def test_an_unknown_dtype_is_taken_as_it_comes(tmp_path: Path) -> None:
    file = made(tmp_path / "x", {"a": entry([2], 0, 1, "F4")}, b"1")
    assert read_header(file)["a"].dtype == "F4"


WRONG: list[tuple[Any, bytes, str]] = [
    (b"", b"", "its header is no JSON"),
    (b"[1]", b"", "its header is no JSON object"),
    (b"{", b"", "its header is no JSON"),
    (b"\xff\xfe", b"", "its header is no JSON"),
    (b'{"a":' * 50_000, b"", "its header is no JSON"),
    (b'{"a": {}, "a": {}}', b"", "a name is written twice"),
    ({"a": 3}, b"", "describes 'a' as 3"),
    ({"a": {"dtype": "F32", "shape": [1]}}, b"", "describes 'a' as"),
    ({"a": entry([-1], 0, 4)}, b"1234", "describes 'a' as"),
    ({"a": entry([True], 0, 4)}, b"1234", "describes 'a' as"),
    ({"a": entry([1.0], 0, 4)}, b"1234", "describes 'a' as"),
    ({"a": entry([2], 0, 4)}, b"1234", "describes 'a' as"),
    ({"a": entry([1], 4, 0)}, b"1234", "describes 'a' as"),
    ({"a": entry([10**30], 0, 4)}, b"1234", "describes 'a' as"),
    ({"a": entry([2**60] * 1000, 0, 4)}, b"1234", "describes 'a' as"),
    (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"1234", "NaN is no number"),
    ({"a": entry([0, 2**62, 2**62], 0, 0)}, b"", "describes 'a' as"),
    ({"a": entry([4], 0, 4, "I" * 99)}, b"1234", "describes 'a' as"),
    ({"": entry([1], 0, 4)}, b"1234", "'' is no name of a tensor"),
    ({"a\n": entry([1], 0, 4)}, b"1234", "'a\\n' is no name of a tensor"),
    (
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"1234",
        "is no name of a tensor",
    ),
    ({"a" * 1000: 3}, b"", "aaa… as 3"),
    ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", "the bytes of 'b' begin inside another tensor"),
    ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12, "of 'b' do not follow the tensor before"),
    ({"a": entry([1], 0, 4)}, b"123", "1 of its 4 bytes of tensors are missing"),
    ({"a": entry([1], 0, 4)}, b"12345", "1 bytes follow its last tensor"),
]


@pytest.mark.parametrize(("header", "data", "message"), WRONG)
def test_wrong_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = made(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightsError) as caught:
        read_header(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [[1], {"a": 3}, None])
def test_metadata_that_are_no_texts(tmp_path: Path, metadata: Any) -> None:
    file = made(tmp_path / "x.safetensors", {"__metadata__": metadata})
    with pytest.raises(WeightsError, match=r"its __metadata__ are .* and may be texts only"):
        header_texts(file)


def test_lengths(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match="it has 0 bytes, and the length of its header alone takes 8"):
        read_header(file)
    made(file, {}, length=2**64 - 1)
    with pytest.raises(
        WeightsError, match="its header would have 18446744073709551615 bytes, but only 2 follow"
    ):
        read_header(file)
    with open(file, "wb") as out:  # long enough, but nothing that one should read
        out.write(struct.pack("<Q", 200_000_000))
        out.truncate(300_000_000)
    with pytest.raises(WeightsError, match="and 100000000 are the most"):
        read_header(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_header(tmp_path / "none")
    with pytest.raises(WeightsError, match="is a directory"):
        read_header(tmp_path)
    with pytest.raises(WeightsError, match="no regular file"):
        read_header(Path(os.devnull))


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made(tmp_path / name, {"a": entry([1], 0, 4)}, b"1234")
    with pytest.raises(WeightsError, match="a is in one and in two"):
        read_headers([tmp_path / "one", tmp_path / "two"])
