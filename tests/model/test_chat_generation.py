"""Replies of a chat model: equal to transformers' own, streamed, drawn by seed and number, asked by files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from mm_core.cli.main import main
from mm_core.data.errors import DataError
from mm_core.generation.chat import Chat, Sampling
from mm_core.generation.chat_build import ChatSources, build_chat
from mm_core.generation.chat_requests import read_requests, request_of
from mm_registry.errors import UserError
from tests import tiny_vlm

PROMPT = "What is shown in this picture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_vlm.folder(tmp_path_factory.mktemp("vlm"), weights=True, seed=3)
    Image.linear_gradient("L").resize((64, 96)).convert("RGB").save(made / "grey.png")
    Image.new("RGB", (64, 64), "red").save(made / "red.png")
    return made


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return build_chat(ChatSources(model=str(folder)), device=torch.device("cpu"))


def test_reply_is_that_of_transformers(folder: Path, chat: Chat) -> None:
    images = [str(folder / "grey.png"), str(folder / "red.png")]
    request = request_of(f"<image>First, {PROMPT} And <image>?", images=images, system="Be short.")
    pieces: list[str] = []
    reply = chat.reply(request, sampling=Sampling(max_new_tokens=12), on_text=pieces.append)

    network = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = tiny_vlm.tokenizer()
    # 96 × 64 pixels are 6 × 4 patches, 6 tokens; 64 × 64 are 4.
    picture = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    other = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    text = (
        f"<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{picture}First, {PROMPT} And {other}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    processor = chat.template.images  # type: ignore[attr-defined]
    pixels = processor.preprocess(images=[Image.open(path) for path in images], return_tensors="pt")
    output = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == tiny_vlm.IMAGE).long(),
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        max_new_tokens=12,
    )
    new = output[0, ids.shape[1] :]
    assert reply.prompt_tokens == ids.shape[1]
    assert reply.tokens == len(new)
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True) == "".join(pieces)
    assert reply.text


def test_folder_without_chat_template_is_told_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(DataError, match=r"has no chat template .* copy tokenizer and template"):
        build_chat(ChatSources(model=str(tmp_path)), device=torch.device("cpu"))


def test_what_is_drawn_depends_on_seed_and_number_alone(chat: Chat) -> None:
    request = request_of(PROMPT)
    sampling = Sampling(max_new_tokens=8, temperature=1.5)

    def reply(seed: int, index: int) -> str:
        return chat.reply(request, sampling=sampling, seed=seed, index=index).text

    before = torch.random.get_rng_state()
    first = reply(1, 4)
    assert first != reply(1, 5)
    assert first != reply(2, 4)
    assert first == reply(1, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    greedy = chat.reply(request, sampling=Sampling(max_new_tokens=8, temperature=0)).text
    assert greedy == chat.reply(request, sampling=Sampling(max_new_tokens=8), seed=9).text != first


def test_file_of_questions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPT, "images": ["grey.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}]}]},
        {"prompt": "No picture."},
    ]  # fmt: skip
    file, output = folder / "questions.jsonl", tmp_path / "new" / "replies.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    command = ["generate", "--model", str(folder), "--input", str(file), "--max-new-tokens", "3"]
    assert main([*command, "--output", str(output)]) == 0
    replied = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: row[key] for key in asked} for asked, row in zip(rows, replied, strict=True)] == rows
    assert all(row["reply_tokens"] == 3 and not row["finished"] for row in replied)
    capsys.readouterr()
    assert main(command) == 0  # to the terminal
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == replied
    assert main([*command, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":2: it is no JSON"),
        ("[]", ":2: \\[\\] is no object"),
        ('{"prompt": "a", "image": ["x"]}', 'unknown key "image"; did you mean "images"'),
        ("{}", 'needs "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "one of them"),
        ('{"prompt": "a", "images": ["gray.png"]}', "image gray.png: there is no such file"),
        ('{"prompt": "<image> a", "images": ["grey.png", "red.png"]}', "2 images are given, but the texts have 1"),
        ('{"prompt": "<video> a"}', "more <video> than there are videos"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', 'role "robot" is none of'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is a reply already"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "images": ["' + "a" * 5000 + '"]}', "there is no such file"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(folder: Path, row: str, message: str) -> None:
    file = folder / "wrong.jsonl"
    file.write_text('{"prompt": "fine"}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_requests(str(file))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_only_line_ends_separate_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    prompts = ["a\u2028b", "c\x85d", "e"]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    file.write_bytes("\r\n".join([*rows, ""]).encode())
    assert [request.row and request.row["prompt"] for request in read_requests(str(file))] == prompts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--prompt", "a"], "there is no config.json"),
        (["--model", "x"], "needs a question"),
        (["--model", "x", "--prompt", "a", "--input", "b"], "one of them"),
        (["--model", "x", "--prompt", "a", "--image", "none.png"], "image none.png: there is no such file"),
        (["--model", "x", "--prompt", "a", "--top-p", "2"], "--top-p 2.0: it must be above 0 and at most 1"),
        (["--model", "x", "--prompt", "a", "--temprature", "1"], "did you mean --temperature?"),
        (["--model", "x", "--prompt", "a", "--temperature", "0", "--top-k", "3"], "leave --top-p and --top-k out"),
        (["--load", "x", "--prompt", "a", "--init", "random"], "leave one of them out"),
    ],
)  # fmt: skip
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *flags]) == 2
    assert message in capsys.readouterr().err


def test_conversation_longer_than_the_model_reads(chat: Chat) -> None:
    with pytest.raises(UserError, match="tokens, and the model reads 4096"):
        chat.reply(request_of("zx" * 4096))
