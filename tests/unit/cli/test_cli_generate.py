"""The flags of `mm generate`: every mistake is one message and exit code 2, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_core.cli import generate as command
from mm_core.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
MODEL = "examples/tiny/wan22-t2v/inference_model.json"


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a right command line comes to, instead of videos."""
    seen: dict[str, Any] = {}

    def stop_here(job: Any, options: Any, findings: Any) -> int:
        seen.update(job=job, findings=[str(finding) for finding in findings], **vars(options))
        return 0

    monkeypatch.setattr(command, "_generate", stop_here)
    return seen


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--promt", "--prompt"), ("--num_inference_step", "--num-inference-steps"), ("--sed=3", "--seed")],
)
def test_an_unknown_flag(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "--mm-model", MODEL, flag, "x")
    assert flag.partition("=")[0].replace("_", "-") in err
    assert f"did you mean {meant}?" in err


def test_a_flag_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mm generate --help" in refused(capsys, "--mm-model", MODEL, "--qqqqqq")


def test_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--neg" in refused(capsys, "--mm-model", MODEL, "--neg", "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "1.5"], ["--seed", "1.5"]),
        (["--seed", "one"], ["--seed", "one"]),
        (["--seed"], ["--seed"]),
        (["--num-inference-steps", "0"], ["--num-inference-steps 0", "at least 1"]),
        (["--num-inference-steps", "-3"], ["--num-inference-steps -3", "at least 1"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--guidance-scale", "strong"], ["--guidance-scale", "strong"]),
        (["--guidance-scale", "nan"], ["--guidance-scale", "finite"]),
        (["--guidance-scale", "1", "2", "3"], ["--guidance-scale", "two"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_values(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "--mm-model", MODEL, "--load", ".", *arguments)
    assert all(word in err for word in words), err


def test_the_model_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mm-model" in refused(capsys, "--prompt", "x")


def test_a_model_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.json" in refused(capsys, "--mm-model", "nowhere.json", "--prompt", "x")


def test_underscores_are_hyphens_in_flags_only(received: dict[str, Any], tmp_path: Path) -> None:
    arguments = [
        "--mm_model", MODEL, "--prompt=a_tram --crosses", "--negative_prompt", "very_bad",
        "--save_path", str(tmp_path / "my_out"),
        "--num_inference_steps", "4", "--guidance_scale", "3", "4.5", "--seed", "-1", "--batch_size=2", "--load", str(tmp_path),
    ]  # fmt: skip
    assert main(["generate", *arguments]) == 0
    assert received["prompt"] == "a_tram --crosses"
    assert received["negative_prompt"] == "very_bad"
    assert received["save_path"] == str(tmp_path / "my_out")
    assert received["num_inference_steps"] == 4
    assert received["guidance_scale"] == [3.0, 4.5]
    assert received["seed"] == -1
    assert received["batch_size"] == 2
    assert list(received["job"].prompts) == ["a_tram --crosses"]


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-h"]) == 0
    out = capsys.readouterr().out
    for flag in (
        "--mm-model",
        "--prompt",
        "--negative-prompt",
        "--load",
        "--save-path",
        "--seed",
        "--guidance-scale",
        "--batch-size",
    ):
        assert flag in out


#: What a script for MindSpeed-MM's inference_sora.py gives.
CLASSIC = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --virtual-pipeline-model-parallel-size 1 "
    "--context-parallel-size 1 --context-parallel-algo ulysses_cp_algo --num-layers 1 --hidden-size 3072 "
    "--num-attention-heads 48 --seq-length 24 --max-position-embeddings 24 --attention-dropout 0.0 --hidden-dropout 0.0 "
    "--tokenizer-type NullTokenizer --vocab-size 0 --position-embedding-type rope --rotary-base 500000 --swiglu "
    "--no-masked-softmax-fusion --micro-batch-size 1 --global-batch-size 16 --num-workers 8 --lr 1e-5 --min-lr 1e-5 "
    "--bf16 --finetune --distributed-timeout-minutes 10 --distributed-backend nccl --use-cpu-initialization "
    "--no-load-optim --no-load-rng --no-save-optim --no-save-rng --ckpt-format torch_dcp --mm-tool tools.json"
)


def test_flags_of_a_classic_inference_script(received: dict[str, Any], tmp_path: Path) -> None:
    own = ["--mm-model", MODEL, "--load", str(tmp_path), "--prompt", "a tram", "--micro-batch-size", "2"]
    assert main(["generate", *CLASSIC.split(), *own]) == 0
    assert received["batch_size"] == 2, "--micro-batch-size means what it means there"
    assert list(received["job"].prompts) == ["a tram"]
    noted = {line.partition(" ")[0]: line for line in received["findings"]}
    assert noted["--global-batch-size"].endswith("has no effect here: only training reads it")
    assert noted["--bf16"].endswith("has no effect here: dtype in the inference file decides")
    assert noted["--hidden-size"].endswith("model.json and the weights' folder describe the model")
    assert "--finetune" not in noted, "it asks for what is done anyway"
    assert {line.split()[1] for line in noted.values()} == {"note:"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--context-parallel-size 4",
            "--context-parallel-size 4: it does not divide the 1 rank that there is; give --nproc-per-node 4",
        ),
        (
            "--nproc-per-node 3 --context-parallel-size 2",
            "--context-parallel-size 2: it does not divide the 3 ranks that there are",
        ),
        (
            "--tensor-model-parallel-size 2",
            "--tensor-model-parallel-size: 2: only 1 is accepted: ranks share videos",
        ),
        ("--nproc-per-node 0", "--nproc-per-node 0: it must be at least 1"),
        ("--lora-load a b c", "--lora-load: give one path, or two"),
        ("--repeat x.json", "one of them"),
        ("--hidden-size many", '--hidden-size: "many", expected a whole number'),
        ("--global-batch-size", "--global-batch-size: a value is missing. Write --global-batch-size N"),
        ("--hiden-size 1", "did you mean --hidden-size?"),
        ("--trust-remote-code", "code from a folder of weights is never run"),
    ],
)
def test_classic_flags_are_not_swallowed(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "--mm-model", MODEL, *line.split())


def test_images_and_ranks(
    received: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["--mm-model", MODEL, "--prompt", "x", "--load", str(tmp_path)]
    assert '"image" is given, but predictor (wandit) of model_type t2v takes no first frame' in refused(
        capsys, *line, "--image", __file__
    )
    assert "there is no such file" in refused(capsys, *line, "--image", "none.png")
    assert main(["generate", *line, "--nproc-per-node", "1"]) == 0
    assert received["nproc_per_node"] == 1


def test_a_wrong_variable_is_told(
    received: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    line = ["--mm-model", MODEL, "--prompt", "x", "--load", str(tmp_path)]
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "10")
    assert main(["generate", *line]) == 0
    assert any("HCCL_CONNECT_TIMEOUT warning" in said for said in received["findings"])
    monkeypatch.setenv("MM_DEVICE", "tpu")
    assert "MM_DEVICE" in refused(capsys, *line)
