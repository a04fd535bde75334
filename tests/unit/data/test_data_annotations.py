from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_helpers import ROOT, TINY

from mm_core.data.annotations import Annotation, read_annotations, read_data_list
from mm_core.data.errors import DataError

ITEM = {"path": "a.mp4", "cap": "a cat"}


def write(tmp_path: Path, text: str, name: str = "a.json") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bunny, tower = read_data_list(TINY / "data.txt")
    assert bunny == Annotation(
        path=Path("examples/tiny/wan22-t2v/clips/bunny.mp4"),
        captions=("A big grey rabbit climbs out of its burrow and stretches in a green meadow.",),
        origin="examples/tiny/wan22-t2v/bunny.json:2",
        num_frames=24,
        fps=12.0,
        height=96,
        width=128,
    )
    assert tower.path.name == "tower.mp4"


def test_all_that_an_annotation_may_say(tmp_path: Path) -> None:
    item = {
        "path": "sub/b.mp4",
        "cap": ["one", "two"],
        "fps": 30,
        "duration": 2.5,
        "cut": [10, 85],
        "crop": [0, 64, 8, 40],
        "motion_score": 0.3,
    }
    (annotation,) = read_annotations(write(tmp_path, json.dumps([item])), Path("videos"))
    assert annotation == Annotation(
        path=Path("videos/sub/b.mp4"),
        captions=("one", "two"),
        origin=f"{tmp_path / 'a.json'}:1",
        num_frames=75,
        fps=30.0,
        first_frame=10,
        crop=(0, 64, 8, 40),
    )


def test_json_lines_and_lists_agree(tmp_path: Path) -> None:
    items = [ITEM, ITEM | {"path": "b.mp4"}, ITEM | {"cap": "一只猫"}]
    listed = read_annotations(write(tmp_path, json.dumps(items, indent=1)), tmp_path)
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n\n"
    lined = read_annotations(write(tmp_path, lines, "a.jsonl"), tmp_path)
    assert [(a.path, a.captions) for a in listed] == [(a.path, a.captions) for a in lined]
    assert [a.origin.rpartition(":")[2] for a in lined] == ["1", "2", "3"]
    assert [a.origin.rpartition(":")[2] for a in listed] == ["2", "6", "10"]


def test_empty_lines_and_comments_of_a_list_are_skipped(tmp_path: Path) -> None:
    annotation = write(tmp_path, json.dumps([ITEM]))
    listing = write(tmp_path, f"# parts\n\n {tmp_path} , {annotation} \n", "data.txt")
    assert [a.path for a in read_data_list(listing)] == [tmp_path / "a.mp4"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"path": "a.mp4", "capt": "x"}, '"capt" is no key of an annotation; did you mean "cap"?'),
        ({"path": "a.mp4", "cap": "x", "num_frame": 9}, '"num_frame" is no key .* mean "num_frames"'),
        ({"cap": "x"}, 'the annotation has no "path"'),
        ({"path": "a.mp4"}, 'the annotation has no "cap"'),
        ({"path": 3, "cap": "x"}, "path is 3, but must be the name of a video file"),
        ({"path": "a.mp4", "cap": []}, r"cap is \[\], but must be a caption"),
        ({"path": "a.mp4", "cap": ["x", 1]}, r'cap is \["x", 1\], but must be a caption'),
        (ITEM | {"fps": "24"}, 'fps is "24", but must be a positive number'),
        (ITEM | {"fps": 0}, "fps is 0, but must be a positive number"),
        (ITEM | {"num_frames": True}, "num_frames is true, but must be a positive number"),
        (ITEM | {"resolution": [480, 832]}, r'resolution is \[480, 832\], but must be {"height"'),
        (ITEM | {"resolution": {"height": 480}}, "resolution is .* but must be"),
        (ITEM | {"cut": [1]}, "cut is .* 2 integers"),
        (ITEM | {"path": "a\0.mp4"}, r'path is "a\\u0000\.mp4", but must be the name of a video file'),
        (ITEM | {"path": "\ud800.mp4"}, r'path is "\\ud800\.mp4", but must be the name of a video file'),
        (ITEM | {"cap": "\udfff"}, r'cap is "\\udfff", but must be a caption'),
        (ITEM | {"num_frames": 10**400}, "num_frames is 1000.*…, but must be .* at most 2147483647"),
        (ITEM | {"num_frames": 1e308}, r"num_frames is 1e\+308, but must be .* at most 2147483647"),
        (ITEM | {"num_frames": 0.5}, r"num_frames is 0\.5, but must be at least 1"),
        (ITEM | {"num_frames": None, "fps": 1e9, "duration": 1e9}, r"fps 1e\+09 and duration 1e\+09 make"),
        (ITEM | {"cut": [10**400, 0]}, "cut is .* integers from 0 to 2147483647"),
        (ITEM | {"resolution": {"height": 10**400, "width": 1}}, "resolution is .* but must be"),
        (ITEM | {"crop": [9, 3, 0, 5]}, "crop is .* left < right"),
        ("a.mp4", '"a.mp4" is no annotation; expected an object'),
    ],
)
def test_a_malformed_item_is_named_by_file_and_line(tmp_path: Path, item: Any, message: str) -> None:
    path = write(tmp_path, f"[\n{json.dumps(ITEM)},\n{json.dumps(item)}\n]")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: {message}"):
        read_annotations(path, tmp_path)


