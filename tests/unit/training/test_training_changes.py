"""What makes a resumed job another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import load_training_job, parse_train_flags, read_document
from mm_core.training.changes import changes, identity, other_versions

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples/tiny/wan22-t2v"


def job_of(*more: str, model: Path | None = None, data: Path | None = None) -> Any:
    flags = ["--mm-model", str(model or TINY / "model.json"), "--mm-data", str(data or TINY / "data.json"),
             "--lr", "1e-3", "--train-iters", "4", "--micro-batch-size", "1", "--global-batch-size", "2", *more]  # fmt: skip
    return load_training_job(parse_train_flags(flags))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # classic files name others from there


def state_of(job: Any, **edits: Any) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    state: dict[str, Any] = json.loads(json.dumps({**identity(job), "config": job.resolved()}))
    return state | edits


@pytest.mark.parametrize(
    "flags",
    [
        (), ("--num-workers", "3"), ("--micro-batch-size", "2"), ("--save", "runs/a", "--save-interval", "2"),
        ("--exit-interval", "3"), ("--log-interval", "7"), ("--nproc-per-node", "2"), ("--recompute-granularity", "full"),
        ("--no-load-optim", "--no-load-rng"), ("--no-save-optim",), ("--accept-changes",), ("--lr-decay-iters", "4"),
        ("--optimizer-selection", "torch_adamw"), ("--use-deter-comp",), ("--tensorboard-dir", "b"),
    ],
    ids=lambda flags: " ".join(flags) or "nothing",
)  # fmt: skip
def test_what_changes_no_number_does_not_count(flags: tuple[str, ...]) -> None:
    assert changes(state_of(job_of()), job_of(*flags)) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--global-batch-size", "4"), ["--global-batch-size: 2 → 4"]),
        (("--weight-decay", "0.5"), ["--weight-decay: 0.01 → 0.5"]),
        (("--ema-decay", "0.99"), ["--ema-decay: null → 0.99"]),
        (("--lr", "2e-3", "--adam-beta2", "0.95"), ["--lr: 0.001 → 0.002", "--adam-beta2: 0.999 → 0.95"]),
        (("--train-iters", "8"), ["--lr-decay-iters (by default --train-iters): 4 → 8"]),
        (("--train-iters", "8", "--lr-decay-iters", "4"), []),
        (("--bf16",), ["fsdp2.param_dtype: null → \"bf16\"", "fsdp2.reduce_dtype: null → \"fp32\""]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_flags_that_change_numbers_are_told(flags: tuple[str, ...], said: list[str]) -> None:
    assert changes(state_of(job_of()), job_of(*flags)) == said


def test_the_length_of_a_sequence_counts_where_it_is_read() -> None:
    assert changes(state_of(job_of()), job_of("--seq-length", "64")) == []
    chat = {name: ROOT / f"examples/tiny/qwen3vl/{name}.json" for name in ("model", "data")}
    before = state_of(job_of("--seq-length", "128", **chat))
    assert changes(before, job_of("--seq-length", "64", **chat)) == ["--seq-length: 128 → 64"]
    adapted = job_of("--seq-length", "128", "--lora-target-modules", "q_proj", "--lora-r", "4", **chat)
    wider = job_of("--seq-length", "128", "--lora-target-modules", "q_proj", "--lora-r", "8", **chat)
    assert changes(state_of(adapted), wider) == ["--lora-r: 4 → 8"]


def test_a_constant_rate_has_no_end() -> None:
    constant = ("--lr-decay-style", "constant")
    assert changes(state_of(job_of(*constant)), job_of(*constant, "--train-iters", "8")) == []


def test_sections_are_compared_wherever_their_files_lie(tmp_path: Path) -> None:
    model, data = tmp_path / "m.json", tmp_path / "d.json"
    model.write_text((TINY / "model.json").read_text())
    data.write_text((TINY / "data.json").read_text())
    before = state_of(job_of())
    assert changes(before, job_of(model=model, data=data)) == []
    text = model.read_text()
    assert '"num_layers": 4' in text
    model.write_text(text.replace('"num_layers": 4', '"num_layers": 2'))
    assert changes(before, job_of(model=model, data=data)) == ["model.predictor.num_layers: 4 → 2"]


def test_plugins_are_compared_and_the_engine_is_a_package_like_others() -> None:
    job = job_of()
    before = state_of(job)
    plugins = {
        **before["plugins"],
        "mmzoo-plugin-wan22": "0.0.9",
        "mmzoo-core": "0.0.9",
        "mmzoo-plugin-old": "1.0",
    }
    assert changes(before | {"plugins": plugins}, job) == [
        "plugin mmzoo-plugin-old: 1.0 → not used",
        "plugin mmzoo-plugin-wan22: 0.0.9 → 0.1.0",
    ]
    before["fingerprint"]["components"]["predictor"] |= {"distribution": "other", "target": "other:WanDiT"}
    (line,) = changes(before, job)
    assert line.startswith(
        "predictor: other/wandit (other:WanDiT) → mmzoo-plugin-wan22/wandit (mm_plugin_wan22"
    )
    versions = {**before["versions"], "torch": "2.11.0"}
    (told,) = other_versions({"versions": versions})
    assert told.startswith("torch 2.11.0 → ")


def test_what_an_older_checkpoint_does_not_tell_is_not_compared() -> None:
    job = job_of()
    assert changes({"step": 1, "plugins": {}}, job) == []
    assert other_versions({"step": 1}) == []
    state = state_of(job)
    del state["config"]["values"]["flags"]["ema_decay"]  # of a version that did not know it
    del state["config"]["values"]["model"]["predictor"]["num_layers"]  # somebody has written it since
    assert changes(state, job) == ["model.predictor.num_layers: absent → 4"]


def test_the_micro_batch_counts_where_it_decides_the_order(tmp_path: Path) -> None:
    settings = read_document(str(TINY / "data.json")).data
    settings["dataloader_param"]["group_data"] = True
    (tmp_path / "data.json").write_text(json.dumps(settings), encoding="utf-8")
    before = state_of(job_of(data=tmp_path / "data.json"))
    assert changes(before, job_of("--micro-batch-size", "2", data=tmp_path / "data.json")) == [
        "--micro-batch-size: 1 → 2"
    ]
    assert changes(before, job_of()) == ["data.dataloader_param.group_data: true → false"]
