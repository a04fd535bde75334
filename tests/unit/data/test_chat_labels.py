"""What of a conversation is learnt: a table written by hand, piece by piece as the model reads it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_core.config.dataset_huggingface import ConversationKeys
from mm_core.data.chat.labels import IGNORED, ChatEncoder
from mm_core.data.chat.rows import ConversationReader
from mm_core.data.chat.template import build_template
from mm_core.data.errors import UnreadableSampleError
from tests import tiny_vlm

OPENAI = {
    "messages": "messages", "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": None, "tools": "tools",
}  # fmt: skip
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
WEATHER_TEXT = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def sharegpt(*texts: str, first: str = "human") -> list[dict[str, str]]:
    tags = [first, *(["gpt", "human"] if first == "human" else ["human", "gpt"]) * len(texts)]
    return [{"from": tag, "value": text} for tag, text in zip(tags, texts, strict=False)]


HELLO = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
AND = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
IMAGE = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"  # 64 × 64 pixels

Pieces = list[tuple[str, bool]]
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], Pieces]] = {
    "one turn": (
        {"conversations": sharegpt("Hello", "Hi.")}, {},
        [(HELLO, False), ("Hi.<|im_end|>\n", True)],
    ),
    "two turns": (
        {"conversations": sharegpt("Hello", "Hi.", "And?", "Fine.")}, {},
        [(HELLO, False), ("Hi.<|im_end|>\n", True), (AND, False), ("Fine.<|im_end|>\n", True)],
    ),
    "a system message": (
        {"conversations": sharegpt("Be kind.", "Hello", "Hi.", first="system")}, {},
        [(SYSTEM + HELLO, False), ("Hi.<|im_end|>\n", True)],
    ),
    "a system prompt under a key": (
        {"conversations": sharegpt("Hello", "Hi."), "rule": "Be kind."}, {"attr": {"system": "rule"}},
        [(SYSTEM + HELLO, False), ("Hi.<|im_end|>\n", True)],
    ),
    "history masked": (
        {"conversations": sharegpt("Hello", "Hi.", "And?", "Fine.")}, {"mask_history": True},
        [(HELLO + "Hi.<|im_end|>\n" + AND, False), ("Fine.<|im_end|>\n", True)],
    ),
    "prompts learnt": (  # nothing stands before the first token that could say it
        {"conversations": sharegpt("Hello", "Hi.")}, {"train_on_prompt": True},
        [("<|im_start|>", False), (HELLO.removeprefix("<|im_start|>") + "Hi.<|im_end|>\n", True)],
    ),
    "a tool of ShareGPT": (
        {"conversations": [
            {"from": "human", "value": "Hello"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."},
        ], "tools": [WEATHER]}, {"attr": {"tools": "tools"}},
        [
            ("<|im_start|>system\n# Tools\n<tools>\n" + WEATHER_TEXT + "\n</tools><|im_end|>\n" + HELLO, False),
            ('<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n', True),
            ("<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
            ("It rains.<|im_end|>\n", True),
        ],
    ),
    "two tools of OpenAI": (
        {"messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "I look.", "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}},
                {"type": "function", "function": {"name": "weather", "arguments": '{"a": 2}'}},
            ]},
            {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Both."},
        ]}, {"attr": OPENAI},
        [
            (HELLO, False),
            ('I look.\n<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
             '\n<tool_call>\n{"name": "weather", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n', True),
            ("<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
             "<|im_start|>assistant\n", False),
            ("Both.<|im_end|>\n", True),
        ],
    ),
    "an image": (
        {"conversations": sharegpt("<image>Hello", "Hi."), "images": ["cat.png"]}, {"attr": {"images": "images"}},
        [(HELLO.replace("Hello", IMAGE + "Hello"), False), ("Hi.<|im_end|>\n", True)],
    ),
    "two images of OpenAI, prompts learnt": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image", "image": "cat.png"}]},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": "Fine."},
        ]}, {"attr": OPENAI, "train_on_prompt": True},
        [
            ("<|im_start|>", False), ("user\nHello<|vision_start|>", True), ("<|image_pad|>" * 4, False),
            ("<|vision_end|><|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n<|vision_start|>", True),
            ("<|image_pad|>" * 4, False), ("<|vision_end|>And?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n", True),
        ],
    ),
    "no thoughts": (
        {"conversations": sharegpt("Hello", "Hi.", "And?", "Fine.")}, {"enable_thinking": False},
        [
            (HELLO + "<think>\n\n</think>\n\n", False), ("Hi.<|im_end|>\n", True),
            (AND + "<think>\n\n</think>\n\n", False), ("Fine.<|im_end|>\n", True),
        ],
    ),
    "thoughts": (
        {"conversations": sharegpt("Hello", "<think>\nA cat.\n</think>\n\nHi.")}, {"enable_thinking": True},
        [(HELLO, False), ("<think>\nA cat.\n</think>\n\nHi.<|im_end|>\n", True)],
    ),
    "a reply is cut": (
        {"conversations": sharegpt("Hello", "Hi.", "And?", "Fine.")}, {"cut": 1},
        [(HELLO, False), ("Hi.<|im_end|>\n", True), (AND, False), ("Fine.<|im_end|>", True)],
    ),
    "the last turn is left out": (
        {"conversations": sharegpt("Hello", "Hi.", "And?" * 30, "Fine.")}, {"cut": 40},
        [(HELLO, False), ("Hi.<|im_end|>\n", True)],
    ),
    "the first turn is left out": (
        {"conversations": sharegpt("Be kind.", "Hello" * 30, "Hi.", "And?", "Fine.", first="system")},
        {"mask_history": True, "cut": 20},
        [(SYSTEM + AND, False), ("Fine.<|im_end|>\n", True)],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_vlm.folder(tmp_path_factory.mktemp("model"))
    Image.new("RGB", (64, 64), "red").save(folder / "cat.png")
    return folder


def encoded(
    folder: Path, row: dict[str, Any], attr: dict[str, Any], cut: int = 0, **options: Any
) -> tuple[Any, Any]:
    """The sample of a row, cut by so many tokens, and its template."""
    reader = ConversationReader(ConversationKeys(**attr), str(folder))
    conversation = reader(row, "chats.json:1 (conversation 0)", folder)
    template = build_template("qwen3_vl_nothink" if conversation.images else "tokenizer", folder)
    length = 4096
    if cut:
        encoder = ChatEncoder(template, length, **options)
        length = encoder.fit(conversation).length - cut
    encoder = ChatEncoder(template, length, **options)
    kept = encoder.fit(conversation)
    sample = encoder.encode(conversation)
    assert kept.length == len(sample["input_ids"]) <= length
    assert all((one == sample[name]).all() for name, one in encoder.encode(conversation, kept).items())
    return sample, template


@pytest.mark.parametrize("shape", SHAPES)
def test_table(folder: Path, shape: str) -> None:
    row, options, expected = SHAPES[shape]
    options = dict(options)
    sample, template = encoded(folder, row, options.pop("attr", {}), **options)
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    assert all(label in (IGNORED, id) for label, id in zip(labels, ids, strict=True))
    pieces = [
        (template.tokenizer.decode([id for id, _ in tokens]), learnt)
        for learnt, tokens in groupby(zip(ids, labels, strict=True), key=lambda token: token[1] != IGNORED)
    ]
    assert pieces == expected


def test_nothing_learnt_or_no_room(folder: Path) -> None:
    row = {"conversations": sharegpt("Hello" * 30, "Hi.")}
    with pytest.raises(
        UnreadableSampleError, match=r"conversation 0\): it has \d+ tokens, and the first prompt alone fills"
    ):
        encoded(folder, row, {}, cut=20)


def test_a_template_that_rewrites_history(folder: Path, tmp_path: Path) -> None:
    """Qwen3's thinking models take thoughts out of all replies but the last."""
    copy = tiny_vlm.folder(tmp_path / "model")
    template = tiny_vlm.CHAT_TEMPLATE.replace(
        "'<|im_start|>assistant\\n' + parts(message.content)",
        "'<|im_start|>assistant\\n' + (parts(message.content) if loop.last else parts(message.content).split('</think>')[-1])",
    )
    (copy / "chat_template.jinja").write_text(template)
    row = {"conversations": sharegpt("Hello", "<think>A cat.</think>Hi.", "And?", "<think>So.</think>Fine.")}
    with pytest.raises(UnreadableSampleError, match='set "mask_history": true'):
        encoded(copy, row, {})
    sample, made = encoded(copy, row, {}, mask_history=True)
    learnt = sample["input_ids"][sample["labels"] != IGNORED]
    assert made.tokenizer.decode(learnt) == "<think>So.</think>Fine.<|im_end|>\n"
    assert "cat" not in made.tokenizer.decode(sample["input_ids"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.integers(1, 20), min_size=2, max_size=8),
    cutoff=st.integers(1, 160),
    masked=st.booleans(),
)
def test_what_is_kept_of_a_long_conversation(
    folder: Path, words: list[int], cutoff: int, masked: bool
) -> None:
    words = words[: len(words) // 2 * 2]
    row = {"conversations": sharegpt(*("word " * count for count in words))}
    conversation = ConversationReader(ConversationKeys(), "data")(
        row, "chats.json:1 (conversation 0)", folder
    )
    template = build_template("tokenizer", folder)
    encoder = ChatEncoder(template, cutoff, mask_history=masked)
    whole = ChatEncoder(template, 4096, mask_history=masked).encode(conversation)
    try:
        sample = encoder.encode(conversation)
    except UnreadableSampleError:
        turn = conversation.part(*((len(words) // 2 - 1, len(words) // 2) if masked else (0, 1)))
        (prompt, _), *_ = encoder.segments(turn)
        assert len(template.tokenizer(prompt)["input_ids"]) >= cutoff
        return
    size = len(sample["input_ids"])
    kept = encoder.fit(conversation)
    assert size == kept.length == min(size, cutoff)
    turns = len(words) // 2
    assert (kept.end == turns) if masked else (kept.first == 0)
    if not masked:  # a beginning of the whole, which ends in a reply
        assert sample["input_ids"].tolist() == whole["input_ids"][:size].tolist()
        assert sample["labels"].tolist() == whole["labels"][:size].tolist()
        assert sample["labels"][-1] != IGNORED
    elif size < cutoff:  # an end of it
        assert sample["labels"].tolist()[1:] == whole["labels"][-size:].tolist()[1:]
