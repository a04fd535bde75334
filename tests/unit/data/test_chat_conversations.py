"""Files of conversations, their layouts, and rows that cannot be used: each named by file, line and number."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_core.config.dataset_huggingface import ConversationKeys
from mm_core.data.chat.conversations import Conversation
from mm_core.data.chat.files import ChatRows, find_files
from mm_core.data.chat.rows import ConversationReader
from mm_core.data.errors import DataError, UnreadableSampleError

HUMAN, GPT = {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("cat.png")


def read(row: Any, **attr: Any) -> Conversation:
    keys = ConversationKeys(**{"images": "images", "videos": "videos", "tools": "tools", **attr})
    return ConversationReader(keys, "data")(row, "chats.json:7 (conversation 2)", Path())


# -- files --------------------------------------------------------------------------------------------------------------

ROWS = [{"a": 1}, {"b": "ü\u2028 [{"}, {"c": [1, {"d": "}"}]}]
TEXTS = {
    "list.json": json.dumps(ROWS, ensure_ascii=False),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
    "no-end.jsonl": "\r\n".join(json.dumps(row) for row in ROWS),
    "mark.json": "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False),
    "mark.jsonl": "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
}


@pytest.mark.parametrize("name", TEXTS)
def test_rows_of_a_file(name: str) -> None:
    Path(name).write_bytes(TEXTS[name].encode())
    rows = ChatRows([Path(name)])
    assert [rows.read(i) for i in range(len(rows))] == ROWS
    text = TEXTS[name].replace("\r", "").splitlines() if "ü" not in TEXTS[name] else TEXTS[name].split("\n")
    line = next(n for n, one in enumerate(text, start=1) if '"c"' in one) - ("indented" in name)
    assert rows.origin(2) == f"{name}:{line} (conversation 2)"


def test_several_files_and_limits() -> None:
    Path("folder").mkdir()
    for name in ("folder/b.json", "folder/a.jsonl", "c.json"):
        Path(name).write_text("[1, 2, 3]" if name.endswith("json") else "4\n5\n6\n")
    files, groups = find_files("folder, c.json", "data")
    assert ([str(file) for file in files], groups) == (["folder/a.jsonl", "folder/b.json", "c.json"], [2, 1])
    rows = ChatRows(files, None, groups)
    assert [rows.read(i) for i in range(len(rows))] == [4, 5, 6, 1, 2, 3, 1, 2, 3]
    rows = ChatRows(files, 4, groups)  # of each name
    assert [rows.read(i) for i in range(len(rows))] == [4, 5, 6, 1, 1, 2, 3]
    assert rows.digest != ChatRows(files, 5, groups).digest
    with pytest.raises(
        DataError, match=r"no file or folder 'd.json', seen from .* or from dataset_dir \(data\).*c.json"
    ):
        find_files("d.json", "data")


BROKEN = [
    ("a.json", "[{},\n {,}]", r"a.json:2:3: expecting property name"),
    ("a.json", "[{}\n {}]", r"a.json:2:2: expected a comma"),
    ("a.json", "[{}, {}", r"a.json:1:8: the list is not closed; the file may be cut off"),
    ("a.json", '[{}, {"a": "b', r"a.json:1:\d+: "),
    ("a.json", "[{},]", r"a.json:1:5: a comma stands before"),
    ("a.json", "[{}] x", r"a.json:1:5: there is more after"),
    ("a.json", "[]", "a.json: it holds no conversation"),
    ("a.jsonl", "\n \n", "a.jsonl: it holds no conversation"),
    ("a.json", b'["\xff"]', r"a.json: it is not UTF-8 text \(byte 2\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files(name: str, content: str | bytes, message: str) -> None:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        ChatRows([Path(name)])


def test_a_broken_line_is_one_row() -> None:
    Path("a.jsonl").write_bytes(b'{"a": 1}\n{"a": }\n{"\xff": 1}\n')
    rows = ChatRows([Path("a.jsonl")])
    assert rows.read(0) == {"a": 1}
    with pytest.raises(
        UnreadableSampleError, match=r"^a.jsonl:2 \(conversation 1\): it is no JSON: .* character 7$"
    ):
        rows.read(1)
    with pytest.raises(UnreadableSampleError, match=r"^a.jsonl:3 \(conversation 2\): it is not UTF-8"):
        rows.read(2)


# -- layouts ------------------------------------------------------------------------------------------------------------


def test_pictures_where_their_placeholders_stand() -> None:
    Path("data").mkdir()
    Image.new("RGB", (4, 4)).save("data/dog.png")
    raw = Path("cat.png").read_bytes()
    made = read(
        {
            "conversations": [
                {"from": "human", "value": "<image>What? <image>"}, GPT, {"from": "human", "value": "And <image>?"}, GPT,
            ],
            "images": ["cat.png", {"path": "dog.png"}, "data:image/png;base64," + base64.b64encode(raw).decode()],
        }
    )  # fmt: skip
    assert made.images == ("cat.png", "data/dog.png", raw)
    assert made.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What? "},
        {"type": "image"},
    ]
    later = made.part(1, 2)
    assert (later.images, later.messages) == ((raw,), made.messages[2:])
    assert made.part(0, 1).images == made.images[:2]


def test_a_single_picture_and_one_row_with_both_forms_of_content() -> None:
    assert read({"conversations": PICTURE, "images": "cat.png"}).images == ("cat.png",)
    parts = [
        {"type": "text", "text": "a <image> b"},
        {"type": "image", "image": str(Path("cat.png").absolute())},
    ]
    made = read({"conversations": [{"from": "human", "value": parts}, GPT], "images": ["cat.png"]})
    assert made.images == ("cat.png", str(Path("cat.png").absolute()))


PICTURE = [{"from": "human", "value": "<image>"}, GPT]
CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
BAD: list[tuple[Any, str]] = [
    ([1], r"\[1\] is no conversation; expected an object"),
    ({}, "it is an empty object"),
    ({"messages": []}, r'it has no "conversations" \(attr.messages\), only "messages"; it has "messages": write "messages": '),
    ({"conversations": []}, 'is \\[\\], but must be a list of messages'),
    ({"conversations": ["x"]}, 'message 0 is "x"; expected an object'),
    ({"conversations": [{"value": "x"}]}, r'message 0 has no "from" \(attr.role_tag\)'),
    ({"conversations": [{"from": "user", "value": "x"}]}, 'message 0 has the from "user", which attr gives no role .*"user_tag'),
    ({"conversations": [HUMAN, {"from": "gpt"}]}, r'message 1 has no "value" \(attr.content_tag\)'),
    ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "message 1 says 3; expected a text or a list of parts"),
    ({"conversations": [HUMAN]}, "its roles are user: the last must be assistant"),
    ({"conversations": [HUMAN, HUMAN, GPT]}, "its roles are user, user, assistant, but a user follows a user"),
    ({"conversations": [GPT, HUMAN, GPT]}, "but the conversation begins with an assistant"),
    ({"conversations": [HUMAN, GPT, GPT]}, "but an assistant follows an assistant"),
    ({"conversations": [HUMAN, CALL, GPT]}, "but an assistant follows an assistant"),
    ({"conversations": [HUMAN, {"from": "system", "value": "x"}, GPT]}, "but a system follows a user"),
    ({"conversations": PICTURE}, 'more <image> than there are images: "images" lists 0'),
    ({"conversations": [{"from": "human", "value": "<video>"}, GPT]}, "more <video> than there are videos"),
    ({"conversations": [HUMAN, GPT], "images": ["cat.png"]}, "it lists 1 image, but its texts have 0 <image>"),
    ({"conversations": PICTURE, "images": ["cat.png", "cat.png"]}, "lists 2 images, but its texts have 1"),
    ({"conversations": PICTURE, "images": ["no.png"]}, r'there is no image "no.png" \(seen from '),
    ({"conversations": PICTURE, "images": ["https://x/y.png"]}, "nothing is downloaded"),
    ({"conversations": PICTURE, "images": [3]}, "3 is no image; expected the path"),
    ({"conversations": PICTURE, "images": ["data:image/png;base64,%"]}, "is no base64"),
    ({"conversations": PICTURE, "images": ["data:image/png;base64,ü"]}, "is no base64"),
    ({"conversations": [{"from": "human", "value": [{"type": "audio"}]}, GPT]}, 'has the part {"type": "audio"}'),
    (
        {"conversations": [{"from": "system", "value": "<image>"}, HUMAN, GPT], "images": ["cat.png"]},
        "the system prompt has an image",
    ),
    ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}]}, "message 1, a call of a tool, is .* no JSON"),
    ({"conversations": [HUMAN, {"from": "function_call", "value": '{"f": 1}'}]}, "expected an object with name and arguments"),
    ({"conversations": [HUMAN, GPT], "tools": "[1]"}, '"tools" has 1; expected a function'),
    ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}]}, "half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows(row: Any, message: str) -> None:
    with pytest.raises(UnreadableSampleError, match=rf"^chats.json:7 \(conversation 2\): .*{message}"):
        read(row)


def test_pictures_without_a_key() -> None:
    row = {"conversations": PICTURE, "images": ["cat.png"]}
    with pytest.raises(UnreadableSampleError, match=r"attr.images names no key that would list them"):
        read(row, images=None)


def test_two_system_prompts() -> None:
    row = {"conversations": [{"from": "system", "value": "a"}, HUMAN, GPT], "rule": "b"}
    with pytest.raises(UnreadableSampleError, match='"rule" and its first message are two system prompts'):
        read(row, system="rule")
    assert read({**row, "rule": "a"}, system="rule").messages[0] == {"role": "system", "content": "a"}
