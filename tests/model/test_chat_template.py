"""The chat template `tokenizer`, and how images and videos of conversations are read."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_core import CHAT_TEMPLATE_MAPPINGS
from mm_core.data.chat.media import image_size, read_image
from mm_core.data.chat.protocol import ChatTemplate
from mm_core.data.chat.template import TokenizerTemplate, build_template
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_core.testing.check import CheckFailed
from mm_core.testing.checks.targets import constructor_takes_its_section, has_the_methods_of_its_role
from tests import tiny_vlm

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Zürich?"},
    {"role": "assistant", "content": "It rains."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def template(folder: Path) -> Any:
    return build_template("tokenizer", folder, use_fast_tokenizer=True, image_max_pixels=7)


def test_texts_are_those_of_transformers(template: Any) -> None:
    assert isinstance(template, ChatTemplate)
    assert "tokenizer" in CHAT_TEMPLATE_MAPPINGS
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    for options in ({}, {"tools": tools}, {"add_generation_prompt": True}, {"enable_thinking": False}):
        expected = tiny_vlm.tokenizer().apply_chat_template(MESSAGES, tokenize=False, **options)
        assert template.render(MESSAGES, **options) == expected
    text = template.render(MESSAGES)
    made = template.encode([(text, True)])
    assert set(made) == {"input_ids", "learnt"}
    ids = tiny_vlm.tokenizer().apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    assert made["input_ids"].tolist() == ids
    assert made["learnt"].all()
    assert template.length([(text, True)]) == len(ids)
    empty = template.encode([])
    assert empty["input_ids"].shape == empty["learnt"].shape == (0,)
    assert empty["input_ids"].dtype == torch.int64


def test_parts_that_are_texts_are_joined_and_pictures_refused(template: Any) -> None:
    parts = [{"type": "text", "text": "What is the weather "}, {"type": "text", "text": "in Zürich?"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}, MESSAGES[2]]
    assert template.render(messages) == template.render(MESSAGES)
    with pytest.raises(
        DataError, match="takes texts alone, but there are images or videos; name the model's own"
    ):
        template.render([{"role": "user", "content": [{"type": "image"}]}])
    for pictures in ({"images": ["a.png"]}, {"videos": ["a.mp4"]}):
        with pytest.raises(DataError, match="takes texts alone"):
            template.encode([("text", True)], **pictures)
        with pytest.raises(DataError, match="takes texts alone"):
            template.length([("text", True)], **pictures)


def test_texts_beyond_the_models_length_are_for_cutoff_len_to_judge(template: Any, caplog: Any) -> None:
    assert template.length([("word " * 9000, True)]) > template.tokenizer.model_max_length
    assert not caplog.records


def test_what_a_template_refuses_is_said(tmp_path: Path) -> None:
    folder = tiny_vlm.folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"the chat template of .* cannot render this: roles must alternate"):
        build_template("tokenizer", folder).render(MESSAGES)
    (folder / "chat_template.jinja").write_text("{% for broken %}")
    with pytest.raises(DataError, match="cannot render this"):
        build_template("tokenizer", folder).render(MESSAGES)


def test_folders_that_hold_no_template(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model_name_or_path: there is no folder .*; give the local folder"):
        build_template("tokenizer", tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        build_template("tokenizer", tmp_path)
    with pytest.raises(DataError, match="split_special_tokens: only false is supported"):
        build_template("tokenizer", folder, split_special_tokens=True)
    bare = tiny_vlm.folder(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"has no chat template \(chat_template.jinja\)"):
        build_template("tokenizer", bare)
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "old {{ messages[0].content }}"}))
    old = build_template("tokenizer", bare)
    assert old.render(MESSAGES) == "old Be brief."
    assert old.fingerprint != build_template("tokenizer", folder).fingerprint
    (bare / "chat_template.json").write_text("{}")
    with pytest.raises(DataError, match="holds no chat template that can be read"):
        build_template("tokenizer", bare)
    with pytest.raises(DataError, match=r"has no token <\|image_pad\|>"):
        _without_pictures(tiny_vlm.folder(tmp_path / "texts"))


def _without_pictures(folder: Path) -> None:
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|image_pad|>", "<|else|>"))
    build_template("qwen3_vl", folder)


def test_the_fingerprint_does_not_change_with_use(tmp_path: Path) -> None:
    folder = tiny_vlm.folder(tmp_path / "model")
    file = folder / "tokenizer.json"
    cut = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": cut}))
    template = build_template("tokenizer", folder)
    before = template.fingerprint
    assert template.length([("word " * 9, True)]) > 9
    assert template.fingerprint == before


# -- images -------------------------------------------------------------------------------------------------------------


def gradient(height: int = 6, width: int = 8) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_images_from_paths_bytes_and_memory(tmp_path: Path) -> None:
    image = Image.fromarray(gradient())
    path = tmp_path / "image.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        assert np.array_equal(np.asarray(read_image(source)), gradient())
        assert image_size(source) == (6, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = saved(Image.fromarray(gradient()), "PNG", exif=exif)
    turned = read_image(source)
    assert image_size(source) == (turned.height, turned.width)
    assert turned.size == ((6, 8) if orientation >= 5 else (8, 6))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[0, 256, 65535, 32768]], dtype=np.uint16)), [0, 1, 255, 128]),
        (Image.fromarray(np.array([[0, 1, 255, 128]], dtype=np.uint8)), [0, 1, 255, 128]),
        (Image.fromarray(np.array([[[9, 0], [8, 255]]], dtype=np.uint8), "LA"), [9, 8]),
        (Image.new("P", (2, 1), 0), [0, 0]),
    ],
    ids=["16-bit", "grey", "transparent", "palette"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: list[int]) -> None:
    made = np.asarray(read_image(saved(image)))
    assert made.shape == (1, len(expected), 3)
    assert made[0, :, 0].tolist() == made[0, :, 2].tolist() == expected


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "content", "said", "in_header"),
    [
        ("bomb.png", bomb(12_000, 10_000), "its header claims more than 89,478,485 pixels; shrink it", True),
        ("huge.png", bomb(60_000, 60_000), "its header claims more than 89,478,485 pixels; shrink it", True),
        (
            "half.jpg",
            saved(Image.fromarray(gradient(200, 200)), "JPEG")[:2000],
            "it cannot be decoded",
            False,
        ),
        ("text.png", b"no image", "it is no image that Pillow can read", True),
        ("empty.png", b"", "it is no image that Pillow can read", True),
        ("missing.png", None, "there is no such file", True),
    ],
)
def test_images_that_cannot_be_read_are_named(
    name: str, content: bytes | None, said: str, in_header: bool, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for call in (read_image, *((image_size,) if in_header else ())):
        with pytest.raises(UnreadableSampleError, match=said) as caught:
            call(path)
        assert str(caught.value).startswith(f"{path}: ")
    if content:
        with pytest.raises(UnreadableSampleError, match=f"an image of {len(content)} bytes: {said}"):
            read_image(content)


# -- the conformance kit ------------------------------------------------------------------------------------------------


class WithoutLimits:
    def __init__(self, folder: str) -> None: ...

    def render(self, messages: Any) -> str:
        return ""


def test_the_kit_knows_what_a_template_must_have() -> None:
    def case(target: Any) -> Any:
        spec = SimpleNamespace(target=f"somewhere:{target.__name__}")
        return SimpleNamespace(
            role="chat_template", target=target, spec=spec, component=SimpleNamespace(fields={})
        )

    for target in (TokenizerTemplate, CHAT_TEMPLATE_MAPPINGS["qwen3_vl"]):
        constructor_takes_its_section(case(target))
        has_the_methods_of_its_role(case(target))
    with pytest.raises(CheckFailed, match="does not fit its section: got an unexpected keyword"):
        constructor_takes_its_section(case(WithoutLimits))
    with pytest.raises(CheckFailed, match="tools"):
        has_the_methods_of_its_role(case(WithoutLimits))
