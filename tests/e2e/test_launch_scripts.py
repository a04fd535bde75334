"""Launch scripts written for MindSpeed-MM run when one word is replaced: the program."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from mm_core.config import read_document
from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, Result, metrics

EXAMPLE = ROOT / "examples/launch/pretrain_wan22_tiny.sh"

#: As a user has it: variables, arithmetic, continued lines, a log cut up by awk.
PRETRAIN = r"""
export CUDA_DEVICE_MAX_CONNECTIONS=2
export HCCL_CONNECT_TIMEOUT=1200
export NON_MEGATRON=true
NPUS_PER_NODE=2
MASTER_ADDR=localhost
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))

TP=1
PP=1
CP=1
MBS=1
GRAD_ACC_STEP=2
GBS=$(($MBS*$GRAD_ACC_STEP*$WORLD_SIZE/$CP))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} \
    --context-parallel-algo ulysses_cp_algo \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --num-workers 1 \
    --lr 1e-3 \
    --min-lr 1e-3 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --adam-eps 1e-8 \
    --lr-decay-style constant \
    --weight-decay 1e-2 \
    --lr-warmup-init 0 \
    --lr-warmup-iters 0 \
    --clip-grad 1.0 \
    --train-iters 5 \
    --no-gradient-accumulation-fusion \
    --load $LOAD_PATH \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --use-torch-fsdp2 \
    --fsdp2-config-path ./examples/tiny/wan22-t2v/fsdp2.yaml \
    --downcast-to-bf16 \
    --untie-embeddings-and-output-weights \
    --optimizer-selection fused_torch_adamw \
    --use-cpu-initialization \
    --distributed-timeout-minutes 20 \
"

MM_ARGS="
    --mm-data ./examples/tiny/wan22-t2v/data.json \
    --mm-model ./examples/tiny/wan22-t2v/model.json \
    --mm-tool ./examples/tiny/wan22-t2v/tools.json
"

OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --eval-iters 10 \
    --save $SAVE_PATH \
    --ckpt-format torch_dcp \
"

mkdir -p logs
torchrun $DISTRIBUTED_ARGS pretrain_sora.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    | tee logs/train.log 2>&1

STEP_TIME=`grep "elapsed time per iteration" logs/train.log | awk -F ':' '{print $5}' | awk -F '|' '{print $1}' \
    | tail -n 100 | awk '{sum+=$1} END {printf("%.1f", sum/NR)}'`
echo "step time: $STEP_TIME"
"""

INFERENCE = r"""
NPUS_PER_NODE=${NPUS_PER_NODE:-1}
GPT_ARGS="
    --num-layers 1 \
    --hidden-size 3072 \
    --num-attention-heads 48 \
    --seq-length 24 \
    --max-position-embeddings 24 \
    --tensor-model-parallel-size 1 \
    --micro-batch-size 1 \
    --global-batch-size 1 \
    --tokenizer-type NullTokenizer \
    --vocab-size 0 \
    --swiglu \
    --finetune \
    --bf16 \
    --load $LOAD_PATH \
    --distributed-timeout-minutes 20
"
torchrun --nproc_per_node $NPUS_PER_NODE --master_port $MASTER_PORT inference_sora.py \
    $GPT_ARGS \
    --mm-model ./examples/tiny/wan22-t2v/inference_model.json \
    --distributed-backend nccl
