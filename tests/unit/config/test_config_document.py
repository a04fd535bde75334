"""Files that cannot be read at all, and documents with values from elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_core.config import ConfigError, Document, Origin, check_file, read_document
from mm_core.config import document as module


def fails(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_unreadable_files_say_what_and_how_to_mend(
    tmp_path: Path, write: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("model.json", "{}")
    (tmp_path / "latin.json").write_bytes(b'{\n "a": "\xe9"}')
    (tmp_path / "folder").mkdir()
    assert fails("modle.json") == "modle.json: no such file. Did you mean model.json?"
    assert fails("fodler/x.json") == "fodler/x.json: no such file. Did you mean folder?"
    assert fails("model.json/x.json") == (
        "model.json/x.json: no such file. model.json is a file, not a folder"
    )
    assert fails("folder") == "folder: this is a folder, expected a file"
    assert fails(write("m.txt", "{}")) == (
        'm.txt: unknown kind of file ".txt". Name a file that ends in .json, .yaml, .yml'
    )
    assert fails("latin.json") == "latin.json:2:8: the file is not UTF-8 text (byte 0xe9). Save it as UTF-8"
    assert fails(write("empty.json", " \n")) == "empty.json:1:1: the file is empty. Write at least {}"
    assert fails(write("list.yaml", "- 1")) == (
        "list.yaml:1:1: the top level is a list, expected an object of keys and values"
    )
    assert fails("") == "no file is named (the path is empty)"
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    assert "the file has 22 bytes; a configuration has at most 10" in fails(
        write("big.json", '{"a": "' + "x" * 13 + '"}')
    )


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_rather_than_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.json")
    assert fails("pipe.json") == "pipe.json: this is no regular file (a pipe, socket or device), expected one"
    Path("loop.json").symlink_to("loop.json")
    assert fails("loop.json") == "loop.json: this is a symbolic link that leads nowhere, to loop.json"
    Path("old.json").symlink_to("gone.json")
    assert fails("old.json") == "old.json: this is a symbolic link that leads nowhere, to gone.json"
    assert fails("~nobody-of-this-name/m.json").startswith("~nobody-of-this-name/m.json: no such file")


@pytest.mark.timeout(20)
def test_devices_and_what_may_not_be_read_are_errors_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero.json").symlink_to("/dev/zero")
    assert fails("zero.json") == "zero.json: this is no regular file (a pipe, socket or device), expected one"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.json")
        assert fails("s.json") == "s.json: this is no regular file (a pipe, socket or device), expected one"
    Path("x" * 300 + ".json").parent.mkdir(exist_ok=True)
    assert fails("x" * 300 + ".json").endswith(": the file cannot be read: File name too long")
    assert "no such file" in fails("a\0b.json")
    if os.geteuid() == 0:
        pytest.skip("root may read everything, so the last case cannot be shown")
    Path("mine.json").write_text("{}")
    Path("mine.json").chmod(0)
    assert fails("mine.json") == "mine.json: the file cannot be read: Permission denied"


def test_a_pipe_that_takes_the_files_place_after_the_look_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(OSError, match="no regular file"):
        module._read_bytes(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [('{"a": 1}'.encode("utf-16"), "1:1: the file is UTF-16 text, expected UTF-8. Save it as UTF-8"),
     ("\ufeff{}".encode("utf-16-be"), "1:1: the file is UTF-16 text, expected UTF-8. Save it as UTF-8"),
     ('{\n"a": 1}'.encode("utf-16-le"),
      "1:2: a NUL character: this is UTF-16 text, or no text at all. Save it as UTF-8"),
     (b'{\n"a\0": 1}', "2:3: a NUL character: this is UTF-16 text, or no text at all. Save it as UTF-8")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_other_encodings_are_named(tmp_path: Path, raw: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(raw)
    assert fails(str(path)) == f"{path}:{message}"


def test_a_symbolic_link_is_followed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(tmp_path / "real")
    Path("tools.json").write_text('{"profile": {"enable": false}}')
    Path("link.json").symlink_to("middle.json")
    Path("middle.json").symlink_to("tools.json")
    assert module.link_note("tools.json") is None
    assert module.link_note("absent.json") is None
    (found,) = check_file("link.json")
    assert str(found) == (
        f"link.json note: this is a symbolic link; what is read is {tmp_path}/real/tools.json"
    )
    assert found.code == "symlink"
    Path("link.json").unlink()
    Path("link.json").symlink_to("/etc/hostname")
    where = Origin("file", "m.json", 3, 4)
    note = module.link_note("link.json", where, ("ae", "from_pretrained"))
    assert str(note) == (
        'm.json:3:4 note: ae.from_pretrained is "link.json": a symbolic link; what is read is /etc/hostname'
    )


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"a": 1,\r\n"b": 2}')
    document = read_document(path)
    assert document.data == {"a": 1, "b": 2}
    assert (document.origin(("b",)).line, document.origin(("b",)).column) == (3, 6)


def test_replaced_values_have_their_own_origin_and_leave_the_source_alone() -> None:
    document = Document.from_data({"a": {"b": [1, 2]}}, Origin("file", "m.json", 1, 1))
    hook = Origin("hook", detail="dist 1.0")
    changed = document.replaced(("a", "new", "deep"), 3, hook).replaced(("a", "b", 1), 9, hook)
    assert changed.data == {"a": {"b": [1, 9], "new": {"deep": 3}}}
    assert document.data == {"a": {"b": [1, 2]}}
    assert str(changed.origin(("a", "b", 1))) == "hook (dist 1.0)"
    assert str(changed.origin(("a", "b", 0))) == "m.json:1:1"
    with pytest.raises(KeyError):
        document.replaced(("a", "b", 7, "c"), 0, hook)
