"""Which folder `--load` means."""

import pytest

from mm_core.weights import (
    WeightsError,
    complete_checkpoints,
    latest_checkpoint,
    layout,
    remove_temporaries,
    resolve_load,
)


@pytest.fixture
def run(tmp_path):
    """A run with two complete checkpoints."""
    folder = tmp_path / "runs" / "wan"
    for iteration in (5, 10):
        temporary = layout.prepare(folder / "checkpoints", iteration)
        layout.write_text(temporary / "state.json", "{}")
        layout.write_marker(temporary, iteration)
        layout.publish(temporary, folder / "checkpoints" / layout.folder_name(iteration))
    return folder


def test_a_run_a_checkpoints_folder_or_one_checkpoint(run):
    checkpoints = run / "checkpoints"
    assert resolve_load(run) == checkpoints / "iter_0000010"
    assert resolve_load(checkpoints) == checkpoints / "iter_0000010"
    assert resolve_load(checkpoints / "iter_0000005") == checkpoints / "iter_0000005"
    assert [p.name for p in complete_checkpoints(run)] == ["iter_0000005", "iter_0000010"]
    assert (checkpoints / "latest").read_text() == "iter_0000010\n"


def test_numbers_not_names_decide_which_is_newest(run):
    long = run / "checkpoints" / "iter_10000000"
    (run / "checkpoints" / "iter_0000010").rename(long)
    assert latest_checkpoint(run) == long


def test_a_missing_folder_names_the_closest(run):
    with pytest.raises(WeightsError, match=f"no such folder.*Closest: {run}"):
        resolve_load(run.parent / "wann")
    with pytest.raises(WeightsError, match=r"Closest: .*iter_0000010"):
        resolve_load(run / "checkpoints" / "iter_000010")
    with pytest.raises(WeightsError, match="this is a file"):
        resolve_load(run / "checkpoints" / "latest")


def test_a_run_without_a_complete_checkpoint_says_what_is_there(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "iter_0000005" / ".complete").unlink()
    (checkpoints / "iter_0000010").rename(checkpoints / ".tmp-iter_0000010")
    assert latest_checkpoint(run) is None
    with pytest.raises(WeightsError, match=r"unfinished ones \(iter_0000005, .tmp-iter_0000010\)"):
        resolve_load(run)
    with pytest.raises(WeightsError, match="has no iter_"):
        resolve_load(run.parent)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"a": {}}}'])
def test_a_broken_marker(run, text):
    (run / "checkpoints/iter_0000010/.complete").write_text(text)
    with pytest.raises(WeightsError, match=r"cannot be read .* older complete one: --load .*iter_0000005"):
        resolve_load(run)


def test_a_marker_that_points_outside_is_refused(run):
    (run / "checkpoints/iter_0000010/.complete").write_text(
        '{"files": {"../iter_0000005/state.json": {"bytes": 2}}}'
    )
    with pytest.raises(WeightsError, match="points outside"):
        resolve_load(run)


def test_temporaries_are_removed_and_nothing_else(run):
    checkpoints = run / "checkpoints"
    (checkpoints / ".tmp-iter_0000015").mkdir()
    (checkpoints / ".tmp-iter_0000015" / "half").touch()
    (checkpoints / ".tmp-latest").touch()
    assert remove_temporaries(run) == [".tmp-iter_0000015", ".tmp-latest"]
    assert sorted(p.name for p in checkpoints.iterdir()) == ["iter_0000005", "iter_0000010", "latest"]


def test_a_private_file_gets_the_mode_of_other_new_ones(tmp_path):
    private, new = tmp_path / "private.safetensors", tmp_path / "new"
    private.touch(0o600)
    new.touch()
    layout.let_others_read(private)
    assert private.stat().st_mode == new.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "private.safetensors"]
    layout.let_others_read(tmp_path / "absent" / "file")  # a mode is nothing to fail for
