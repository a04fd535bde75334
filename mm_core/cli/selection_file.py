"""A selection file that is changed: comments, order and layout stay, and it is replaced whole or not at all."""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Array

from mm_registry import UserError
from mm_registry.selection import SelectionLayer
from mm_registry.selection_files import read_layer
from mm_registry.spec import canonical_name

_TABLE = "plugins"


class SelectionFile:
    """The table `[plugins]` of a file that may not exist yet. `layer` is what it said when it was read,
    `changes` what was done since, in words.
    """

    def __init__(self, path: Path, text: str, layer: SelectionLayer) -> None:
        self.path = path
        self.layer = layer
        self.changes: list[str] = []
        self._document = tomlkit.parse(text)

    @classmethod
    def read(cls, path: Path) -> SelectionFile:
        """Read and check a file; one that does not exist says nothing.

        Raises:
            SelectionError: it cannot be read, is no TOML, or says something that it may not.
        """
        if not os.path.lexists(path):  # a link that leads nowhere is an error, here as in any other command
            return cls(path, "", SelectionLayer(str(path)))
        layer = read_layer(path)
        return cls(path, path.read_bytes().decode("utf-8"), layer)  # bytes: line ends stay what they are

    def add(self, key: str, name: str) -> None:
        """Put a name into a list, unless it is there."""
        table = self._table()
        if key not in table:
            table.add(key, tomlkit.array())
        names = table[key]
        if name not in map(canonical_name, names):
            names.append(name)
            self.changes.append(f"added {name} to {key}")

    def remove(self, key: str, name: str) -> None:
        """Take a name out of a list, however it is spelt. The list stays, empty perhaps, with its comments."""
        names: Array | list[str] = self._document.get(_TABLE, {}).get(key, [])
        for written in [written for written in names if canonical_name(written) == name]:
            names.remove(written)
            self.changes.append(f"removed {written} from {key}")

    def write(self) -> bool:
        """Replace the file if something changed, and return whether it is new. Its folder is made if need be.

        Raises:
            UserError: it cannot be written.
        """
        if not self.changes:
            return False
        text = tomlkit.dumps(self._document)
        if tomllib.loads(text) != self._document.unwrap():
            raise RuntimeError(f"{self.path} was not changed: editing it would have damaged it")
        # A link stays a link: what it leads to is replaced.
        target = Path(os.path.realpath(self.path))
        created = not target.exists()
        with _told(self.path):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        with _told(self.path):
            try:
                temporary.write_bytes(text.encode("utf-8"))
                if not created:
                    temporary.chmod(target.stat().st_mode & 0o7777)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        return created

    def _table(self) -> Any:
        if _TABLE not in self._document:
            self._document.add(_TABLE, tomlkit.table())
        return self._document[_TABLE]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold off other commands that edit the same file, so that none takes back what another one wrote. The lock is on
    the nearest folder that is there, and leaves nothing behind.
    """
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror or error}"
        raise UserError(f"{problem}; use another --scope, or change who may write there") from error
