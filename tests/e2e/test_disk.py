"""Disks that are full, read-only or forgetful: one clear error, and the older checkpoint is as it was."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mm_core.weights import complete_checkpoints, layout
from tests.e2e.conftest import losses
from tests.e2e.small import STEPS, Runs, whole_and_named
from tests.e2e.test_train import tensors

pytestmark = pytest.mark.timeout(300)
Mount = Callable[..., None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("disks"))


@pytest.fixture
def mount() -> Iterator[Mount]:
    """`mount`, whose last argument is the folder; undone at the end."""
    folders: list[Path] = []

    def run(*arguments: str | Path) -> None:
        done = subprocess.run(
            ["mount", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        folders.append(Path(arguments[-1]))

    yield run
    for folder in reversed(folders):
        subprocess.run(["umount", "--lazy", folder], timeout=30, check=False)


def files_of(run: Path) -> dict[Path, bytes]:
    """All but the lock and the logs."""
    return {
        path: path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.suffix != ".log"
    }


def names_of(run: Path, step: int) -> list[str]:
    """Of the files of a checkpoint."""
    return sorted(path.name for path in (run / "checkpoints" / layout.folder_name(step)).iterdir())


def test_a_disk_without_room(runs: Runs, mount: Mount, tmp_path: Path) -> None:
    """It is known before anything is written."""
    newest = runs.whole() / "checkpoints" / layout.folder_name(STEPS)
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(path.stat().st_size for path in newest.iterdir()) * 17 // 10  # for one, and for the logs
    mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk)
    run = disk / "run"
    code, text = runs.run(run)
    assert code == 2
    assert "a checkpoint takes" in text
    assert "nothing was written" in text
    assert "Traceback" not in text
    whole_and_named(run)
    assert [path.name for path in complete_checkpoints(run)] == ["iter_0000002"]
    assert not list(run.rglob(".tmp-*"))


def test_a_disk_that_is_full_in_the_middle(runs: Runs, mount: Mount, tmp_path: Path) -> None:
    """There are bytes, but no more files: nobody knows before. With room, the run goes on as if nothing had been."""
    whole = runs.whole()
    disk = tmp_path / "disk"
    disk.mkdir()
    files = len(list(whole.rglob("*"))) - len(names_of(whole, STEPS)) + 3  # of the second checkpoint, some
    mount("-t", "tmpfs", "-o", f"nr_inodes={files}", "tmpfs", disk)
    run = disk / "run"
    code, text = runs.run(run)
    assert code == 1
    assert "iter_0000004 failed: OSError: [Errno 28] No space left on device" in text
    assert "Traceback" not in text
    whole_and_named(run)
    assert [path.name for path in complete_checkpoints(run)] == ["iter_0000002"]
    mount("-o", "remount,nr_inodes=1000", disk)
    code, text = runs.run(run, "--load", run)
    assert code == 0, text
    assert losses(run) == losses(whole)
    assert tensors(run, STEPS) == tensors(whole, STEPS)


@pytest.mark.parametrize("where", [".", "checkpoints"])
def test_a_read_only_folder(runs: Runs, mount: Mount, tmp_path: Path, where: str) -> None:
    """Before any step is trained."""
    run = Path(shutil.copytree(runs.whole(), tmp_path / "run"))
    before = files_of(run)
    mount("--bind", run / where, run / where)
    mount("-o", "remount,bind,ro", run / where)
    code, text = runs.run(run, "--load", run, "--train-iters", "9")
    assert code == 2
    assert f"error: --save {run}: the run's folder cannot be written (Read-only file system" in text
    assert files_of(run) == before


def _cut(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def _flip(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def _unmark(folder: Path) -> None:
    (folder / layout.MARKER).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "iter_0000008 is damaged: __0_0.distcp has"),
        (_flip, "iter_0000008 is damaged: __0_0.distcp was changed after it was written"),
        (_unmark, "iter_0000008 is unfinished: it has no .complete marker"),
    ],
)
def test_a_damaged_checkpoint(
    runs: Runs, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    run = Path(shutil.copytree(runs.whole(), tmp_path / "run"))
    newest, older = run / "checkpoints/iter_0000008", run / "checkpoints/iter_0000006"
    damage(newest)
    before = files_of(run)
    code, text = runs.run(tmp_path / "new", "--load", newest)
    assert code == 2
    assert message in text
    assert f"--load {older}" in text
    assert not (tmp_path / "new/checkpoints").exists()
    if damage is _flip:
        code, text = runs.run(tmp_path / "older", "--load", older)
        assert code == 0, text
        assert losses(tmp_path / "older") == losses(runs.whole())[6:]
        assert tensors(tmp_path / "older", STEPS) == tensors(runs.whole(), STEPS)
    assert files_of(run) == before
