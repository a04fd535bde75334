"""`mm train`: what a run leaves behind, ranks, resume, stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, ROOT, Job, edited, losses, metrics, run_mm, started, train

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 10 steps on one rank."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train(Job(), run, "--save-interval", "5", steps=10)
    assert result.code == 0, result.err
    return run


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """The model's weights in a checkpoint, as bytes."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = run / "checkpoints" / f"iter_{step:07d}"
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in entries.items()}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return {key: value.numpy().tobytes() for key, value in state.items()}


def test_a_run_leaves_metrics_config_logs_and_checkpoints(ten_steps: Path) -> None:
    records = metrics(ten_steps)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "seconds",
        "samples_per_second",
        "tokens_per_second",
        "memory_bytes",
    } <= set(records[0])
    assert all(r["seconds"] > 0 and r["grad_norm"] > 0 for r in records)
    config = json.loads((ten_steps / "config.json").read_text())
    assert "model.json" in json.dumps(config)
    assert (ten_steps / "logs" / "rank-00000.log").stat().st_size > 0
    assert list((ten_steps / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (ten_steps / "checkpoints").iterdir()) == [
        "iter_0000005",
        "iter_0000010",
        "latest",
    ]
    assert (ten_steps / "checkpoints" / "latest").read_text().strip() == "iter_0000010"
    assert not list(ten_steps.rglob(".tmp-*"))


@pytest.mark.slow
def test_the_seed_fixes_everything_and_another_seed_changes_it(ten_steps: Path, tmp_path: Path) -> None:
    assert train(Job(), tmp_path / "again", steps=3).code == 0
    assert losses(tmp_path / "again") == losses(ten_steps)[:3]
    assert train(Job(), tmp_path / "other", "--seed", "8", steps=3).code == 0
    assert losses(tmp_path / "other") != losses(ten_steps)[:3]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_bit_equal(ten_steps: Path, tmp_path: Path, ranks: int) -> None:
    flags = ["--nproc-per-node", str(ranks)]
    batch = (2 // ranks, 4)
    whole = ten_steps
    if ranks > 1:
        whole = tmp_path / "whole"
        assert train(Job(), whole, *flags, steps=10, batch=batch).code == 0
    parts = tmp_path / "parts"
    first = train(Job(), parts, *flags, "--exit-interval", "5", steps=10, batch=batch)
    assert first.code == 0, first.err
    assert len(metrics(parts)) == 5
    second = train(Job(), parts, *flags, "--load", parts, steps=10, batch=batch)
    assert second.code == 0, second.err
    assert losses(parts) == losses(whole)
    assert [r["step"] for r in metrics(parts)] == list(range(1, 11))
    assert tensors(parts, 10) == tensors(whole, 10)


@pytest.mark.slow
def test_flags_decide_on_resume_and_the_seed_may_not_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(Job(), run, steps=2).code == 0
    refused = train(Job(), run, "--load", run, "--seed", "8", steps=3)
    assert refused.code == 2
    assert "--seed 7" in refused.err
    assert len(metrics(run)) == 2
    changed = ("--load", run, "--weight-decay", "0.5", "--num-workers", "1")
    refused = train(Job(), run, *changed, steps=3)
    assert refused.code == 2
    assert "--weight-decay: 0.01 → 0.5" in refused.err
    assert "num-workers" not in refused.err, "it changes no number"
    assert len(metrics(run)) == 2
    result = train(Job(), run, *changed, "--accept-changes", steps=3)
    assert result.code == 0, result.err
    assert (
        "changed since the checkpoint was written: --weight-decay: 0.01 → 0.5"
        in (run / "logs" / "rank-00000.log").read_text()
    )
    assert "weight_decay 0.01 → 0.5" in (run / "logs" / "rank-00000.log").read_text()
    state = json.loads((run / "checkpoints" / "iter_0000003" / "state.json").read_text())
    assert state["optimizer"]["groups"][0]["hyperparameters"]["weight_decay"] == 0.5
    assert state["state"]["plugins"]["mmzoo-plugin-wan22"]
    assert state["state"]["config"]["sharding"]["predictor"]
    assert (run / "logs" / "config.1.json").exists()


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        result = train(
            Job(), tmp_path / str(ranks), "--nproc-per-node", str(ranks), steps=20, batch=(2 // ranks, 4)
        )
        assert result.code == 0, result.err
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=1e-5)
    assert metrics(tmp_path / "2")[0]["tokens_per_second"] > 0


@pytest.mark.slow
def test_torchrun_is_the_same_command(tmp_path: Path) -> None:
    flags = Job().flags(
        "--train-iters",
        "2",
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "4",
        "--save",
        tmp_path / "run",
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "mm_core", "train", *flags],
        cwd=ROOT, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "logs" / "rank-00001.log").exists()


def test_a_run_is_not_overwritten(ten_steps: Path) -> None:
    before = (ten_steps / "metrics.jsonl").read_bytes()
    result = train(Job(), ten_steps, steps=2)
    assert result.code == 2
    assert "--load" in result.err
    assert (ten_steps / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_sigterm_saves_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(run, "--micro-batch-size", "2", "--global-batch-size", "2") as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    step = metrics(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").glob("iter_*")] == [f"iter_{step:07d}"]
    result = train(Job(), run, "--load", run, steps=step + 1, batch=(2, 2))
    assert result.code == 0, result.err
    assert metrics(run)[-1]["step"] == step + 1


@pytest.mark.slow
def test_a_dead_rank_takes_the_job_down(tmp_path: Path) -> None:
    with started(
        tmp_path / "run", "--micro-batch-size", "1", "--global-batch-size", "2", "--nproc-per-node", "2"
    ) as process:
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1" in err


@pytest.mark.slow
def test_children_die_with_their_parent(tmp_path: Path) -> None:
    with started(
        tmp_path / "run", "--micro-batch-size", "1", "--global-batch-size", "2", "--nproc-per-node", "2"
    ) as process:
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow
def test_the_static_profile_writes_a_trace(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps({"profile": {
        "enable": True, "profile_type": "static", "ranks": [0],
        "static_param": {"start_step": 2, "end_step": 3, "save_path": str(tmp_path / "profile")},
    }}))  # fmt: skip
    result = train(Job(tools=tools), tmp_path / "run", steps=3)
    assert result.code == 0, result.err
    (trace,) = (tmp_path / "profile").glob("*.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("addmm" in name for name in names)


@pytest.mark.slow
def test_mixed_precision_recompute_and_accumulation_from_the_yaml(ten_steps: Path, tmp_path: Path) -> None:
    fsdp2 = tmp_path / "fsdp2.yaml"
    fsdp2.write_text(
        "sharding_size: auto\nsub_modules_to_wrap: ['predictor.blocks.{*}', predictor.head]\n"
        "recompute_modules: ['predictor.blocks.{*}']\n"
        "ignored_modules: [ae, text_encoder]\nreshard_after_forward: false\n"
    )
    result = train(Job(fsdp2=fsdp2), tmp_path / "recompute", steps=3, batch=(1, 4))
    assert result.code == 0, result.err
    assert losses(tmp_path / "recompute") == pytest.approx(losses(ten_steps)[:3], rel=1e-5)
    half = edited(Job().fsdp2, tmp_path / "bf16.yaml", lambda text: text.replace("fp32", "bf16", 1))
    result = train(Job(fsdp2=half), tmp_path / "bf16", steps=3)
    assert result.code == 0, result.err
    assert losses(tmp_path / "bf16") != losses(ten_steps)[:3]
    assert losses(tmp_path / "bf16") == pytest.approx(losses(ten_steps)[:3], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan22-vae", "wan22-i2v", "wan22-ti2v"])
def test_the_real_autoencoder_trains_too(name: str, tmp_path: Path) -> None:
    vae, example = Path("examples/tiny/wan22-vae"), Path("examples/tiny") / name
    job = Job(example / "model.json", vae / "data.json", Job().tools, vae / "fsdp2.yaml")
    result = train(job, tmp_path / "run", steps=3)
    assert result.code == 0, result.err
    assert len(losses(tmp_path / "run")) == 3
    out = run_mm(
        "generate",
        "--mm-model",
        example / "inference_model.json",
        "--load",
        tmp_path / "run",
        "--prompt",
        "a street",
        "--save-path",
        tmp_path / "out",
    )
    assert out.code == 0, out.err
    assert list((tmp_path / "out").rglob("*.mp4"))
