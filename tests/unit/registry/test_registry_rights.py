"""Metadata that the user may not read, as on a machine that others administer."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mm_registry.discovery import Installed, read_installed


def read(*roots: Path) -> Installed:
    return read_installed([str(root) for root in roots])


def without_rights(question: Callable[[], Any]) -> Any:
    """The answer of a child process that may read only what everybody may (root may read everything)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        with os.fdopen(theirs, "wb") as file:
            file.write(pickle.dumps(question()))
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        answer = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(answer)


class TestRights:
    @pytest.fixture
    def root(self) -> Iterator[Path]:
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # pytest's own folders are readable for their owner only
            os.chmod(folder, 0o755)
            yield Path(folder)

    def add(self, root: Path, name: str) -> Path:
        info = root / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[mm_core.predictor_models]\na = acme:A\n")
        return info

    @pytest.mark.parametrize("what", [".", "entry_points.txt", "METADATA"])
    def test_unreadable_metadata(self, root: Path, what: str) -> None:
        self.add(root, "good")
        place = self.add(root, "bad") / what
        place.chmod(0)
        names, diagnostics = without_rights(
            lambda: ([record.name for record in read(root).records], read(root).diagnostics)
        )
        assert names == ["good"]
        (diagnostic,) = diagnostics
        assert (diagnostic.code, diagnostic.distribution) == ("unreadable-metadata", "bad")
        assert "make it readable, or reinstall or remove it" in diagnostic.message
        assert "Permission denied" in diagnostic.message

    def test_unreadable_folder_on_the_path(self, root: Path) -> None:
        for name in ("open", "closed"):
            (root / name).mkdir()
            self.add(root / name, name)
        (root / "closed").chmod(0)
        names, diagnostics = without_rights(
            lambda: (
                [record.name for record in read(root / "closed", root / "open").records],
                read(root / "closed").diagnostics,
            )
        )
        assert names == ["open"]
        (diagnostic,) = diagnostics
        assert (diagnostic.level, diagnostic.code) == ("error", "unreadable-path")
        assert "remove it from the path" in diagnostic.message
