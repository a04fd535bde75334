from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mm_core.data.annotations import read_annotations, read_data_list
from mm_core.data.errors import DataError

CSV = """path,cap,num_frames,fps,height,width,cut,note
a.mp4,"one, with a comma",49,24,480,832,"[3, 60]",x
b.mp4,"[""two"", ""captions""]",,,,,,

c.png,[not JSON,,23.976,,,,"two
lines"
d.mp4,,,,,,"[2, 9]",
"""


def test_a_csv_file_says_what_json_does(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("\ufeff" + CSV, encoding="utf-8")
    first, second, third, fourth = read_annotations(path, tmp_path)
    assert (first.path, first.captions, first.origin) == (
        tmp_path / "a.mp4",
        ("one, with a comma",),
        f"{path}:2",
    )
    assert (first.num_frames, first.fps, first.height, first.width) == (49, 24.0, 480, 832)
    assert first.first_frame == 3  # of 49 frames: what num_frames says counts
    assert (second.captions, second.num_frames, second.height) == (("two", "captions"), None, None)
    assert (third.captions, third.fps, third.origin) == (("[not JSON",), 23.976, f"{path}:5")
    assert (fourth.captions, fourth.origin) == (("",), f"{path}:7")
    assert (fourth.first_frame, fourth.num_frames) == (2, 7)
    listing = tmp_path / "data.txt"
    listing.write_text(f"{tmp_path},{path}\n", encoding="utf-8")
    assert read_data_list(listing) == [first, second, third, fourth]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\na,b\n", r':1: the table has no column "cap"; its columns are path, caption'),
        ("", r':1: the table has no column "path"; its columns are none'),
        ("path,cap,cap\n", r':1: two columns are named "cap"'),
        (
            "path,cap\na.mp4,one, two\n",
            r":2: the row has 3 cells, but the header 2; put texts that hold a comma",
        ),
        ('path,cap\na.mp4,"open\n', r":2: it is no CSV: unexpected end of data"),
        ("path,cap,fps\na.mp4,x,fast\n", r':2: fps is "fast", but must be a positive number'),
        ("path,cap,cut\na.mp4,x,3-4\n", r":2: cut is '3-4', but must be JSON"),
        (
            'path,cap,cut\na.mp4,x,"[4, 4]"\n',
            r":2: cut is \[4, 4\], but must be \[first, end\] with first < end",
        ),
        ("path,cap,height\na.mp4,x,480\n", r":2: it has only one of height and width"),
        ("path,cap,num_frame\na.mp4,x,4\n", r':2: "num_frame" is no key .* did you mean "num_frames"'),
    ],
)
def test_a_wrong_csv_file_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "set.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"set\.csv" + message):
        read_annotations(path, tmp_path)


def test_a_parquet_file_says_what_json_does(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {
            "path": "a.mp4",
            "cap": ["x", "y"],
            "fps": 24.0,
            "num_frames": 49.0,
            "height": 480.0,
            "width": 832.0,
        },
        {
            "path": "b.mp4",
            "cap": ["z"],
            "fps": None,
            "num_frames": float("nan"),
            "height": None,
            "width": None,
        },
    ]
    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_annotations(path, tmp_path)
    assert (first.captions, first.num_frames, first.height, first.width) == (("x", "y"), 49, 480, 832)
    assert (second.captions, second.num_frames, second.fps, second.height) == (("z",), None, None, None)
    assert second.origin == f"{path}: row 2"
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"set\.parquet: it is no Parquet file"):
        read_annotations(path, tmp_path)


def test_times_in_a_parquet_file_are_passed_over(tmp_path: Path) -> None:
    """Not every time of pyarrow is one of Python's."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "set.parquet"
    times = pyarrow.array([1_700_000_000_000_000_001], pyarrow.timestamp("ns"))
    columns = {"path": ["a.mp4"], "cap": ["x"]}
    parquet.write_table(pyarrow.table({**columns, "added": times}), path)
    assert [one.captions for one in read_annotations(path, tmp_path)] == [("x",)]
    inside = pyarrow.ListArray.from_arrays([0, 1], times)
    parquet.write_table(pyarrow.table({**columns, "added": inside}), path)
    with pytest.raises(
        DataError, match=r"set\.parquet: it is no Parquet file that pyarrow can read: Nanosecond"
    ):
        read_annotations(path, tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"set\.parquet: reading Parquet needs .* `pip install pyarrow`"):
        read_annotations(tmp_path / "set.parquet", tmp_path)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_path: .*none\.csv cannot be read: no such file"):
        read_annotations(tmp_path / "none.csv", tmp_path)


def test_json_that_is_nested_too_deep_is_told(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("path,cap,cut\na.mp4,x," + "[" * 100_000)
    with pytest.raises(DataError, match=r"set.csv:2: cut is .*, but must be JSON"):
        read_annotations(path, tmp_path)
