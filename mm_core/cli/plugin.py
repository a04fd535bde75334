"""`mm plugin SUB`: finds the subcommand."""

from __future__ import annotations

import importlib
import sys

from mm_registry.errors import UserError
from mm_registry.suggestions import closest

COMMANDS: dict[str, tuple[str, str]] = {
    "explain": (
        "mm_core.cli.plugin_explain:run",
        "why an id means what it means: every claim, and what decided",
    ),
    "check": ("mm_core.cli.plugin_check:run", "run the conformance kit on the components of a distribution"),
    "enable": ("mm_core.cli.plugin_selection:enable", "let a distribution take part again"),
    "disable": ("mm_core.cli.plugin_selection:disable", "leave a distribution out, without uninstalling it"),
    "lock": ("mm_core.cli.plugin_lock:lock", "write down the installed plugins: versions, hashes, ids"),
    "verify": ("mm_core.cli.plugin_lock:verify", "compare the installed plugins with the lock"),
    "new": ("mm_core.cli.plugin_new:run", "write a plugin that works, to start from"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: mm plugin COMMAND [OPTIONS]", "", "Find out about plugins, choose among them, write one.", "",
         "commands:", *lines, "", "`mm plugin COMMAND --help` lists a command's options."]
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Run one subcommand and return its exit code.

    Raises:
        UserError: there is no such subcommand.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help() + "\n")
        return 0
    if argv[0] not in COMMANDS:
        near = closest(argv[0], COMMANDS)
        mend = f"did you mean `mm plugin {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"mm plugin: there is no command {argv[0]!r}; {mend}")
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    code: int = getattr(importlib.import_module(module), function)(argv[1:])
    return code
