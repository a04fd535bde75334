"""Where a value of a configuration came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

OriginKind = Literal["file", "flag", "env", "default", "hook"]

#: A place inside a document: keys and list indices from the top level down.
KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value was written.

    `line` and `column` count from 1, as editors do. `detail` is the flag's spelling, the environment
    variable's name or the distribution (with its version) whose hook wrote the value.
    """

    kind: OriginKind
    file: str | None = None
    line: int | None = None
    column: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "file":
                place = [str(self.file)]
                if self.line is not None:
                    place.append(str(self.line))
                    if self.column is not None:
                        place.append(str(self.column))
                return ":".join(place)
            case "flag":
                return self.detail or "command line"
            case "env":
                return f"environment variable {self.detail}"
            case "hook":
                return f"hook ({self.detail})"
            case _:
                return self.detail or "default"


DEFAULT = Origin("default")


def dotted(path: KeyPath) -> str:
    """Return a path as people write it: `("video", 0, "param")` is `video[0].param`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
