"""A job that is as small as it can be, its undisturbed runs, and what any run's folder must be like at any moment."""

from __future__ import annotations

import re
import time
from pathlib import Path

from mm_core.config import TrainFlags
from mm_core.weights import complete_checkpoints, layout
from tests.e2e.conftest import TINY, Job, edited
from tests.e2e.warm import Moment, Warm, finish, ranks

STEPS = 8


class Runs:
    """The job, and its undisturbed runs on one and two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = edited(TINY / "model.json", folder / "model.json", _smaller)
        self.seconds: dict[int, float] = {}  # that an undisturbed run takes, by ranks
        self._started = 0
        finish(ranks(folder / "server", ["--version"]))  # whose start no run's time has in it

    def start(
        self, run: Path, *flags: str | Path, world: int = 1, moments: dict[int, Moment] | None = None
    ) -> list[Warm]:
        """Start the ranks of a run that saves every two steps; what they print stays out of its folder."""
        batch = ["--micro-batch-size", str(2 // world), "--global-batch-size", "2"]
        steps = [] if "--train-iters" in flags else ["--train-iters", str(STEPS)]
        keep = ["--keep-last", "2"] if "keep_last" in TrainFlags.model_fields else []
        job = Job(model=self.model).flags(
            "--save", run, "--save-interval", "2", *keep, *batch, *steps, *flags
        )
        self._started += 1
        return ranks(self.folder / f"output-{self._started}", ["train", *job], world, moments)

    def run(self, run: Path, *flags: str | Path, world: int = 1) -> tuple[int | None, str]:
        """Run to the end. Return rank 0's exit code, and what it printed, in one line."""
        processes = self.start(run, *flags, world=world)
        codes = finish(processes)
        return codes[0], " ".join(processes[0].text.split())

    def whole(self, world: int = 1) -> Path:
        """An undisturbed run."""
        run = self.folder / f"whole-{world}"
        if world not in self.seconds:
            started = time.monotonic()
            code, text = self.run(run, world=world)
            assert code == 0, text
            self.seconds[world] = time.monotonic() - started
        return run


def _smaller(text: str) -> str:
    for name, value in {"hidden_size": 32, "ffn_dim": 32, "num_heads": 2, "num_layers": 1}.items():
        text = re.sub(rf'("{name}"): \d+', rf"\1: {value}", text, count=1)
    return text


def whole_and_named(run: Path) -> None:
    """What a killed process leaves: under their names are complete checkpoints only, and `latest` names one. It may be absent,
    for a run can be killed twice between a checkpoint's name and `latest`.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return
    found = [path for path in folder.iterdir() if not path.name.startswith(layout.TEMPORARY)]
    named = {path.name for path in found} - {layout.LATEST}
    assert named == {path.name for path in complete_checkpoints(run)}
    for path in found:
        if path.is_dir():
            layout.verify_contents(path)
    if (folder / layout.LATEST).exists():
        assert (folder / layout.LATEST).read_text().strip() in named
