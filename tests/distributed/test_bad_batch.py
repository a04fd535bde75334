"""A loss that is not finite: the run ends on all ranks, no weight changes, and what each rank was given is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from mm_core.data.collate import collate
from mm_core.training.step import NonFiniteLossError
from mm_core.weights.tensors import state_tensors
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import trainer_of

pytestmark = pytest.mark.timeout(120)


class Stream(IterableDataset[Any]):
    """Clips of noise, the sixth of which is not finite; two a step and rank."""

    collate_fn = staticmethod(collate)

    def __init__(self, videos: int = 64) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        while True:
            self.next += 1
            video = torch.full((3, 8, 32, 32), torch.nan if self.next == 6 else 0.5)
            ids = torch.ones(32, dtype=torch.int64)
            yield {"video": video, "prompt_ids": ids, "prompt_mask": ids, "file": f"{self.next}.mp4"}

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def until_it_fails(run: Path, *more: str, stream: bool = False) -> tuple[str, bool, Any]:
    """The error, whether the weights are finite, and the videos that the run says it was given last."""
    trainer = trainer_of(run, *more, dataset=Stream() if stream else None)
    task, seen = trainer.task, []
    prepare = task.prepare

    def noted(micro_batches: Any) -> Any:
        def each() -> Any:
            for batch in micro_batches:
                seen.append((trainer.step + 1, batch["video"].clone()))
                yield batch

        return prepare(each())

    task.prepare = noted
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train(lambda: False)
    finite = all(bool(t.isfinite().all()) for t in state_tensors(trainer.model.predictor).values())
    assert caught.value.report is not None
    of_it = [video.numpy() for step, video in seen if step == caught.value.report.step]
    return str(caught.value), finite, of_it


# Weights of 1e30 after the first step: the loss of the second one is not finite.
BROKEN = ("--lr", "1e30", "--clip-grad", "0")
MODES = {"at once": (), "noticed a step later": ("model.patch.clip_grad_async=true",)}


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_of_a_loss_that_is_not_finite_is_kept(tmp_path: Path, mode: str) -> None:
    run = tmp_path / "run"
    ((message, finite, videos),) = run_ranks(until_it_fails, 1, run, *BROKEN, *MODES[mode], timeout=100)
    folder = run / "non-finite/step-0000002"
    assert message.endswith(f"What each rank was given is in {folder}.")
    assert "step 2" in message
    assert finite
    record = json.loads((folder / "rank-00000.json").read_text())
    first, second = record["micro_batches"]
    assert (first["samples"], second["samples"]) == ([2], [3])
    assert first["file"][0].endswith(".mp4")
    assert first["tensors"]["video"]["finite"]
    assert record["parameters_not_finite"] == []
    tensors = load_file(folder / "rank-00000.safetensors")
    for number, entry in enumerate((first, second)):
        wrong = not torch.tensor(float(entry["losses"][0])).isfinite()
        assert entry["written"] == wrong == (f"micro-{number:03d}.video" in tensors)
        if wrong:
            assert np.array_equal(tensors[f"micro-{number:03d}.video"].numpy(), videos[number])
    assert tensors
    assert not list((run / "checkpoints").glob("iter_*"))
    # Another attempt leaves its own beside it.
    before = {file: file.read_bytes() for file in folder.iterdir()}
    ((message, *_),) = run_ranks(until_it_fails, 1, run, *BROKEN, *MODES[mode], timeout=100)
    assert message.endswith(f"What each rank was given is in {folder}-1.")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert {file.name for file in Path(f"{folder}-1").iterdir()} == {file.name for file in before}


@pytest.mark.slow
def test_of_a_stream_and_of_two_ranks_too(tmp_path: Path) -> None:
    def on_each(run: Path) -> Any:
        return until_it_fails(run, "--global-batch-size", "4", stream=True)

    messages = run_ranks(on_each, 2, tmp_path / "run", timeout=100)
    assert len({message.partition(" Samples of rank")[0] for message, *_ in messages}) == 1
    (folder,) = (tmp_path / "run/non-finite").iterdir()
    records = [json.loads((folder / f"rank-{rank:05d}.json").read_text()) for rank in (0, 1)]
    found = [entry for record in records for entry in record["micro_batches"] if entry["losses"] == ["nan"]]
    assert [entry["file"] for entry in found] == [["6.mp4"]]
    assert not found[0]["tensors"]["video"]["finite"]
    for rank, record in enumerate(records):
        written = [entry["written"] for entry in record["micro_batches"]]
        one_is_bad = found[0] in record["micro_batches"]
        assert written == [entry == found[0] or not one_is_bad for entry in record["micro_batches"]]
        assert (folder / f"rank-{rank:05d}.safetensors").exists()
