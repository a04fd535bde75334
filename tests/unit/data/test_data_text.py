from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import torch
from data_helpers import TINY

from mm_core.config import read_document
from mm_core.config.text import TextMethodName
from mm_core.data.errors import DataError
from mm_core.data.text import TEXT_METHODS, PromptTokenizer, basic_clean, clean_text, whitespace_clean

METHODS = ("basic_clean", "whitespace_clean")
CHINESE = "一只灰色的大兔子从洞里爬出来"


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TINY / "tokenizer", 32, METHODS)


def test_cleaning() -> None:
    assert basic_clean("  cats &amp;amp; dogs &lt;3 ") == "cats & dogs <3"
    assert whitespace_clean(" a\tb\n\n c ") == "a b c"
    assert clean_text("  A &amp; B\n", METHODS) == "A & B"
    assert clean_text("  A ", []) == "  A "
    assert clean_text(" ABC ", ["lowercase"]) == clean_text(" ABC ", ["lower"]) == "abc"


def test_the_configuration_and_the_data_room_know_the_same_methods() -> None:
    accepted = typing.get_args(TextMethodName)
    assert set(accepted) == set(TEXT_METHODS)
    assert [clean_text(" x ", [name]) for name in accepted] == ["x"] * len(accepted)


EXAMPLES = sorted(TINY.parents[1].rglob("inference_model.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.parent.relative_to(TINY.parents[1])))
def test_the_examples_clean_prompts_as_they_clean_captions(path: Path) -> None:
    assert len(EXAMPLES) >= 4
    own = path.with_name("data.json")  # image to video is trained on the same clips
    data = read_document(own if own.exists() else TINY / "data.json").data["dataset_param"]
    inference = read_document(path).data
    assert data["enable_text_preprocessing"]
    assert inference["text_preprocess_methods"] == data["text_preprocess_methods"] != []
    assert not inference.get("use_prompt_preprocess")


def test_no_script_is_lost() -> None:
    text = f"{CHINESE}の カタカナ 한국어 émigré Ω 🐇"
    assert clean_text(text, METHODS) == text


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(DataError, match=r"'clean_caption'.*basic_clean, whitespace_clean"):
        clean_text("a", ["clean_caption"])


def test_prompts_are_padded_to_one_length(tokenizer: PromptTokenizer) -> None:
    ids, mask = tokenizer("A grey rabbit.")
    assert ids.shape == mask.shape == (32,)
    assert ids.dtype == mask.dtype == torch.int64
    length = int(mask.sum())
    assert mask.tolist() == [1] * length + [0] * (32 - length)
    assert ids[length - 1] == 1  # </s>
    assert ids[length:].tolist() == [0] * (32 - length)  # <pad>


def test_long_prompts_are_cut_and_still_end(tokenizer: PromptTokenizer) -> None:
    ids, mask = tokenizer("rabbit " * 100)
    assert mask.sum() == 32
    assert ids[-1] == 1


def test_an_empty_prompt_is_one_token(tokenizer: PromptTokenizer) -> None:
    ids, mask = tokenizer("")
    assert ids[0] == 1
    assert mask.sum() == 1


def test_cleaning_comes_first(tokenizer: PromptTokenizer) -> None:
    assert torch.equal(tokenizer(" a&nbsp;&nbsp;rabbit ")[0], tokenizer("a rabbit")[0])


@pytest.mark.parametrize("text", [CHINESE, "Zebra? xylophone! 龘 🐇 Ω", "A glass skyscraper glows."])
def test_the_shipped_tokenizer_spells_everything(text: str) -> None:
    tokenizer = PromptTokenizer(TINY / "tokenizer", 128)
    ids, mask = tokenizer(text)
    assert 2 not in ids.tolist()  # <unk>
    assert len(tokenizer) <= 1024
    assert int(ids.max()) < len(tokenizer)
    assert tokenizer._tokenizer.decode(ids[: int(mask.sum())], skip_special_tokens=True) == text


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        PromptTokenizer(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer") as caught:
        PromptTokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / "tokenizer" / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="no padding token"):
        PromptTokenizer(tmp_path)


def test_the_class_named_must_be_the_one_stored() -> None:
    assert len(PromptTokenizer(TINY / "tokenizer", class_name="PreTrainedTokenizerFast")) > 500
    with pytest.raises(DataError, match="autotokenizer_name is BertTokenizer"):
        PromptTokenizer(TINY / "tokenizer", class_name="BertTokenizer")
