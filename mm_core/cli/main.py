"""The command `mm`: finds the subcommand, and turns errors into messages and exit codes.

Exit codes: 0; 2 for a mistake of the user's (the message says where and how to mend it); 1 for a failure; 130 after Ctrl-C;
143 after SIGTERM.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

from mm_registry.errors import UserError

TYPE_CHECKING = False  # typing's, which is slow to import
if TYPE_CHECKING:
    from typing import TextIO

COMMANDS: dict[str, tuple[str, str]] = {
    "list": (
        "mm_core.cli.list",
        "every id that installed packages offer, with distribution, version and origin",
    ),
    "show": ("mm_core.cli.show", "one id: where it comes from, whether it can be used, what belongs to it"),
    "check": ("mm_core.cli.check", "read and check the files of a job (or one file); nothing is built"),
    "explain": (
        "mm_core.cli.explain",
        "each value of a job: what it is, where it was written, what hooks changed",
    ),
    "schema": ("mm_core.cli.schema", "the JSON Schema of a file or a component, for editors"),
    "migrate": ("mm_core.cli.migrate", "rewrite a launch script, flags or files as one commented job file"),
    "data": (
        "mm_core.cli.data_inspect",
        "`mm data inspect`: clips per bucket, what is left out and why, captions, sample frames",
    ),
    "plan": (
        "mm_core.cli.plan",
        "memory, communication and time of a training job, without its devices, weights and data",
    ),
    "train": (
        "mm_core.cli.train",
        "train a model from model.json, data.json, tools.json, fsdp2.yaml and flags",
    ),
    "generate": (
        "mm_core.cli.generate",
        "write videos for prompts, from a run, a checkpoint or a folder of weights",
    ),
    "convert": (
        "mm_core.cli.convert",
        "write a Hugging Face folder from a run, a checkpoint of MindSpeed-MM or another folder",
    ),
    "extract-features": (
        "mm_core.cli.extract_features",
        "encode videos and captions once, and store latents and embeddings for training",
    ),
    "doctor": (
        "mm_core.cli.doctor",
        "what is wrong with this environment and its plugins, and what mends it",
    ),
    "plugin": ("mm_core.cli.plugin", "explain, check, enable, disable, lock, verify or write plugins"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: mm COMMAND [OPTIONS]", "", "Train and run multimodal models that come as pip packages.", "",
         "commands:", *lines, "",
         "`mm COMMAND --help` lists a command's options; `mm --version` prints the version."]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _command(argv)
        sys.stdout.flush()  # here, where a reader that went away is no failure
        return code
    except UserError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("mm: interrupted\n")
        return 130
    except Exception as error:  # noqa: BLE001 - the last stop of a failure: it is printed whole
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 0
        if isinstance(error, OSError) and _output_failed(error):
            sys.stderr.write(f"mm: cannot write output: {error.strerror}\n")
            return 1
        from mm_core.config.devices import torch_npu_failure

        if (sentence := torch_npu_failure(error)) is not None:  # often, `import torch` itself
            _report(UserError(sentence))
            return UserError.exit_code
        import traceback  # here, because `mm list` is to answer at once

        traceback.print_exc()
        return 1


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help() + "\n")
        return 0
    if argv[0] in ("-V", "--version"):
        from mm_core import __version__

        sys.stdout.write(f"mm (mmzoo-core) {__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        from mm_registry.suggestions import closest

        near = closest(argv[0], COMMANDS)
        mend = f"did you mean `mm {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"mm: there is no command {argv[0]!r}; {mend}")
    module = importlib.import_module(COMMANDS[argv[0]][0])
    code: int = module.run(argv[1:])
    return code


def _reader_left() -> bool:
    """Whether it is our output that nobody reads any more (`| head`), not some other pipe.

    What is still to be written then goes nowhere.
    """
    output = sys.__stdout__
    if output is None:
        return False
    import select

    pipe = select.poll()
    pipe.register(output.fileno(), 0)  # errors are always told
    if not pipe.poll(0):
        return False
    _discard(output)
    return True


def _output_failed(error: OSError) -> bool:
    """Whether a command could not write what it prints (`> /dev/full`): such an error names no file, and arises
    here or in the command itself, not in what it calls.

    What is still to be written then goes nowhere.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "" if place is None else str(place.tb_frame.f_globals.get("__name__"))
    output = sys.__stdout__
    if output is None or error.filename or not module.startswith("mm_core.cli."):
        return False
    _discard(output)
    return True


def _discard(output: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output.fileno())
    os.close(nowhere)


def _report(error: UserError) -> None:
    from mm_core.config.environment import read

    rank = read("RANK") or "0"
    prefix = "error" if rank == "0" else f"error (rank {rank})"
    from mm_core.cli.tables import printable

    sys.stderr.write(printable(f"{prefix}: {error}\n"))


def _write_any(output: TextIO) -> None:
    """Spell out what the output's encoding lacks (`LC_ALL=POSIX`, a redirection elsewhere): half a page is worse."""
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="backslashreplace")


def run() -> None:
    """Entry point of the console script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started without it (`>&-`): what is written goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    _write_any(sys.stdout)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if (
        "torch" in sys.modules and "torch.distributed" in sys.modules
    ):  # the latter alone: torch's import failed
        # A rank that fails must not wait in destructors for peers that still stand in a collective.
        import torch.distributed as dist

        if code and dist.is_available() and dist.is_initialized():
            os._exit(code)
    raise SystemExit(code)
