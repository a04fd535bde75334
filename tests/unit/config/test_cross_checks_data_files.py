"""Data lists and annotation files are opened, as far as that is cheap."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import cross_checks
from mm_core.config.document import Document
from mm_core.config.file_check import check_file
from mm_core.config.findings import Level
from mm_core.data.annotations import read_data_list
from mm_core.data.errors import DataError

GOOD = {"path": "a.mp4", "cap": "a cat"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()


def check(data_path: Any = "data.txt", level: Level = "error", **more: Any) -> list[str]:
    settings = {"data_path": data_path, **more}
    document = Document.from_data({"dataset_param": {"basic_parameters": settings}})
    return [str(finding) for finding in cross_checks.check_data_files(document, level)]


def annotated(text: str | list[Any], name: str = "a.json") -> list[str]:
    Path(name).write_text(text if isinstance(text, str) else json.dumps(text, indent=1))
    Path("data.txt").write_text(f"clips,{name}\n")
    return check()


def test_good_files() -> None:
    assert annotated([GOOD, {**GOOD, "cap": ["one", "two"]}]) == []
    assert annotated('{"path": "a.mp4", "cap": "x"}\n\n{"path": "b.mp4", "cap": "y"}\n', "a.jsonl") == []
    assert check("a.json") == []
    assert check("none.txt") == []  # for check_path
    assert check(3) == []
    assert check("data.txt", data_storage_mode="sorafeatured") == []


LISTS = [
    ("clips a.json\n", 'data.txt:1:1 error: "clips a.json" is not `folder,annotation.json`. Write both, divided by a comma'),
    ("# first\n\nclip,a.json\n", 'data.txt:3:1 error: there is no folder "clip" (seen from the working directory). Did you '
     "mean clips?"),
    ("clips,b.json\n", 'data.txt:1:7 error: there is no annotation file "b.json" (seen from the working directory). Did '
     "you mean a.json?"),
    ("/clips, /none/b.json\n", 'data.txt:1:1 error: there is no folder "/clips".'),
    ("# nothing\n", "data.txt error: it names no sample. Write lines of `folder,annotation.json`"),
    ("", "data.txt error: it names no sample. Write lines of `folder,annotation.json`"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), LISTS)
def test_lists(text: str, expected: str) -> None:
    Path("a.json").write_text(json.dumps([GOOD]))
    Path("data.txt").write_text(text)
    found = check()
    assert found[0].startswith(expected)
    with pytest.raises(DataError):  # training says so too
        read_data_list("data.txt")


ANNOTATIONS: list[tuple[str | list[Any], str]] = [
    ([GOOD, {"path": "b.mp4"}], 'a.json:6 error: the annotation has no "cap"'),
    ([{"cap": "x"}], 'a.json:2 error: the annotation has no "path"'),
    ([{**GOOD, "path": 3}], "a.json:2 error: path is 3, but must be the name of a video file"),
    ([{**GOOD, "cap": []}], "a.json:2 error: cap is [], but must be a caption or a list of captions"),
    ([GOOD, "b.mp4"], 'a.json:6 error: "b.mp4" is no annotation; expected an object with path and cap'),
    ('[{"path": "a.mp4", "cap": "x"}\n {"path": "b.mp4"}]', "a.json:2:2 error: it is no JSON: expecting ',' delimiter. An "
     "annotation file is a list of objects, or one object a line"),
    ('{"path": "a.mp4", "cap": "x"}\n{"path": "a.mp4", "cap": }\n', "a.json:2:26 error: it is no JSON: expecting value"),
    ("[]", "a.json:1:1 error: it names no sample: the list is empty"),
    ("", "a.json error: it names no sample: the file is empty"),
    ("[" * 100_000, "a.json error: it cannot be read as JSON: maximum recursion depth exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ANNOTATIONS)
def test_annotations(text: str | list[Any], expected: str) -> None:
    (found,) = annotated(text)
    assert found.startswith(expected)
    with pytest.raises(DataError):
        read_data_list("data.txt")


def test_other_encodings(tmp_path: Path) -> None:
    Path("data.txt").write_bytes("clips,ä.json\n".encode("latin-1"))
    (found,) = check()
    assert found == "data.txt error: it is not UTF-8 text (byte 6). Save it as UTF-8"
    Path("data.txt").write_bytes(b"\xef\xbb\xbfclips,a.json\n")
    Path("a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert check() == []


def test_large_sets_are_left_to_training() -> None:
    big = [{"path": "a.mp4", "cap": "x" * 1000}] * 5000 + [{"cap": 3}]
    Path("a.json").write_text(json.dumps(big))
    Path("data.txt").write_text("clips,a.json\nclips,a.json\n")
    assert check() == []  # what is wrong is after the first items
    Path("b.json").write_text(json.dumps([{"cap": 3}]) + " " * (9 * 2**20))
    Path("data.txt").write_text("clips,b.json\n")
    assert check() == []


def test_many_findings_are_cut_off() -> None:
    Path("data.txt").write_text("none,none.json\n" * 500)
    assert len(check()) == 20


def test_a_pipe_is_not_waited_for() -> None:
    os.mkfifo("pipe")
    Path("data.txt").write_text("clips,pipe\n")
    (found,) = check()
    assert "there is no annotation file" in found


def test_a_data_file_by_itself_gives_notes(files: Any) -> None:
    (files.folder / "clips" / "annotations.json").write_text('[{"path": "a.mp4"}]')
    files.write()
    (found,) = (f for f in check_file("data.json") if f.code == "bad-data")
    assert str(found) == 'clips/annotations.json:1 note: the annotation has no "cap"'
    (found,) = (f for f in files.findings() if f.code == "bad-data")
    assert found.level == "error"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('path,cap\na.mp4,"x, y"\n', []),
        ("path,caption\na.mp4,x\n", ['a.csv:1 error: the table has no column "cap"; its columns are path, caption. The first '
         "line must name the columns, path and cap among them"]),
        ("path,cap\na.mp4,x, y\n", ["a.csv:2 error: the row has 3 cells, but the header 2. Put texts that hold a comma into "
         '"double quotes"']),
        ('path,cap\na.mp4,"x\n', ["a.csv error: it is no CSV: unexpected end of data"]),
        ("path,cap\n", ["a.csv error: it names no sample: there is no row"]),
    ],
)  # fmt: skip
def test_tables_are_looked_at(text: str, said: list[str]) -> None:
    assert annotated(text, "a.csv") == said
    assert check("a.csv") == said
    assert _reads() == (not said)


def _reads() -> bool:
    try:
        read_data_list("data.txt")
    except DataError:
        return False
    return True
