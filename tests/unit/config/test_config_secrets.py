"""Passwords and tokens in a configuration are never shown and never stored with a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli.main import main
from mm_core.config import ConfigError, check_file, check_training_job, load_training_job
from mm_core.config.findings import Finding, show
from mm_core.config.json_reader import parse_json
from mm_core.config.overwrite import Overwrite
from mm_core.config.secrets import hide, is_secret, without_secrets
from mm_core.config.yaml_reader import parse_yaml

SECRET = "hunter2-%s"


@pytest.mark.parametrize(
    "key",
    ["token", "api_token", "HF_TOKEN", "hfToken", "auth-token", "password", "db_password", "passwd", "secret",
     "client_secret", "secret_key", "api_key", "apiKey", "APIKEY", "OPENAI_API_KEY", "aws_access_key_id",
     "private_key", "credentials"],
)  # fmt: skip
def test_keys_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["max_tokens", "tokens", "tokenizer", "tokenizer_config", "pad_token", "eos_token", "image_token_id",
     "video_token", "num_token", "key", "keys", "monkey", "access", "secretary", "passwordless", "keyword",
     "max_token", "", "model_id"],
)  # fmt: skip
def test_keys_of_no_secrets(key: str) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [("https://me:hunter2@host/x", "https://***@host/x"),
     ("https://me:hunter@2@host/x", "https://***@host/x"),
     ("https://host?mail=me@host", "https://host?mail=me@host"),
     ('is "s3://key:secret@bucket", expected', 'is "s3://***@bucket", expected'),
     ("https://host/x?a=1&access_token=hunter2&b=2#c", "https://host/x?a=1&access_token=***&b=2#c"),
     ("https://host/x?revision=main", "https://host/x?revision=main"),
     ("https://host/a@b", "https://host/a@b"),
     ("me@host: a, b", "me@host: a, b")],
)  # fmt: skip
def test_addresses_with_credentials(text: str, hidden: str) -> None:
    assert hide(text) == hidden


def test_values_are_hidden_where_they_are_shown() -> None:
    data = {"hub": {"token": "hunter2", "user": "me"}, "secrets": {"a": ["hunter2", 7, None, True, ""]}}
    clean = {"hub": {"token": "***", "user": "me"}, "secrets": {"a": ["***", "***", None, True, ""]}}
    assert without_secrets(data) == clean
    assert show(data) == json.dumps(clean)
    assert show("hunter2", ("hub", "token")) == '"***"'
    written = Overwrite("ae.api_key", "hunter2", "hunter3", "dist 1", "why", True)
    assert str(written) == 'ae.api_key: "***" → "***", by dist 1: why'
    assert "hunter" not in str(written.to_dict())
    found = Finding(
        "error", "x", "cannot open https://me:hunter2@host", suggestion="try https://me:hunter2@h"
    )
    assert "hunter2" not in str(found) + str(found.to_dict()) + str(ConfigError([found]))


#: What is written for the value of a secret key, so that a check complains about it.
MISTAKES = {
    "model": [
        lambda m: m["ae"].update(api_token=SECRET),
        lambda m: m["predictor"].update(password=SECRET),
        lambda m: m.update(hub_token=SECRET),
        lambda m: m["diffusion"].update(access_key={"a": SECRET}),
        lambda m: m["ae"].update(from_pretrained=f"https://me:{SECRET}@host/vae"),
    ],
    "data": [
        lambda d: d.update(secret=[SECRET]),
        lambda d: d["dataset_param"]["tokenizer_config"].update(token=SECRET),
        lambda d: d["dataset_param"]["basic_parameters"].update(data_path=f"https://me:{SECRET}@host/d"),
    ],
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_no_finding_shows_a_secret(files: Any, kind: str) -> None:
    for spoil in MISTAKES[kind]:
        content = json.loads(json.dumps(getattr(files, kind)))
        spoil(content)
        files.write()
        Path(f"{kind}.json").write_text(json.dumps(content, indent=1))
        found = check_file(f"{kind}.json")
        told = "".join(str(f) + json.dumps(f.to_dict()) for f in found)
        told += "".join(str(f) + json.dumps(f.to_dict()) for f in check_training_job(files.flags()))
        assert "hunter2" not in told, told


@pytest.mark.parametrize(
    "text",
    ['{"password": hunter2}', '{"password": "a" "hunter2"}', '{"token": ["a" "hunter2"]}',
     '{"api_key": {"x": hunter2}}', '{"password":hunter2 hunter2}'],
)  # fmt: skip
def test_syntax_errors_show_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "m.json")
    assert "hunter2" not in str(caught.value)


#: A part of the data file that may hold any keys.
FREE = "dataset_param.preprocess_parameters.train_pipeline.first_frame_clip"


def _with_secrets(files: Any) -> None:
    pipeline = files.data["dataset_param"]["preprocess_parameters"]["train_pipeline"]
    pipeline["first_frame_clip"] = [{"hf_token": "hunter2", "source": "s3://me:hunter2@bucket/x"}]
    files.write()


def test_what_is_stored_with_a_run_has_none(files: Any) -> None:
    _with_secrets(files)
    resolved = load_training_job(files.flags()).resolved()
    assert "hunter2" not in json.dumps(resolved)
    value = resolved["values"]["data"]
    for part in FREE.split("."):
        value = value[part]
    assert value == [{"hf_token": "***", "source": "s3://***@bucket/x"}]


@pytest.mark.parametrize("form", ["table", "json"])
def test_explain_shows_none(files: Any, capsys: pytest.CaptureFixture[str], form: str) -> None:
    _with_secrets(files)
    assert main(["explain", "first_frame_clip", "data.json", "--format", form]) == 0
    told = capsys.readouterr().out
    assert "hf_token" in told
    assert "***" in told
    assert "hunter2" not in told


def test_a_plugins_validator_that_quotes_the_value(write: Callable[[str, str], str]) -> None:
    from pydantic import field_validator

    from mm_core.config import read_document
    from mm_core.config.section import SectionModel, check_section

    class Section(SectionModel):
        api_key: str
        retries: int = 0

        @field_validator("api_key")
        @classmethod
        def _check(cls, value: str) -> str:
            raise ValueError(f"the key {value!r} is malformed")

    document = read_document(write("m.json", '{"api_key": "hunter2", "retries": "7"}'))
    told = [str(finding) for finding in check_section(Section, document, label="hub").findings]
    assert told[0] == 'm.json:1:13 error: "api_key" is "***": the key \'***\' is malformed'
    assert len(told) == 2
    assert "hunter2" not in "".join(told)


@pytest.mark.parametrize(
    "text",
    ["password: *hunter2", '{"password": *hunter2}', "a: {api_token: !hunter2 x}", "api_token: !hunter2 {}",
     "api_token: !hunter2 [x]"],
)  # fmt: skip
def test_passwords_that_begin_with_a_sign_of_yaml(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "m.yaml")
    assert "hunter2" not in str(caught.value)
    assert "***" in str(caught.value)
