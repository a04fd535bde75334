"""Documentation pages as scripts: their files are written, their commands run, their output compared, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.conftest import ENVIRONMENT, ROOT

FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_ADD = "add to "
PRINTS = "prints"


@dataclass(frozen=True)
class Block:
    """One fenced block of code."""

    page: Path
    language: str
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)} {self.title or self.text[:40]!r}"

    @property
    def commands(self) -> list[str]:
        """The lines of a console block that a reader types."""
        lines = self.text.splitlines() if self.language == "console" else []
        return [line[2:] for line in lines if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    return [Block(page, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def titled(page: Path, title: str) -> str:
    (block,) = (block for block in blocks(page) if block.title == title)
    return block.text


@dataclass
class Environment:
    """A virtual environment with this one's packages, in which a page's commands install what they like."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path) -> Environment:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True, timeout=120)
        (site,) = root.glob("lib/python*/site-packages")
        # `addsitedir`, unlike a plain path, brings the editable installs along.
        ours = sysconfig.get_path("purelib")
        (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        for command, module in {"mm": "mm_core", "pip": "pip", "pytest": "pytest"}.items():
            script = root / "bin" / command
            script.write_text(f'#!/bin/sh\nexec "{root}/bin/python" -m {module} "$@"\n')
            script.chmod(0o755)
        # What the reader's pip does with the network, ours does without: nothing of it is to be fetched.
        pip = {
            "NO_INDEX": "1",
            "NO_DEPS": "1",
            "NO_BUILD_ISOLATION": "0",
            "DISABLE_PIP_VERSION_CHECK": "1",
            "QUIET": "1",
        }
        variables = {
            key: value
            for key, value in ENVIRONMENT.items()
            if not key.startswith(("PYTEST", "PYTHON", "MM_"))
        }
        variables |= {f"PIP_{key}": value for key, value in pip.items()}
        variables |= {"PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return cls(root, variables)

    def run(self, command: str, folder: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, shell=True, cwd=folder, env=self.variables, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip


@dataclass
class Walk:
    """What came of a page: each command with its output, and the files that its reader wrote."""

    outputs: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


def follow(page: Path, folder: Path, environment: Environment) -> Walk:
    """Do what a page says, in a folder: write each titled file, append what is to be added, run each command.

    A command that is followed by a block titled "prints" must print that, and may fail if the block has an error;
    any other command must succeed.
    """
    walk = Walk()
    found = blocks(page)
    for index, block in enumerate(found):
        for number, command in enumerate(block.commands):
            done = environment.run(command, folder)
            last = number == len(block.commands) - 1
            after = found[index + 1] if last and index + 1 < len(found) else None
            expected = after.text if after is not None and after.title == PRINTS else ""
            code = 2 if " error: " in expected else 0
            assert done.returncode == code, f"{block.name}: {command}\n{done.stdout}\n{done.stderr}"
            assert expected in done.stdout, f"{block.name}: {command}\n{done.stdout}"
            walk.outputs[command] = done.stdout
        if block.title.startswith(_ADD):
            path = folder / block.title.removeprefix(_ADD)
            path.write_text(f"{path.read_text()}\n{block.text}", encoding="utf-8")
            walk.written[f"{block.title} ({index})"] = block.text
        elif re.fullmatch(r"[\w./-]+\.\w+", block.title):
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            walk.written[block.title] = block.text
    return walk


def own_lines(written: dict[str, str], prefix: str) -> int:
    """Lines that are not empty, in the files that a page's reader writes below a folder."""
    texts = [text for title, text in written.items() if prefix in title]
    return sum(bool(line.strip()) for text in texts for line in text.splitlines())
