"""What stood before the training program: `torchrun` and its arguments, as the command line to run from now on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from mm_core.config.migrate.shell_values import Value, text_of, unknown_of

#: Our name -> how launchers spell it.
_NAMES = {
    "nproc_per_node": ("nproc_per_node",),
    "nnodes": ("nnodes", "num_machines"),
    "node_rank": ("node_rank", "machine_rank"),
    "master_addr": ("master_addr", "main_process_ip"),
    "master_port": ("master_port", "main_process_port"),
    "num_processes": ("num_processes",),
    "rdzv_backend": ("rdzv_backend",),
    "rdzv_endpoint": ("rdzv_endpoint",),
    "rdzv_id": ("rdzv_id",),
}
_BEFORE = ("nohup", "exec", "time", "env", "sudo")
_OURS = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings}


@dataclass
class Launcher:
    """Arguments of the launcher, by our names; values as text. `unknown` are those that cannot be known."""

    program: str = "torchrun"
    line: int | None = None
    arguments: dict[str, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    dropped: list[str] = field(default_factory=list)

    @property
    def single_node(self) -> bool:
        """Whether the job runs on one machine."""
        return self.arguments.get("nnodes", "1") == "1"

    @property
    def ranks(self) -> int | None:
        """The ranks of one machine; None if they cannot be known."""
        text = self.arguments.get("nproc_per_node", "")
        if not text and self.single_node:
            text = self.arguments.get("num_processes", "")
        return int(text) if text.isdecimal() and 0 < len(text) < 6 and int(text) > 0 else None

    def command(self, job: str) -> str:
        """Return the command line that starts the same ranks with the job file."""
        words = ["torchrun"]
        for name, text in self.arguments.items():
            if name != "num_processes":
                words += [f"--{name}", text if name in self.unknown else shlex.quote(text)]
        processes = self.arguments.get("num_processes")
        if "nproc_per_node" not in self.arguments and processes is not None:
            words[1:1] = ["--nproc_per_node", processes if self.single_node else "RANKS_OF_ONE_MACHINE"]
        return " ".join([*words, "-m", "mm_core", "train", shlex.quote(job)])


def read_launcher(words: Sequence[Value], line: int) -> Launcher | None:
    """Read the words before the program, which line `line` starts; None if nothing but Python starts it."""
    program = next((text_of(word) for word in words if text_of(word) not in _BEFORE), "torchrun")
    result = Launcher(program, line)
    rest = list(words)
    while rest:
        text = text_of(rest[0])
        value = rest.pop(0)
        if not text.startswith("-"):
            continue
        spelling, equals, given = text.lstrip("-").partition("=")
        name = _OURS.get(spelling.replace("-", "_"))
        if name is None:
            if spelling not in ("m", "u"):
                result.dropped.append(text)
            continue
        if not equals:
            if not rest or text_of(rest[0]).startswith("-"):
                continue
            value = rest.pop(0)
            given = text_of(value)
        result.arguments[name] = given
        result.unknown.discard(name)
        if unknown_of(value) is not None:
            result.unknown.add(name)
    return result if result.arguments or result.dropped else None
