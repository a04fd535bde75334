"""Launch scripts are read as bash would run them, as far as that needs no running."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from mm_core.config import ConfigError
from mm_core.config.migrate.flag_words import FlagWords, read_flags
from mm_core.config.migrate.shell_arithmetic import ArithmeticShellError, evaluate
from mm_core.config.migrate.shell_script import Script, read_script
from mm_core.config.migrate.shell_values import text_of

Reader: TypeAlias = Callable[..., Script]
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Read a script of these lines, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def read(*lines: str, **given: str) -> Script:
        Path("run.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_script("run.sh", given)

    return read


def words(script: Script) -> list[str]:
    return [text_of(value) for value in script.launch.words]


def flags(script: Script) -> FlagWords:
    return read_flags(script.launch.words, script.path, script.launch.line)


def mistake(script: Reader, *lines: str) -> str:
    """Return the one sentence that a script with a mistake gives."""
    try:
        found = [finding for finding in flags(script(*lines)).findings if finding.level == "error"]
    except ConfigError as error:
        found = list(error.findings)
    assert found
    text = str(ConfigError(found))
    assert "\n" not in text
    return text


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@pytest.mark.parametrize(
    "lines",
    [
        ["A=1", "B=$A", "python pretrain_sora.py --x $B ${A}2 '$A' \"$A b\" \\$A"],
        ['A="', "  --lr 1e-5 \\", "  --save x", '"', "python pretrain_sora.py $A"],
        ["A=7; B=2", "python pretrain_sora.py $((A/B)) $((-A/B)) $((-A%B)) $[ (A+B)*2 - -1 ] $((010 + 0x10)) $(($A*${B}))"],
        ["A=(--lr 1 'a b' \"\")", "A+=(--z)", 'python pretrain_sora.py "${A[@]}" ${A[2]} "${A[3]}" x'],
        ["A=a", "A+=b", "python pretrain_sora.py $A${NO:-c}${NO-d}${A:-e} \"${NO:-f g}\" ${NO:-h i}"],
        ["B=${C:=late}", "python pretrain_sora.py $B $C pre\"mid dle\"'po st'\\ end"],
        ["python pretrain_sora.py --a \\", "  --b \\", "  --c # a comment", "echo python pretrain_sora.py"],
        ["A='x y'", "python pretrain_sora.py \"--a=$A\" --b=$A # '", "# it's"],
        ["A=1 B=2", "export C=$A$B D='e f'", "unset B", "python pretrain_sora.py $C $D ${B:-gone}"],
        ["f() { echo \"${1}\"; }", "true && A=1", "python pretrain_sora.py a#b '#' \"\\\"q\\\"\" $A >/dev/null 2>&1"],
        ["cat <<EOF", "python pretrain_sora.py \"unclosed $(", "EOF", "python pretrain_sora.py $'x' {a} [b] c=d"],
        ["A='--x 1", "--y 2'", "python pretrain_sora.py $A \"$A\""],
        ["EMPTY=''", "python pretrain_sora.py $EMPTY \"$EMPTY\" a$EMPTY"],
    ],
)  # fmt: skip
def test_the_words_of_the_launch_are_those_of_bash(script: Reader, lines: list[str]) -> None:
    ours = words(script(*lines))
    stub = 'python() { for word in "${@:2}"; do printf \'%s\\0\' "$word" >&3; done; }\n'
    done = subprocess.run(
        ["bash", "-c", "exec 3>&1 >/dev/null\n" + stub + "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == ours


def test_a_flag_knows_its_line_and_that_of_its_value(script: Reader) -> None:
    read = script(
        "MBS=2",
        "",
        'ARGS="',
        "   --lr 1e-4 \\",
        "   --micro-batch-size $MBS",
        '"',
        "torchrun pretrain_sora.py $ARGS",
    )
    found = flags(read).flags
    assert (found["lr"].origin.line, found["lr"].value, found["lr"].value_line) == (4, 1e-4, None)
    size = found["micro_batch_size"]
    assert (size.origin.line, size.value, size.value_line) == (5, 2, 1)


def test_classic_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    read = read_script("pretrain_t2v.sh")
    found = flags(read)
    assert not [finding for finding in found.findings if finding.level == "error"]
    assert found.flags["global_batch_size"].value == 16
    assert found.flags["mm_model"].value == "./examples/wan2.2/5B/t2v/pretrain_model.json"
    assert found.flags["ckpt_format"].value == "torch_dcp"
    assert (
        found.flags["distributed_backend"].value == "nccl"
    )  # behind a line that is joined, before `2>&1 | tee`
    assert len(found.flags) == 42
    assert [text_of(value) for value in read.launch.launcher[:3]] == ["torchrun", "--nproc_per_node", "8"]
    assert {export.name: text_of(export.value) for export in read.exports}[
        "CUDA_DEVICE_MAX_CONNECTIONS"
    ] == "2"
    assert flags(read_script("pretrain_t2v.sh", {"NPUS": "4"})).flags["global_batch_size"].value == 8


def test_arrays_functions_and_here_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    read = read_script("arrays.sh")
    found = flags(read)
    assert not found.findings
    assert found.flags["save"].value == "folder with spaces/runs"
    assert found.flags["seed"].value == 7
    assert found.flags["clip_grad"].value == 0.5
    assert "not_this" not in found.flags
    assert [(export.name, text_of(export.value)) for export in read.exports] == [("OMP_NUM_THREADS", "1")]


def test_lists_keep_their_commas_until_the_flag_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    found = flags(read_script("finetune_lora.sh"))
    assert found.flags["lora_target_modules"].value == [
        "proj_q",
        "proj_k",
        "proj_v",
        "proj_out",
        "ffn.0",
        "ffn.2",
    ]
    assert found.flags["lora_r"].value == 32


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["torchrun pretrain_sora.py --save runs/$(date +%s)"], "run.sh:1: --save is runs/$(date +%s), which cannot be known: "
         "$(date +%s) would have to be run, and commands are not run. Write the value out"),
        (["A=`rm -rf x`", "python pretrain_sora.py --load $A"], "`rm -rf x` would have to be run"),
        (["python pretrain_sora.py --load $LOAD_PATH"],
         "nothing in the script sets LOAD_PATH. Give it: mm migrate run.sh LOAD_PATH=…"),
        (["source env.sh", "python pretrain_sora.py --load $X"], "perhaps env.sh, which line 1 reads, does"),
        (["python pretrain_sora.py --load $1"],
         "$1 is an argument of the script, which is not known here. Give it: mm migrate run.sh 1=…"),
        (["if true; then", "A=1", "fi", "python pretrain_sora.py --seed $A"], "A is set in the `if` of line 1 (line 2)"),
        (["for A in 1 2", "do", "python pretrain_sora.py --seed $A", "done"], "A takes several values, in the loop of line 1"),
        (["[ -d x ] && A=1", "python pretrain_sora.py --seed $A"], "A is set only if another command succeeds or fails (line 1)"),
        (["f() {", "A=1", "}", "python pretrain_sora.py --seed $A"], "A is set in the function of line 1 (line 2)"),
        (["A=$((1/0))", "python pretrain_sora.py --seed $A"], "$((1/0)) cannot be computed: it divides by zero"),
        (["A=$((2**3))", "python pretrain_sora.py --seed $A"], "** is not read: only + - * / % ( ) are"),
        (["A=x.sh", "python pretrain_sora.py --save ${A%.sh}"], "this form of expansion is not read: ${A%.sh}"),
        (["read A", "python pretrain_sora.py --$A 1"], "the flag --$A cannot be known: `read` of line 1 sets A"),
        (["python pretrain_sora.py --lr 1 \\ ", " --seed 2"], "a backslash that is to join lines must be the last character"),
        (['A="--lr 1', "# --seed 2", '"', "python pretrain_sora.py $A"], "Inside quotes a # begins no comment"),
        (["python pretrain_sora.py --lr", "echo"], "--lr has no value"),
        (["E=''", 'python pretrain_sora.py --load "$E"'], "the value of --load is empty"),
        (["python train.py --lr 1"], "it starts train.py, which is no training that is known here: only pretrain_sora.py or"),
        (["python inference_sora.py --lr 1"], "`mm generate` takes its flags as they are"),
        (["echo pretrain_sora.py"], "it starts no training: no command runs pretrain_sora.py or pretrain_transformers.py"),
        (["python pretrain_sora.py", "python pretrain_sora.py"], "training starts more than once, in lines 1 and 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_an_error_where_it_reaches_the_job(
    script: Reader, lines: list[str], wanted: str
) -> None:
    assert wanted in mistake(script, *lines)


def test_what_cannot_be_known_is_no_matter_elsewhere(script: Reader) -> None:
    read = script(
        "log=$(date)", "if [ $1 ]; then X=1; fi", "mkdir -p logs/$log $2", "set -e", "NPU=$(nproc)",
        "torchrun --nproc_per_node $NPU --node_rank $1 pretrain_sora.py --lr 1e-3 $MORE 2>&1 | tee logs/$log.$X",
    )  # fmt: skip
    found = flags(read)
    assert {name: flag.value for name, flag in found.flags.items()} == {"lr": 1e-3}
    assert [(finding.level, finding.code, finding.line) for finding in found.findings] == [
        ("warning", "unset-variable", 6)
    ]


def test_given_values_win(script: Reader) -> None:
    lines = [
        "A=$1",
        "B=$(date)",
        "if x; then C=1; fi",
        "python pretrain_sora.py --save $A --load $B --seed $C",
    ]
    found = flags(script(*lines, **{"1": "one", "B": "two", "C": "3"})).flags
    assert [flag.value for flag in found.values()] == ["one", "two", 3]


def test_a_launch_in_a_block_is_said(script: Reader) -> None:
    read = script("main() {", "  torchrun pretrain_sora.py --lr 1", "}", "main")
    assert [(f.level, f.line, f.message) for f in read.findings] == [
        ("note", 2, "training starts in the function of line 1: it is taken as if that ran once")
    ]


def test_cd_is_followed_if_its_folder_is_known(script: Reader) -> None:
    assert script("D=x", "cd $D/y", "python pretrain_sora.py").launch.folder == "x/y"
    read = script('cd "$(dirname $0)"', "python pretrain_sora.py")
    assert read.launch.folder == ""
    assert [(f.level, f.line) for f in read.findings] == [("warning", 1)]


@pytest.mark.parametrize("text", ["1+", "(1", "1 2", "a b", "1//2", "2**2", "1?2:3", "x=1", "08", "9"*30, "("*60 + ")"*60,
                                  "9223372036854775807+1", "self", "1"*3000])  # fmt: skip
def test_arithmetic_that_is_not_read_is_refused(text: str) -> None:
    with pytest.raises(ArithmeticShellError):
        evaluate(text, {"self": "self + 1"}.__getitem__ if "self" in text else lambda name: "b c")
