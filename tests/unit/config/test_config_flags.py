"""The command line of a training job."""

from __future__ import annotations

import pytest

from mm_core.config import (
    ConfigError,
    TrainFlags,
    load_training_job,
    parse_train_flags,
    train_help,
    world_size,
)
from mm_core.config.flags import flag_name, required_flags


def fails(line: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_train_flags(line.split())
    return [str(finding) for finding in caught.value.findings if finding.level == "error"]


def test_spellings_types_and_defaults() -> None:
    flags = parse_train_flags(
        ["--micro_batch_size", "2", "--lr=1e-4", "--clip-grad", "0", "--bf16", "--min_lr=0", "--seed", "7"]
    )
    assert (flags.micro_batch_size, flags.lr, flags.clip_grad, flags.bf16, flags.seed) == (
        2,
        1e-4,
        0.0,
        True,
        7,
    )
    assert flags.given["micro_batch_size"] == "--micro_batch_size"
    assert (flags.adam_beta1, flags.adam_beta2, flags.adam_eps, flags.weight_decay) == (
        0.9,
        0.999,
        1e-8,
        0.01,
    )
    assert (flags.lr_decay_style, flags.optimizer_selection, flags.log_interval) == (
        "linear",
        "fused_torch_adamw",
        1,
    )
    assert str(flags.origin("lr")) == "--lr"
    assert str(flags.origin("weight_decay")) == "default"


def test_a_classic_script_is_accepted_with_notes() -> None:
    line = (
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 "
        "--context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 16 "
        "--num-workers 8 --lr 1e-5 "
        "--min-lr 1e-5 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 --lr-decay-style constant "
        "--weight-decay 1e-2 "
        "--lr-warmup-init 0 --lr-warmup-iters 0 --clip-grad 1.0 --train-iters 5000 "
        "--no-gradient-accumulation-fusion "
        "--no-load-optim --no-load-rng --no-save-optim --no-save-rng --use-torch-fsdp2 "
        "--fsdp2-config-path f.yaml "
        "--untie-embeddings-and-output-weights --optimizer-selection fused_torch_adamw "
        "--use-cpu-initialization "
        "--ckpt-format torch_dcp --downcast-to-bf16 --attention-mask-type general "
        "--distributed-timeout-minutes 20 "
        "--distributed-backend nccl --log-interval 1 --save-interval 10000 --eval-interval 10000 "
        "--eval-iters 10 "
        "--save run --load weights --mm-data d --mm-model m --mm-tool t --seed 42"
    )
    flags = parse_train_flags(line.split())
    assert {finding.level for finding in flags.findings} == {"note"}
    assert "--downcast-to-bf16 note: has no effect here: loaded weights stay fp32 as master weights" in [
        str(finding) for finding in flags.findings
    ]


def test_a_flag_with_effect_gets_no_note() -> None:
    flags = parse_train_flags(["--use-deter-comp"])
    assert flags.use_deter_comp
    assert flags.findings == ()


GOLDEN = [
    ("--micro-batchsize 2", "--micro-batchsize error: there is no such flag. Did you mean "
    "--micro-batch-size?"),
    ("--lr abc", '--lr error: "abc", expected a number'),
    ("--lr nan", "--lr error: NaN: must be a finite number"),
    ("--train-iters 5.5", '--train-iters error: "5.5", expected a whole number'),
    ("--train-iters 0", "--train-iters error: 0: must be at least 1"),
    ("--min-lr -1", "--min-lr error: -1.0: must be at least 0.0"),
    ("--seed", "--seed error: a value is missing. Write --seed N"),
    ("--lr=", "--lr error: it needs a value, and the one given is empty. Write --lr X"),
    ("--save=", "--save error: it needs a value, and the one given is empty. Write --save TEXT"),
    ("--bf16=", "--bf16 error: it needs a value, and the one given is empty. Write --bf16 or --bf16=false"),
    ("--num-workers 1025", "--num-workers error: 1025: must be at most 1024"),
    ("--nproc-per-node 1025", "--nproc-per-node error: 1025: must be at most 1024"),
    ("--micro-batch-size 1048577", "--micro-batch-size error: 1048577: must be at most 1048576"),
    ("--train-iters 1099511627777", "--train-iters error: 1099511627777: must be at most 1099511627776"),
    ("--lr-decay-style cosin", '--lr-decay-style error: "cosin", expected "constant", "linear", "cosine", '
     '"inverse-square-root" or "WSD". Did you mean "cosine"?'),
    ("--bf16 true", 'command line error: unexpected argument "true". --bf16 takes no value'),
    ("model", 'command line error: unexpected argument "model". Values follow a flag: '
    '--flag value'),
    ("--fp16", "--fp16 error: fp16 needs loss scaling, which is not available; use bf16"),
    ("--stage ray_grpo", '--stage error: "ray_grpo": reinforcement learning is not available'),
    ("--save-interval 5", "--save-interval error: needs --save: there is no folder to save into. Add "
    "--save FOLDER"),
    ("--finetune", "--finetune error: needs --load: there are no weights to start from"),
    ("--lr 1e-5 --min-lr 1e-3", "--min-lr error: 0.001 is above --lr 1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), GOLDEN, ids=[line for line, _ in GOLDEN])
def test_golden_messages(line: str, message: str) -> None:
    assert fails(line) == [message]


NOT_YET = [
    ("--optimizer muon", '"muon"', "AdamW is the only optimizer so far"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "value", "reason"), NOT_YET, ids=[line for line, *_ in NOT_YET])
def test_what_is_right_and_not_available_yet_is_a_warning_that_stops_a_job(
    line: str, value: str, reason: str
) -> None:
    (finding,) = parse_train_flags(line.split()).findings
    flag = line.split()[0]
    assert (finding.level, finding.code, finding.path) == ("warning", "not-available", flag)
    assert finding.message.startswith(f"{value}: ")
    assert reason in finding.message
    with pytest.raises(ConfigError, match=reason):
        load_training_job(parse_train_flags(line.split()))


def test_the_flags_of_lora_scripts_are_taken() -> None:
    line = "--lora-r 32 --lora-alpha 32 --lora-target-modules proj_q,ffn.0 --lora-register-forward-hook patch_embedding"
    flags = parse_train_flags(line.split())
    assert (flags.lora_r, flags.lora_alpha, flags.lora_target_modules) == (32, 32.0, ["proj_q", "ffn.0"])
    assert [(finding.level, finding.path) for finding in flags.findings] == [
        ("note", "--lora-register-forward-hook")
    ]


def test_all_mistakes_come_at_once() -> None:
    found = fails("--lr x --train-iter 3 --micro-batch-size 0 --stage ray_grpo")
    named = {line.split()[0] for line in found}
    assert named == {"--train-iter", "--stage", "--micro-batch-size", "--lr"}


def test_a_flag_given_twice_is_said() -> None:
    flags = parse_train_flags(["--lr", "1", "--lr", "2"])
    assert flags.lr == 2
    assert [str(finding) for finding in flags.findings] == [
        "--lr note: given more than once; the last one counts"
    ]


def test_batch_arithmetic() -> None:
    flags = parse_train_flags(["--micro-batch-size", "2", "--global-batch-size", "12"])
    assert flags.accumulation_steps(3) == 2
    with pytest.raises(
        ConfigError, match=r"12 is no multiple of --micro-batch-size 2 × 4 ranks = 8. Use 8 or 16"
    ):
        flags.accumulation_steps(4)
    assert TrainFlags(micro_batch_size=3).with_global_batch(2).global_batch_size == 6
    assert TrainFlags(micro_batch_size=3).accumulation_steps(2) == 1


def test_warmup_and_ranks() -> None:
    flags = parse_train_flags(
        [
            "--lr-warmup-fraction",
            "0.1",
            "--train-iters",
            "200",
            "--nproc-per-node",
            "4",
            "--nnodes",
            "2",
            "--master-addr",
            "h",
        ]
    )
    assert flags.warmup_steps == 20
    assert world_size(flags, {}) == 8
    assert world_size(flags, {"RANK": "1", "WORLD_SIZE": "3"}) == 3
    assert world_size(flags, {"WORLD_SIZE": "3"}) == 8, "left over from another launcher"


def test_required_flags_are_named() -> None:
    assert [str(finding) for finding in required_flags(TrainFlags())] == [
        "--train-iters error: it is required: how many optimizer steps to train. Add --train-iters N",
        "--lr error: it is required: the learning rate. Add --lr X",
    ]


def test_the_help_page_has_every_flag() -> None:
    page = train_help()
    assert [name for name in TrainFlags.model_fields if flag_name(name) not in page] == []
    assert max(map(len, page.split("\n"))) <= 110


@pytest.mark.parametrize("ranks", ["²", "9" * 5000, "-2", ""])
def test_a_world_size_that_is_no_number_leaves_it_to_the_flags(ranks: str) -> None:
    flags = parse_train_flags(["--nproc-per-node", "3"])
    assert world_size(flags, {"RANK": "0", "WORLD_SIZE": ranks}) == 3
