"""Hostile scripts and files: nothing is run, nothing hangs or grows, and each ends in one sentence or a correct result."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import pytest

from mm_core.config import ConfigError
from mm_core.config.migrate import migrate
from mm_core.config.migrate.flag_words import read_flags
from mm_core.config.migrate.shell_script import MAX_BYTES, read_script
from mm_core.config.migrate.shell_values import text_of, unknown_of

SCRIPTS = Path(__file__).parent / "scripts"
LAUNCH = "python pretrain_sora.py --lr 1 "


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentence(content: bytes) -> str:
    Path("run.sh").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_script("run.sh")
    text = str(caught.value)
    assert text.startswith("run.sh")
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    "command",
    [
        "$(touch ran)", "`touch ran`", "$((1 + $(touch ran)))", "${X:-$(touch ran)}", "<(touch ran)", "$[ `touch ran` ]",
        "${X:=`touch ran`}", '"$(touch ran)"', "a[$(touch ran)]", "$(( a[$(touch ran)] ))", "${a[$(touch ran)]}",
    ],
)  # fmt: skip
def test_nothing_is_run(folder: Path, command: str) -> None:
    Path("run.sh").write_text(
        f"touch ran\nA={command}\neval touch ran\n. ./run.sh\n{LAUNCH} --save $A {command}\n"
    )
    read = read_script("run.sh")
    assert unknown_of(read.launch.words[3]) is not None
    assert os.listdir(folder) == ["run.sh"]


def test_a_variable_of_itself_grows_no_further() -> None:
    Path("run.sh").write_text("A=xx\n" + "A=$A$A\n" * 20_000 + LAUNCH + "--save $A\n")
    value = read_script("run.sh").launch.words[-1]
    assert "grows beyond" in str(unknown_of(value))


def test_empty_values_and_arrays_do_not_grow_either() -> None:
    Path("run.sh").write_text("A=''\n" + "A=$A$A\n" * 1000 + LAUNCH + '"x$A"\n')
    assert text_of(read_script("run.sh").launch.words[-1]) == "x"
    text = sentence(b"A=('' '')\n" + b'A=("${A[@]}" "${A[@]}")\n' * 60 + LAUNCH.encode())
    assert "becomes more than" in text


def test_many_large_values_are_refused() -> None:
    lines = [b"A=" + b"x" * 60_000, *(f"B{i}=$A".encode() for i in range(1000)), LAUNCH.encode()]
    assert "this is no launch script" in sentence(b"\n".join(lines))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"A=\"x\n\npython pretrain_sora.py\n", 'run.sh:1: the quote " is never closed. Add " where the text ends'),
        (b"\nA='x\npython pretrain_sora.py\n", "run.sh:2: the quote ' is never closed"),
        (b"A=`x\n", "the backquote ` is never closed"),
        (b"A=$(x\n", "the command $( is never closed by )"),
        (b"A=$((x)\n", "the arithmetic $(( is never closed by ))"),
        (b"A=$[x\n", "the arithmetic $[ is never closed by ]"),
        (b"A=${x\n", "the brace ${ is never closed by }"),
        (b"A=${x:-a\n", "the brace ${ is never closed by }"),
        (b"((i++\n", "the arithmetic command (( is never closed by ))"),
        (b"[[ a < b\n", "the test [[ is never closed by ]]"),
        (b"A=(a b\n", "the array that ( opens is never closed by )"),
        (b"A=(a;b)\n", "unexpected ; in an array ( "),
        (b"cat <<EOF\nx\n", "the here-document that ends with EOF has no end"),
        (b"A=" + b"${A:-" * 500 + b"}" * 500, "expansions are nested more than 20 deep"),
        (b"A=" + b'"${A:-' * 500, "expansions are nested more than 20 deep"),
        (b"", "the file is empty"),
        (b"\x7fELF\0\0", "run.sh:1: this is no text: it holds a NUL byte"),
        (b"a\nb\0", "run.sh:2: this is no text"),
        (b"# \xff\xfe", "run.sh:1: the file is not UTF-8 text (byte 0xff). Save it as UTF-8"),
        (b"x" * (MAX_BYTES + 1), "a launch script has fewer"),
        (b"\n" * MAX_BYTES, "the file is empty"),
        (b"( " * 50_000, "it starts no training"),
        (b"if " * 50_000, "it starts no training"),
        (b"\\\n" * 200_000, "it starts no training"),
        (b"$" * 50_000, "it starts no training"),
        (b"'' " * 60_000, "a command of more than 50000 words"),
        (b"A='" + b"x " * 10_000 + b"'\npython" + b" $A" * 10_000, "a command of more than 50000 words"),
        (b"<<a " * 20_000 + b"\n", "has no end"),
        (b";;" * 100_000 + b"}" * 1000 + b"\nfi\ndone\nesac\n)\n", "it starts no training"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_ends_in_one_sentence(content: bytes, wanted: str) -> None:
    assert wanted in sentence(content)


def test_a_line_of_a_megabyte_is_read() -> None:
    Path("run.sh").write_text("# " + "x" * 2**19 + "\nA='" + "y" * 500_000 + "'\n" + LAUNCH + "\n")
    assert len(read_script("run.sh").launch.words) == 2
    Path("run.sh").write_text(LAUNCH + " ".join(f"--flag-{i} {i}" for i in range(20_000)) + "\n")
    assert len(read_script("run.sh").launch.words) == 2 + 40_000


def test_windows_line_ends_and_a_byte_order_mark() -> None:
    Path("run.sh").write_bytes(b"\xef\xbb\xbfA=1\r\npython pretrain_sora.py --seed $A \\\r\n  --lr 1\r\n")
    read = read_script("run.sh")
    assert [text_of(value) for value in read.launch.words] == ["--seed", "1", "--lr", "1"]
    assert [finding.code for finding in read.findings] == ["windows-lines"]


def test_folders_pipes_and_missing_files(folder: Path) -> None:
    os.mkfifo("pipe.sh")
    for name, wanted in (
        (".", "no regular file"),
        ("pipe.sh", "no regular file"),
        ("nope.sh", "no such file. Did you mean pipe.sh?"),
    ):
        with pytest.raises(ConfigError, match="") as caught:
            read_script(name)
        assert wanted in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_no_mutation_of_a_script_crashes(seed: int) -> None:
    """A script with characters lost, doubled, swapped or inserted is read, or refused in one sentence."""
    source = (
        SCRIPTS / ("pretrain_t2v.sh", "arrays.sh", "finetune_yaml.sh", "finetune_lora.sh")[seed % 4]
    ).read_text()
    draw = random.Random(seed)
    read = 0
    sentences: list[str] = []
    for _ in range(40):
        text = source
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            piece = draw.choice(
                [
                    "",
                    "",
                    text[at : at + 9] * 2,
                    *"'\"`$(){}[]\\\n;&|<>#=",
                    "$((",
                    "${",
                    "<<E",
                    "if ",
                    " done\n",
                ]
            )
            text = text[:at] + piece + text[at + draw.randint(0, 3) :]
        Path("run.sh").write_text(text)
        try:
            script = read_script("run.sh")
        except ConfigError as error:
            sentences.append(str(error))
            continue
        read += 1
        for finding in read_flags(script.launch.words, "run.sh", script.launch.line).findings:
            assert finding.line is not None
            assert 0 < finding.line <= text.count("\n") + 1
    assert read > 5
    assert not any("\n" in sentence for sentence in sentences)


def test_variables_that_double_at_each_step_are_not_computed() -> None:
    lines = [f"A{step}=A{step + 1}+A{step + 1}\n" for step in range(40)]
    Path("run.sh").write_text("".join(lines) + "A40=1\n" + LAUNCH + "--seed $((A0))\n")
    reason = str(unknown_of(read_script("run.sh").launch.words[-1]))
    assert "its variables refer to each other more than 1000 times" in reason


def test_nothing_stays_behind_if_writing_fails(folder: Path) -> None:
    Path("run.sh").write_text(LAUNCH + "--train-iters 3\n")
    made = migrate(["run.sh"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(ConfigError, match="it cannot be written: File too large"):
            made.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(folder) == ["run.sh"]
