"""The command `mm`: subcommands, exit codes, and where output goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mm_core
from mm_core.cli.main import COMMANDS, main
from mm_registry.errors import UnknownIdError, UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a command that does what its first argument says."""
    (tmp_path / "probe_command.py").write_text(
        "from mm_registry.errors import UserError\n"
        "def run(argv):\n"
        "    if argv[:1] == ['user']: raise UserError('model.json:3:5: no')\n"
        "    if argv[:1] == ['fail']: raise RuntimeError('it broke')\n"
        "    if argv[:1] == ['stop']: raise KeyboardInterrupt\n"
        "    if argv[:1] == ['pipe']: raise BrokenPipeError(32, 'a worker went away')\n"
        "    print(argv)\n"
        "    return 143\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "probe", ("probe_command", "does as it is told"))
    monkeypatch.delenv("RANK", raising=False)
    return "probe"


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"mm (mmzoo-core) {mm_core.__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("trian", "`mm train`"), ("generte", "`mm generate`"), ("zzz", "list, show, check, explain")],
)
def test_an_unknown_command(wrong: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert wrong in captured.err
    assert hint in captured.err


def test_a_commands_own_exit_code_and_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "a", "--b"]) == 143
    assert capsys.readouterr().out == "['a', '--b']\n"


def test_a_users_mistake_is_one_message(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, "user"]) == 2
    assert capsys.readouterr().err == "error: model.json:3:5: no\n"
    monkeypatch.setenv("RANK", "3")
    assert main([command, "user"]) == 2
    assert capsys.readouterr().err == "error (rank 3): model.json:3:5: no\n"


def test_every_user_error_has_exit_code_2() -> None:
    assert UserError.exit_code == UnknownIdError.exit_code == 2


def test_a_failure_is_printed_whole(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "fail"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "probe_command.py" in err
    assert "RuntimeError: it broke" in err


def test_ctrl_c(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "stop"]) == 130
    assert capsys.readouterr().err == "mm: interrupted\n"


def test_another_pipe_that_breaks_is_a_failure(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "pipe"]) == 1
    assert "a worker went away" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--group", "all", "--format", "json"]])
def test_a_reader_that_goes_away_is_no_failure(arguments: list[str], unbuffered: str) -> None:
    import os

    with subprocess.Popen(
        [sys.executable, "-m", "mm_core", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_every_command_is_there_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: mm {name}")


HEAVY = ("torch", "numpy", "transformers", "diffusers", "matplotlib", "av")
TINY = "examples/tiny/wan22-t2v"
FILES = ["--mm-model", f"{TINY}/model.json", "--mm-data", f"{TINY}/data.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"], ["trian"], ["list"], ["check", f"{TINY}/inference_model.json"], ["train", "--help"],
        ["train", "--lr", "fast"], ["generate", "--help"], ["generate", "--sed", "1"], ["generate", "--mm-model", "nowhere.json"],
        ["check", f"{TINY}/job.yaml"], ["check", *FILES], ["explain", f"{TINY}/job.yaml"],
        ["migrate", "--dry-run", *FILES], ["schema", "job"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys; from mm_core.cli.main import main\n"
        f"main(sys.argv[1:]); heavy = [name for name in {HEAVY} if name in sys.modules]; assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