"""

TRANSFORMERS = r"""
DISTRIBUTED_ARGS="--nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr localhost --master_port $MASTER_PORT"
torchrun $DISTRIBUTED_ARGS \
    pretrain_transformers.py \
    ./job.yaml \
    --distributed-backend nccl
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def bash(script: str | Path, cwd: Path, **variables: str | Path) -> Result:
    """Run a script, given as a file or as its text."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT.get('PATH', '')}"
    words = [str(script)] if isinstance(script, Path) else ["-c", script]
    environment = {**ENVIRONMENT, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        ["bash", *words],
        cwd=cwd, env={**environment, **{name: str(value) for name, value in variables.items()}},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def replaced(script: str, program: str, command: str) -> str:
    """The whole migration of a script."""
    assert script.count(program) == 1
    return script.replace(program, f"-m mm_core {command}")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The example script as it is, three steps."""
    run = tmp_path_factory.mktemp("launch") / "run"
    return run, bash(EXAMPLE, run.parent, SAVE_PATH=run, TRAIN_ITERS="3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory from which the examples' relative paths are right, and which may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_the_example_script_trains_two_ranks(example: tuple[Path, Result]) -> None:
    run, result = example
    assert result.code == 0, result.err
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["consumed_samples"] == 3 * 4, "2 ranks × 1 sample × 2 passes"
    assert (run / "logs" / "rank-00001.log").exists()
    assert "computes on the CPU and uses gloo" in (run / "logs" / "rank-00000.log").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_step_times_can_be_cut_out_of_the_log(example: tuple[Path, Result]) -> None:
    run, result = example
    lines = [line for line in result.out.splitlines() if "elapsed time per iteration" in line]
    assert len(lines) == 3
    times = [float(line.split(":")[4].split("|")[0]) for line in lines]
    measured = [1000 * record["seconds"] for record in metrics(run)]
    assert times == pytest.approx(measured, abs=0.06)
    said = re.search(
        r"Elapsed Time Per iteration: ([\d.]+) ms, Average Samples per Second: ([\d.]+)", result.out
    )
    assert said is not None, result.out
    assert float(said[1]) == pytest.approx(sum(measured) / 3, abs=0.2)


def test_the_example_differs_from_a_classic_script_by_the_program_alone() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("torchrun")]
    assert line == r"torchrun $DISTRIBUTED_ARGS -m mm_core train \ ".rstrip()
    assert "mm_core" not in text.replace("`-m mm_core train`", "").replace(line, "")


@pytest.mark.slow
def test_a_script_for_pretrain_sora(example: tuple[Path, Result], folder: Path) -> None:
    run, _ = example
    script = replaced(PRETRAIN, "pretrain_sora.py", "train")
    result = bash(script, folder, LOAD_PATH=run, SAVE_PATH="saved")
    assert result.code == 0, result.err
    saved = folder / "saved"
    assert [record["step"] for record in metrics(saved)] == [4, 5], "it goes on where --load ended"
    assert re.search(r"^step time: \d+\.\d$", result.out, re.MULTILINE), result.out
    resolved = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    notes = {finding["path"]: finding["level"] for finding in resolved["findings"]}
    assert notes["--downcast-to-bf16"] == "note"
    assert "NON_MEGATRON" not in notes, "variables without effect are mm doctor's"
    assert set(notes.values()) <= {"note"}, "a correct script gets no warning"


@pytest.mark.slow
def test_a_script_for_inference_sora(example: tuple[Path, Result], folder: Path) -> None:
    run, _ = example
    script = replaced(INFERENCE, "inference_sora.py", "generate")
    result = bash(script, folder, LOAD_PATH=run)
    assert result.code == 0, result.err
    videos = sorted((folder / "runs/generated").glob("*.mp4"))
    assert len(videos) == 2
    assert [Path(line).name for line in result.out.split()] == [video.name for video in videos]

    before = {video: video.read_bytes() for video in videos}
    several = bash(script, folder, LOAD_PATH=run, NPUS_PER_NODE="2")
    assert several.code == 0, several.err
    after = set((folder / "runs/generated").glob("*.mp4")) - set(videos)
    assert {video.read_bytes() for video in after} == set(before.values()), (
        "the ranks make the same videos, one each"
    )
    assert {video: video.read_bytes() for video in videos} == before, "nothing is overwritten"


def test_a_script_for_pretrain_transformers(folder: Path) -> None:
    """The program of the Qwen3-VL scripts takes a YAML that holds everything."""
    gpt_args = {
        "use_torch_fsdp2": True, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1.0e-3, "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.1, "train_iters": 2, "num_workers": 0, "clip_grad": 0.0, "seed": 42, "save": "saved",
        "ckpt_format": "torch_dcp", "log_tps": True, "tokenizer_type": "NullTokenizer", "vocab_size": 152064, "swiglu": True,
    }  # fmt: skip
    data, model = (dict(read_document(ROOT / TINY / f"{name}.json").data) for name in ("data", "model"))
    text = (
        "MM_TOOL_PATH: ./examples/tiny/wan22-t2v/tools.json\n"
        "FSDP2_PATH: &FSDP2_PATH ./examples/tiny/wan22-t2v/fsdp2.yaml\n"
        "gpt_args:\n  fsdp2_config_path: *FSDP2_PATH\n"
        + textwrap.indent(yaml.safe_dump(gpt_args), "  ")
        + yaml.safe_dump({"data": data, "model": model})
    )
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    result = bash(replaced(TRANSFORMERS, "pretrain_transformers.py", "train"), folder)
    assert result.code == 0, result.err
    assert [record["step"] for record in metrics(folder / "saved")] == [1, 2]
    assert metrics(folder / "saved")[-1]["consumed_samples"] == 4
