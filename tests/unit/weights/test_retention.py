"""`--keep-last`, `--keep-every`, and room on the disk."""

import shutil
from pathlib import Path

import pytest

from mm_core.weights import WeightsError, complete_checkpoints, layout
from mm_core.weights.retention import Retention
from mm_core.weights.space import check_space


def checkpoints(run: Path, *iterations: int) -> Path:
    folder = run / "checkpoints"
    for iteration in iterations:
        (folder / layout.folder_name(iteration)).mkdir(parents=True)
        (folder / layout.folder_name(iteration) / "state.json").write_text("{}")
        layout.write_marker(folder / layout.folder_name(iteration), iteration)
    return folder


def kept(run: Path) -> list[int]:
    return [layout.iteration_of(folder) for folder in complete_checkpoints(run)]


@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (None, 4, [2, 4, 6, 8, 10]),
        (1, None, [10]),
        (2, None, [8, 10]),
        (2, 4, [4, 8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
    ],
)
def test_the_newest_and_multiples_stay(last, every, expected, tmp_path):
    folder = checkpoints(tmp_path, 2, 4, 6, 8, 10)
    removed = Retention(last, every).apply(folder, folder / "iter_0000010")
    assert kept(tmp_path) == expected
    assert removed == [layout.folder_name(i) for i in (2, 4, 6, 8, 10) if i not in expected]
    assert not list(folder.glob(".tmp-*"))


def test_only_complete_older_checkpoints_of_this_folder_go(tmp_path):
    folder = checkpoints(tmp_path, 2, 4, 6, 8)
    checkpoints(tmp_path / "elsewhere", 1)
    shutil.move(folder / "iter_0000002", tmp_path / "aside")
    (folder / "iter_0000002").symlink_to(tmp_path / "aside")
    (folder / "iter_0000003").mkdir()  # without marker: nobody knows whose it is
    (folder / "notes").mkdir()
    shutil.copytree(folder / "iter_0000004", folder / "iter_5")  # of a name that we do not give
    Retention(1, protected=folder / "iter_0000004").apply(folder, folder / "iter_0000006")
    # 2 is a link to somewhere, 4 is protected, 8 is newer than the one that was just written.
    names = [2, 3, 4, 6, 8]
    assert sorted(p.name for p in folder.iterdir()) == [*map(layout.folder_name, names), "iter_5", "notes"]
    Retention(1).apply(folder, folder / "iter_0000008")
    assert kept(tmp_path) == [2, 5, 8]
    assert (tmp_path / "aside/state.json").exists()
    assert kept(tmp_path / "elsewhere") == [1]


def test_what_cannot_be_removed_stays_and_is_told(tmp_path, caplog):
    folder = checkpoints(tmp_path, 1, 2)
    # A file of the name that the old one would get: it can be no folder, and renaming onto it fails.
    (folder / ".tmp-removed-iter_0000001").write_text("")
    assert Retention(1).apply(folder, folder / "iter_0000002") == []
    assert kept(tmp_path) == [1, 2]
    assert "iter_0000001 is no longer needed, but cannot be removed" in caplog.text


def test_room_is_asked_for_before_anything_is_written(tmp_path):
    check_space(tmp_path / "not/there/yet", 1000)
    with pytest.raises(
        WeightsError, match=r"takes 4611686018.4 GB, and its disk has .* left; nothing was written"
    ):
        check_space(tmp_path / "not/there/yet", 1 << 62)
    assert not (tmp_path / "not").exists()
