"""SIGKILL at any moment of a run that saves every two steps: it goes on from a complete checkpoint, and ends with the
losses and the tensors of a run that nobody disturbed, bit for bit.

One run is killed again and again, each time going on from what it left, until it has come to its end. The moments are
drawn with fixed seeds: right before an operation on the checkpoints' folder (writing, renaming, cleaning up), a little
after it, or any time.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from mm_core.weights import complete_checkpoints, layout
from tests.e2e.conftest import losses, metrics
from tests.e2e.small import STEPS, Runs, whole_and_named
from tests.e2e.test_train import tensors
from tests.e2e.warm import Moment, finish

pytestmark = pytest.mark.timeout(600)

#: How often each kind of operation comes in a save of rank 0; the other ranks only write, twice.
IN_A_SAVE = {"write": 8, "rename": 3, "cleanup": 8}
OTHERS_WRITE = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("seed", "world", "kills"),
    [
        (1, 1, 4), (2, 2, 2),
        *(pytest.param(seed, 1, 6, marks=pytest.mark.slow) for seed in range(3, 7)),
        *(pytest.param(seed, 2, 5, marks=pytest.mark.slow) for seed in range(7, 9)),
    ],
)  # fmt: skip
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    runs: Runs, tmp_path: Path, seed: int, world: int, kills: int
) -> None:
    whole = runs.whole(world)
    draw = random.Random(seed)
    kinds: list[str] = []
    left, number = kills, 0
    while left:
        number += 1
        assert number <= 3 * kills, "the moments do not come"
        run = tmp_path / f"run-{number}"
        code = 1
        while code:
            kinds = kinds or draw.sample([*IN_A_SAVE, "any time"], 4)
            code = live(runs, run, world, kinds.pop() if left else None, draw)
            left -= code != 0
        assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
        assert losses(run) == losses(whole)
        assert tensors(run, STEPS) == tensors(whole, STEPS)
        assert names(run, STEPS) == names(whole, STEPS)
        shutil.rmtree(run)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_in_the_middle_of_a_save(runs: Runs, tmp_path: Path, world: int) -> None:
    """The checkpoint in flight is finished, one more is written, and nothing else; the run can go on."""
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    moments = {rank: Moment("write", 2, folder, signal=signal.SIGTERM) for rank in range(world)}
    assert finish(runs.start(run, world=world, moments=moments)) == [143] * world
    whole_and_named(run)
    assert not list(folder.glob(".tmp-*"))
    steps = [record["step"] for record in metrics(run)]
    assert steps[-1] < STEPS
    saved = [layout.iteration_of(path) for path in complete_checkpoints(run)]
    assert saved == sorted({2, steps[-1]})
    code, text = runs.run(run, "--load", run, world=world)
    assert code == 0, text
    assert losses(run) == losses(runs.whole(world))
    assert tensors(run, STEPS) == tensors(runs.whole(world), STEPS)


def live(runs: Runs, run: Path, world: int, kind: str | None, draw: random.Random) -> int:
    """Start the job or go on with it, to be killed at an operation of this kind, or not at all; return 0 if it came to
    its end before.
    """
    complete = complete_checkpoints(run)
    load = ["--load", str(run)] if complete else []
    saves = STEPS // 2 - (int(complete[-1].name[5:]) // 2 if complete else 0)
    moments = {}
    if kind in IN_A_SAVE:
        rank = draw.randrange(world) if kind == "write" else 0
        most = (OTHERS_WRITE if rank else IN_A_SAVE[kind]) * max(1, min(saves, 2))
        delay = draw.choice([0.0, draw.uniform(0, 0.02)])
        moments[rank] = Moment(kind, draw.randint(1, most), run / "checkpoints", delay)
    processes = runs.start(run, *load, world=world, moments=moments)
    try:
        if kind == "any time" and processes[0].wait(draw.uniform(0.1, runs.seconds[world])) is None:
            for one in processes:
                one.kill()
    finally:
        codes = finish(processes)
    text = " ".join(" ".join(one.text for one in processes).split())
    assert None not in codes, f"a rank outlived the killed one by far: {codes} {text}"
    if any(codes):
        assert -signal.SIGKILL in codes, f"{codes} {text}"
    if complete and "continuing" in text:
        assert f"continuing {complete[-1]} after step" in text
    whole_and_named(run)
    return int(any(codes))


def names(run: Path, step: int) -> list[str]:
    """Of the files of a checkpoint."""
    return sorted(path.name for path in (run / "checkpoints" / layout.folder_name(step)).iterdir())
