"""Files of conversations are looked at, as far as that is cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.component import ComponentConfig
from mm_core.config.cross_checks import check_sequence_length
from mm_core.config.cross_checks.chats import check_chats
from mm_core.config.dataset import T2VDatasetConfig
from mm_core.config.dataset_huggingface import HuggingFaceDatasetConfig
from mm_core.config.document import Document
from mm_core.config.flags import TrainFlags

GOOD = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("model").mkdir()
    Path("data/cat.png").touch()


def check(
    *rows: Any,
    text: str | None = None,
    attr: Any = None,
    loader: Any = None,
    model: str = "model",
    **basic: Any,
) -> list[str]:
    text = "".join(json.dumps(row) + "\n" for row in rows) if text is None else text
    Path("data/a.jsonl").write_text(text)
    parameters = {"dataset": "a.jsonl", "dataset_dir": "data", **basic}
    section: dict[str, Any] = {
        "basic_parameters": parameters,
        "preprocess_parameters": {"model_name_or_path": model},
    }
    section |= {} if attr is None else {"attr": attr}
    document = Document.from_data({"dataset_param": section, "dataloader_param": loader or {}})
    return [str(finding) for finding in check_chats(document)]


def test_good_files() -> None:
    assert check(GOOD) == []
    assert check(text=json.dumps([GOOD, GOOD], indent=1)) == []
    assert check({**GOOD, "images": ["cat.png"]}, attr={"images": "images"}) == []
    assert check(GOOD, dataset="data", val_dataset="a.jsonl, data/a.jsonl") == []
    assert check(GOOD, attr={"role_tag": None}) == []  # its class says so


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([GOOD], {"dataset": "b.jsonl"}, 'error: dataset: there is no file or folder "b.jsonl" (seen from the working directory '
         'or from "data")'),
        ([GOOD], {"val_dataset": "model"}, 'error: val_dataset: the folder "model" has no file *.json or *.jsonl'),
        ([GOOD], {"model": "none"}, 'model_name_or_path is "none": there is no such folder'),
        ([GOOD, {}], {}, 'data/a.jsonl:2 warning: conversation 1: it has no list "conversations" (attr.messages)'),
        ([{}, {}], {}, "data/a.jsonl:1 error: conversation 0: it has no list \"conversations\" (attr.messages); and none of the "
         "first 2 can be used"),
        ([GOOD, [1]], {}, "data/a.jsonl:2 warning: conversation 1: it is no object in JSON"),
        ([GOOD, {"conversations": [{"from": "user"}]}], {}, 'a message has the from "user", and attr knows "function_call", '),
        ([GOOD, {**GOOD, "images": "no.png"}], {"attr": {"images": "images"}}, 'there is no "no.png", which it names under '
         '"images"'),
        ([], {"text": "[{},\n]"}, "data/a.jsonl:2:1 error: it is no JSON: "),
        ([], {"text": '{"a": 1}\n{"a": }\n'}, "data/a.jsonl:1 error: conversation 0: it has no list"),
        ([GOOD], {"streaming": True, "cache_dir": "c"}, 'note: "cache_dir" has no effect here: a stream is prepared'),
        ([GOOD], {"streaming": True, "loader": {"shuffle": True}}, 'warning: "shuffle" has no effect here: a stream keeps'),
        ([GOOD], {"packing": True}, "note: samples that share a sequence see those before them"),
    ],
)  # fmt: skip
def test_what_is_found(rows: list[Any], options: dict[str, Any], expected: str) -> None:
    found = check(*rows, **options)
    assert len(found) == 1
    assert expected in found[0]


def test_lengths() -> None:
    data = {
        "dataset_param": {
            "basic_parameters": {"template": "t", "dataset": "a", "cutoff_len": 512},
            "preprocess_parameters": {"model_name_or_path": "m"},
        }
    }
    config = HuggingFaceDatasetConfig.model_validate(data["dataset_param"])
    spec: Any = None
    chats = ComponentConfig("dataset", "huggingface", spec, config, path=("dataset_param",))
    videos = ComponentConfig(
        "dataset", "t2v", spec, T2VDatasetConfig.model_construct(), path=("dataset_param",)
    )
    document = Document.from_data(data)

    def found(dataset: ComponentConfig, length: int | None) -> list[str]:
        return [str(one) for one in check_sequence_length(dataset, document, TrainFlags(seq_length=length))]

    assert found(chats, 512) == found(chats, None) == found(videos, None) == []
    (conflict,) = found(chats, 1024)
    assert "error: cutoff_len is 512, but --seq-length is 1024. Write one of them" in conflict
    (note,) = found(videos, 1024)
    assert "note: it has no effect here: samples are as long as dataset (t2v) makes them" in note
