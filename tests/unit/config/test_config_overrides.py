"""`key.path=value` on the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mm_core.config import ConfigError, Document, check_training_job, load_training_job, parse_train_flags
from mm_core.config.overrides import apply_overrides, is_override, parse_override

CLASSIC = [
    "--mm-model",
    "model.json",
    "--mm-data",
    "data.json",
    "--mm-tool",
    "tools.json",
    "--fsdp2-config-path",
    "fsdp2.yaml",
]
WORDS = [*CLASSIC, "--train-iters", "10", "--lr", "1e-4", "--load", "weights/transformer"]


def errors(*words: str) -> list[str]:
    """Return the errors of the classic job with more words on its command line."""
    try:
        found = check_training_job(parse_train_flags([*WORDS, *words]))
    except ConfigError as error:
        found = error.findings
    return [str(finding) for finding in found if finding.level == "error"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2), ("1e-4", 1e-4), ("true", True), ("null", None), ("~", None), ("wandit", "wandit"),
        ("'2'", "2"), ('""', ""), ("[1, 2, 2]", [1, 2, 2]), ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("a b", "a b"), ("note: this", "note: this"), ("a #b", "a #b"), ("predictor.blocks.{*}", "predictor.blocks.{*}"),
        ("*x", "*x"), ("&x", "&x"), ("!x", "!x"), ("a=b", "a=b"), ("- x", "- x"), ("08", "08"), ("C:/x", "C:/x"),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    found = parse_override(f"model.x={text}").value
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word", ["model.x=1", "model=1", "modle.y.z=1", "flags.lr=", "model.text_encoder[0].dtype=fp32"]
)
def test_what_is_an_override(word: str) -> None:
    assert is_override(word)


@pytest.mark.parametrize(
    "word", ["--lr=1", "job.yaml", "./a=b.json", "runs/a=b/job.yaml", "/a=b.yaml", "=1", "1=2", "-x=1"]
)
def test_what_is_none(word: str) -> None:
    assert not is_override(word)


def test_it_wins_over_files_and_has_the_command_line_as_origin(files: Any) -> None:
    flags = parse_train_flags(
        [
            *WORDS,
            "model.predictor.num_layers=2",
            "data.dataloader_param.pin_memory=false",
            "fsdp2.sharding_size=1",
        ]
    )
    job = load_training_job(flags)
    assert job.model.predictor["num_layers"] == 2
    assert job.components["predictor"].fields["num_layers"] == 2
    assert job.fsdp2.sharding_size == 1
    resolved = json.loads(json.dumps(job.resolved()))
    assert resolved["values"]["data"]["dataloader_param"]["pin_memory"] is False
    origins = resolved["origins"]
    assert origins["model.predictor.num_layers"] == "command line: model.predictor.num_layers=2"
    assert origins["fsdp2.sharding_size"] == "command line: fsdp2.sharding_size=1"
    assert origins["model.predictor.hidden_size"].startswith("model.json:")


def test_the_last_one_counts(files: Any) -> None:
    words = ["model.predictor.num_layers=2", "model.predictor.num_layers=3"]
    assert load_training_job(parse_train_flags([*WORDS, *words])).model.predictor["num_layers"] == 3


def test_flags_are_set_by_either_name(files: Any) -> None:
    flags = parse_train_flags([*WORDS, "gpt_args.lr=3", "flags.bf16=true", "flags.log-interval=5"])
    assert (flags.lr, flags.bf16, flags.log_interval) == (3, True, 5)
    assert str(flags.origin("bf16")) == "command line: flags.bf16=true"
    assert [str(f) for f in flags.findings if f.level != "note"] == []


def test_a_flag_of_the_job_file_is_taken_back(files: Any) -> None:
    content = {"gpt_args": {"lr": 1, "save": "x", "bf16": True, "train_iters": 3}}
    (files.folder / "job.yaml").write_text(json.dumps(content))
    flags = parse_train_flags(["job.yaml", "flags.save=null", "flags.bf16=false"])
    assert (flags.save, flags.bf16, flags.lr) == (None, False, 1)
    assert parse_train_flags(["job.yaml", "--bf16=false"]).bf16 is False


def test_sections_that_no_file_gives(files: Any) -> None:
    words = [word for word in WORDS if word not in ("--fsdp2-config-path", "fsdp2.yaml")]
    job = load_training_job(parse_train_flags([*words, "fsdp2.sharding_size=1"]))
    assert job.fsdp2.sharding_size == 1
    flags = parse_train_flags([*words, "fsdp2=fsdp2.yaml"])
    assert flags.fsdp2_config_path == "fsdp2.yaml"
    assert load_training_job(flags).fsdp2.param_dtype == "bf16"


def test_a_whole_section(files: Any) -> None:
    job = load_training_job(parse_train_flags([*WORDS, "fsdp2={sharding_size: 1}"]))
    assert (job.fsdp2.sharding_size, job.fsdp2.param_dtype) == (1, None)


def test_plugins(files: Any) -> None:
    assert errors("plugins=[nosuch]") == [
        "command line: plugins=[nosuch] error: the distribution 'nosuch' is not installed"
    ]


GOLDEN = [
    ("model.predictor.num_layer=2", 'unknown key "num_layer" in predictor (wandit). Did you mean "num_layers"?'),
    ("model.predicter.num_layers=2", 'unknown key "predicter" in model.json. Did you mean "predictor"?'),
    ("model.predictor.num_layers=two", '"num_layers" is "two", expected a whole number'),
    ("data.dataset_param.dataset_type=t2w",
     "no installed distribution offers the dataset 't2w'. Did you mean 't2v' (mmzoo-core"),
    ("tools.profile.enable=1", '"enable" is 1, expected true or false. Write true'),
    ("modl.x=1", 'there is no section "modl". Did you mean "model"?'),
    ("foo.x=1", 'there is no section "foo". Known sections: model, data, tools, fsdp2, plugins, gpt_args, flags, lora_args'),
    ("model.task.x=1", 'model.task is "t2v", no object, so nothing can be set in it'),
    ("model.predictor.patch_size.3=1", 'model.predictor.patch_size is a list, and "3" is no item of it (0 to 2)'),
    ("model.predictor.patch_size.x=1", 'model.predictor.patch_size is a list, and "x" is no item of it (0 to 2)'),
    ("model.=1", "a name of its path is empty. Write section.key=value"),
    ("model..x=1", "a name of its path is empty. Write section.key=value"),
    ("model.x=", "the value is missing. Write null for no value, or '\"\"' for an empty text"),
    ("model.x=[1,", "the value is malformed: "),
    ("model=3", "a section is an object or the path of a file. Name a key: section.key=value"),
    ("flags=3", "it names no flag. Write flags.lr=1e-4, say"),
    ("flags.lrr=3", 'there is no flag "lrr". Did you mean "lr"?'),
    ("flags.lr.x=3", 'there is no flag "lr.x". Did you mean "lr"?'),
    ("flags.seed=x", '"x", expected a whole number'),
    ("flags.train_iters=0", "0: must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "message"), GOLDEN, ids=[word for word, _ in GOLDEN])
def test_mistakes(files: Any, word: str, message: str) -> None:
    (found,) = [text for text in errors(word) if text.startswith("command line: ")]
    assert found.startswith(f"command line: {word} error: {message}")


def test_items_of_lists(files: Any) -> None:
    files.model["text_encoder"] = [files.model["text_encoder"]]
    files.write()
    for word in ("model.text_encoder.0.dtype=fp32", "model.text_encoder[0].dtype=fp32"):
        job = load_training_job(parse_train_flags([*WORDS, word]))
        assert job.components["text_encoder.0"].dtype == "fp32"


def test_secrets_are_not_echoed(files: Any) -> None:
    for word in ("model.ae.hub_token=hunter2", "model.ae.from_pretrained=https://me:hunter2@host/x"):
        override = parse_override(word)
        assert "hunter2" in str(override.value)
        assert "hunter2" not in str(override.origin)
        found = errors(word)
        assert found
        assert not [text for text in found if "hunter2" in text]
    for word in (
        "model.ae={api_token: hunter2}",
        'model.ae={"password": "hunter2"',
        "model.ae=[{hf_token: hunter2}]",
    ):
        assert not [text for text in errors(word) if "hunter2" in text], word
    assert errors("model.ae.hub_token=hunter2")[0].startswith("command line: model.ae.hub_token=*** error: ")


def test_long_values_are_shortened() -> None:
    assert len(str(parse_override("model.x=" + "y" * 1000).origin)) < 100


def test_a_document_is_not_changed() -> None:
    document = Document.from_data({"a": {"b": 1}})
    changed, findings = apply_overrides(document, [parse_override("model.a.c.d=2")], "model")
    assert findings == []
    assert document.data == {"a": {"b": 1}}
    assert changed.data == {"a": {"b": 1, "c": {"d": 2}}}
    assert str(changed.key_origin(("a", "c"))) == "command line: model.a.c.d=2"
    same, _ = apply_overrides(document, [parse_override("model.a.b=2")], "data")
    assert same is document


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match="the value is not UTF-8 text"):
        parse_override("model.x=\udcff")