GOOD = json.dumps(ITEM)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (f"[{GOOD}\n {GOOD}]", f"1:{len(GOOD) + 2}", "expected a comma or the closing bracket"),
        ('[{"path": "a" "cap": 1}]', "1:15", "expecting ',' delimiter"),
        (f"[\n{GOOD},\n]", "3:1", "a comma stands before the closing bracket"),
        (f"[{GOOD}", f"1:{len(GOOD) + 2}", "expected a comma or the closing bracket"),
        (f"[{GOOD}, ", f"1:{len(GOOD) + 4}", "the list is not closed"),
        ('[]\n{"a": 1}', "2:1", "there is more after the end"),
        (f"{GOOD} {GOOD}", f"1:{len(GOOD) + 2}", "expected a line break: JSON Lines"),
        ("path,cap\n", "1:1", "expecting value"),
        (f"{GOOD}\n{{'path': 1}}", "2:2", "expecting property name"),
    ],
)
def test_broken_json_is_named_by_line_and_column(tmp_path: Path, text: str, place: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{place}: {message}"):
        read_annotations(path, tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "1: brackets are nested too deeply"),
        ('[\n{"path": "a.mp4", "cap": ' + "[" * 100_000, "2: brackets are nested too deeply"),
        (f"[\n{GOOD[:-1]}, {GOOD[1:]}]", '2: "path" is written twice in one object'),
        (f'{GOOD}\n{{"resolution": {{"width": 1, "width": 2}}}}', '2: "width" is written twice'),
        (f'[{{"path": "a.mp4", "cap": "x", "num_frames": 1{"0" * 5000}}}]', "1: a number cannot be read"),
    ],
)
def test_json_that_python_cannot_or_must_not_read(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{message}"):
        read_annotations(path, tmp_path)


def test_a_name_with_nul_is_no_file(tmp_path: Path) -> None:
    listing = write(tmp_path, f"{tmp_path},a\0.json\n", "data.txt")
    with pytest.raises(DataError, match=r"data\.txt:1: 'a\\x00\.json' is no name of a file"):
        read_data_list(listing)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("videos", r"data\.txt:2: 'videos' is not `folder,annotation\.json`"),
        ("videos,", r"data\.txt:2: 'videos,' is not"),
        ("nowhere,a.json", r"data\.txt:2: there is no folder nowhere \(seen from the working directory"),
        ("videos,missing.json", r"data\.txt:2: missing\.json cannot be read: no such file"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    path = write(tmp_path, f"# first\n{line}\n", "data.txt")
    with pytest.raises(DataError, match=message):
        read_data_list(path)


def test_a_missing_and_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_path: .*none\.txt cannot be read: no such file"):
        read_data_list(tmp_path / "none.txt")
    with pytest.raises(DataError, match="names no sample"):
        read_data_list(write(tmp_path, "\n# nothing\n", "data.txt"))


def test_a_binary_file_is_no_annotation(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00[")
    with pytest.raises(DataError, match="not UTF-8"):
        read_annotations(path, tmp_path)
