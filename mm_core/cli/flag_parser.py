"""argparse as our commands speak: errors are one sentence with the closest flag, underscores stand for hyphens."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from mm_registry.errors import UserError
from mm_registry.suggestions import closest


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors end with exit code 2, told by `mm` itself.

    Args:
        command: as it is typed, such as `mm convert`.
        what: the command in the message about an unknown flag, if it is more than that.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, what: str = "", **options: Any) -> None:
        super().__init__(**{"prog": command, **options}, allow_abbrev=False)
        self.command, self.what = command, what or command

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise UserError(f"{self.command}: {message}. `{self.command} --help` lists the flags.")

    def flags(self) -> list[str]:
        """Return the flags, with their hyphens."""
        return [word for action in self._actions for word in action.option_strings if word.startswith("--")]

    def parse(self, argv: Sequence[str], also_known: Iterable[str] = ()) -> argparse.Namespace:
        """Parse a command line.

        Args:
            also_known: flags that are right elsewhere, to be suggested for a misspelt one.

        Raises:
            UserError: a flag is unknown, a value is missing or wrong.
        """
        known, words = self.flags(), []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = "--" + name[2:].replace("_", "-")
                if name not in known:
                    near = closest(name, [*known, *also_known], 1)
                    mend = f"did you mean {near[0]}?" if near else f"`{self.command} --help` lists the flags."
                    raise UserError(f"{name}: there is no such flag of {self.what}; {mend}")
                word = name + equals + value
            words.append(word)
        return self.parse_args(words)
