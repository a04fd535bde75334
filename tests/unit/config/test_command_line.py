"""The command line of `mm train` is frozen: a script written today runs tomorrow.

`python tests/unit/config/test_command_line.py` writes command_line.txt anew, from the table; look at its diff.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.config import TrainFlags, parse_train_flags
from mm_core.config.flag_help import facts_of, flag_name, kind_of
from mm_core.config.flag_table import GROUPS
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import markers

GOLDEN = Path(__file__).with_name("command_line.txt")

#: Flags of the 19 scripts for Wan2.2 and Qwen3-VL, with a value that they give.
SCRIPTS = """
--nproc_per_node 8; --nnodes 1; --node_rank 0; --master_addr localhost; --master_port 29501
--tensor-model-parallel-size 1; --pipeline-model-parallel-size 1; --virtual-pipeline-model-parallel-size 1
--context-parallel-size 1; --context-parallel-algo ulysses_cp_algo; --context-parallel-algo megatron_cp_algo
--context-parallel-algo hybrid_cp_algo; --micro-batch-size 1; --global-batch-size 16; --num-workers 8
--lr 1e-5; --min-lr 0.0; --adam-beta1 .9; --adam-beta2 .999; --adam-eps 1e-8; --lr-decay-style constant; --lr-decay-style cosine
--weight-decay 1e-2; --weight-decay 0; --lr-warmup-init 0; --lr-warmup-iters 0; --lr-warmup-fraction .1; --clip-grad 1.0
--clip-grad 0.0; --train-iters 5000; --optimizer-selection fused_torch_adamw
--load weights; --save run; --ckpt-format torch_dcp; --no-load-optim; --no-load-rng; --no-save-optim; --no-save-rng
--finetune --load weights; --save-interval 10000 --save run
--use-torch-fsdp2; --fsdp2-config-path fsdp2.yaml; --downcast-to-bf16; --bf16; --untie-embeddings-and-output-weights
--use-cpu-initialization; --no-gradient-accumulation-fusion; --use-fused-rmsnorm; --attention-mask-type general
--distributed-timeout-minutes 20; --distributed-backend nccl; --log-interval 1; --eval-interval 10000; --eval-iters 10
--tokenizer-type NullTokenizer; --vocab-size 152064; --make-vocab-size-divisible-by 1; --seq-length 1024
--init-model-with-meta-device; --log-tps; --normalization RMSNorm; --swiglu; --use-fused-swiglu; --use-flash-attn
--no-masked-softmax-fusion; --seed 42; --mm-model m; --mm-data d; --mm-tool t
--num-layers 1; --hidden-size 3072; --num-attention-heads 48; --max-position-embeddings 24; --ffn-hidden-size 1
--position-embedding-type rope; --rotary-base 500000; --attention-dropout 0.0; --hidden-dropout 0.0; --tokenizer-model t
--exit-on-missing-checkpoint; --lora-r 32; --lora-alpha 32; --lora-target-modules proj_q,proj_k,ffn.0,ffn.2
--lora-register-forward-hook patch_embedding
"""
#: MindSpeed-MM's own parser.
PARSER = """
--lora-dropout 0; --lora-apply-modules all; --lora-mixed-training True; --load-base-model m; --use-deter-comp; --jit-compile
--allow-tf32; --allow-internal-format; --recompute-skip-core-attention; --hetero-encoder-mbs-scale 1
--calculate-per-sample-loss; --calculate-square-loss; --calculate-token-loss; --calculate-per-token-loss
--optimizer adam; --optimizer sgd; --optimizer muon; --padded-vocab-size 1; --enable-dummy-optimizer
--dpo-beta .1; --dpo-label-smoothing 0; --pref-ftx 0; --use-data-balance
--data_balance_sorting_algo post_global_balancing_greedy_without_pad; --use-image-mbs-data-balance
--mbs_data_balance_sorting_algo post_mbs_balancing_greedy_without_pad
--use-txt-dynamic-batching; --max-seq-len 2048; --dynamic-batch-buffer-size 200; --weight-decay-exclude-modules bias norm
--lr-scale-modules a b; --lr-mult 1.0; --matched-adamw-rms .2; --muon-momentum .95; --ns-steps 5; --encoder-dp-balance
--simulated-nnodes 1; --simulated-nproc-per-node 8; --dpo-loss-type sigmoid; --lora-target-parameters a
"""
WORDS = [
    words.strip() for line in f"{SCRIPTS}{PARSER}".splitlines() for words in line.split(";") if words.strip()
]


def command_line() -> str:
    """Every flag with its type, default, range and kind, by group."""
    lines = []
    for group in GROUPS:
        lines.append(f"# {(group.__doc__ or '').strip()}")
        for name, field in group.model_fields.items():
            facts = facts_of(name, field)
            value = repr(field.default) if field.default is not None else "–"
            value = "required" if "required" in facts.text else value
            lines.append(f"{facts.flag} | {facts.type} | {value} | {facts.range or '–'} | {facts.kind}")
    return "\n".join(lines) + "\n"


def test_the_command_line_is_what_it_was() -> None:
    assert command_line() == GOLDEN.read_text(encoding="utf-8"), __doc__


@pytest.mark.parametrize("words", WORDS)
def test_each_flag_of_a_mindspeed_mm_script_is_read(words: str) -> None:
    flags = parse_train_flags(words.split())
    assert flag_name(next(iter(flags.given))) == words.split()[0].replace("_", "-")
    assert {finding.level for finding in flags.findings} <= {"note", "warning"}


@pytest.mark.parametrize(
    "words",
    ["--stage ray_grpo", "--hetero-parallel", "--auto-parallel-mm", "--profile-stage 1", "--trust-remote-code",
     "--profile-subgraph-seg"],
)  # fmt: skip
def test_what_is_refused_is_known(words: str) -> None:
    with pytest.raises(Exception, match=r"not available|never run") as caught:
        parse_train_flags(words.split())
    assert "there is no such flag" not in str(caught.value)


def test_every_flag_belongs_to_one_group_and_to_one_kind() -> None:
    names = [name for group in GROUPS for name in group.model_fields]
    assert len(names) == len(set(names))
    assert set(names) == set(TrainFlags.model_fields)
    for name, field in TrainFlags.model_fields.items():
        marks = [mark for kind in (NoEffect, NotYet, Only) for mark in markers(field, kind)]
        kinds = {type(mark) for mark in marks if getattr(mark, "when", None) is None}
        assert len(kinds) <= 1, name
        facts = facts_of(name, field)
        assert facts.text, f"{facts.flag} has no help"
        assert not facts.text.endswith("."), facts.flag
        if facts.kind == "effective" and kind_of(field) in (int, float):
            assert facts.range, f"{facts.flag} has no range"


if __name__ == "__main__":
    GOLDEN.write_text(command_line(), encoding="utf-8")
