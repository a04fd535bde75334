"""What a checkpoint holds and a resumed run makes of it: the older switches, averages, streams, changed jobs. Real jobs in
ranks that are forked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags
from mm_core.data import build_dataset
from mm_core.data.collate import collate
from mm_core.training.resume import find_resume
from mm_core.training.run_folder import RunFolder
from mm_core.training.trainer import Trainer
from mm_core.weights import save_checkpoint
from mm_core.weights.tensors import state_tensors
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import _whole as whole

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny/wan22-t2v"


def trainer_of(run: Path | None, *more: str | Path, dataset: Any = None) -> Trainer:
    """The tiny job, built."""
    os.chdir(ROOT)  # classic files name others from there
    flags = parse_train_flags([
        "--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"),
        "--fsdp2-config-path", str(TINY / "fsdp2.yaml"), "--lr", "1e-3", "--lr-decay-style", "constant", "--seed", "7",
        "--num-workers", "0", "--train-iters", "4", "--micro-batch-size", "1", "--global-batch-size", "2",
        *([] if run is None else ["--save", str(run)]), *map(str, more),
    ])  # fmt: skip
    job = load_training_job(flags)
    folder = None if run is None else RunFolder(run)
    if folder is not None and dist.get_rank() == 0:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator.current()
    accelerator.seed_all(flags.seed + dist.get_rank())
    if dataset is None:
        dataset = build_dataset(job.components["dataset"], flags.seed)
    return Trainer(job, accelerator, folder, dataset)


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything of a trainer that could differ, comparable and cheap to send."""
    names = [name for name, p in trainer.model.predictor.named_parameters() if p.requires_grad]
    states = trainer.optimizer.state.values()
    averages = trainer.ema.tensors("predictor") if trainer.ema else {}
    return {
        "step": trainer.step,
        "consumed": trainer.consumed_samples,
        "weights": _bytes(state_tensors(trainer.model.predictor)),
        "moments": _bytes({n: s["exp_avg"] for n, s in zip(names, states, strict=False)}),
        "averages": _bytes(averages),
        "generator": torch.get_rng_state().numpy().tobytes(),
    }


def _bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: whole(tensor).numpy().tobytes() for name, tensor in tensors.items()}


def trained(run: Path | None, *more: str | Path, dataset: Any = None) -> dict[str, Any]:
    trainer = trainer_of(run, *more, dataset=dataset)
    if trainer.resume is None:
        torch.rand(3)  # as module dropout would
    trainer.train(lambda: False)
    return outcome(trainer)


def loaded(*more: str | Path, dataset: Any = None) -> Any:
    """A trainer that took no step, or what the user is told."""
    try:
        return outcome(trainer_of(None, *more, dataset=dataset))
    except UserError as error:
        return str(error)


AVERAGED = ("--ema-decay", "0.9")
SWITCHES: dict[str, tuple[str, ...]] = {
    "--load": (),
    "--load --exit-on-missing-checkpoint --ckpt-format torch_dcp": (
        "--exit-on-missing-checkpoint", "--ckpt-format", "torch_dcp",
    ),
    "--no-load-optim": ("--no-load-optim",),
    "--no-load-rng": ("--no-load-rng",),
    "--finetune": ("--finetune",),
    "changed": ("--weight-decay", "0.5"),
    "--accept-changes": ("--weight-decay", "0.5", "--accept-changes"),
    "other seed": ("--seed", "8", "--accept-changes"),
}  # fmt: skip


def all_cases(folder: Path) -> dict[str, Any]:
    """What each switch makes of one run, and of one that was saved without optimizer and generators."""
    full, bare = folder / "full", folder / "bare"
    short = ("--train-iters", "1")
    found: dict[str, Any] = {
        "saved": trained(full, *AVERAGED, *short),
        "start": loaded(*AVERAGED),
        "bare": trained(bare, *short, "--no-save-optim", "--no-save-rng"),
        "bare: --load": loaded("--load", bare),
        "bare: --no-load-optim": loaded("--load", bare, "--no-load-optim"),
        "no averages": loaded("--load", full),
        "new averages": loaded("--load", bare, "--no-load-optim", *AVERAGED, "--accept-changes"),
    }
    return found | {name: loaded("--load", full, *AVERAGED, *more) for name, more in SWITCHES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("switches")
    found = run_ranks(all_cases, 1, folder, timeout=100)[0]
    found["files"] = {path.name for path in (folder / "bare/checkpoints/iter_0000001").iterdir()}
    found["state"] = json.loads((folder / "full/checkpoints/iter_0000001/state.json").read_text())
    return found


@pytest.mark.parametrize(
    ("switch", "moments", "generator", "step"),
    [
        ("--load", "saved", "saved", 1),
        ("--load --exit-on-missing-checkpoint --ckpt-format torch_dcp", "saved", "saved", 1),
        ("--no-load-optim", "start", "saved", 1),
        ("--no-load-rng", "saved", "start", 1),
        ("--finetune", "start", "start", 0),
        ("--accept-changes", "saved", "saved", 1),
    ],
)
def test_the_older_switches_mean_what_they_meant(cases, switch, moments, generator, step):
    """Weights always come from the checkpoint; the rest from it (`saved`), or as in a run that starts."""
    found = cases[switch]
    assert found["weights"] == cases["saved"]["weights"] != cases["start"]["weights"]
    assert found["moments"] == (cases["saved"]["moments"] if moments == "saved" else {})
    assert found["generator"] == cases[generator]["generator"]
    assert (found["step"], found["consumed"]) == (step, 2 * step)
    averages = cases["saved"]["averages"] if step else cases["saved"]["weights"]
    assert found["averages"] == {name: averages[name] for name in found["averages"]} != {}
    assert cases["saved"]["averages"] != found["weights"]


def test_what_was_not_saved_is_not_loaded(cases):
    assert not any(name.startswith("rng-") for name in cases["files"])
    assert "resume with --no-load-optim" in cases["bare: --load"]
    found = cases["bare: --no-load-optim"]
    assert found["weights"] == cases["bare"]["weights"]
    assert found["moments"] == {}
    assert found["generator"] not in (cases["bare"]["generator"], cases["start"]["generator"])
    new = cases["new averages"]["averages"]
    assert new == {name: cases["bare"]["weights"][name] for name in new}


def test_a_job_that_changed_is_shown_and_needs_a_word(cases):
    assert "  --weight-decay: 0.01 → 0.5\n" in cases["changed"]
    assert "--accept-changes" in cases["changed"]
    assert "  --ema-decay: 0.9 → null\n" in cases["no averages"]
    assert "use --seed 7" in cases["other seed"], "which nothing can accept"


def test_a_checkpoint_tells_its_job(cases):
    state = cases["state"]["state"]
    assert cases["state"]["modules"] == ["predictor", "ema.predictor"]
    assert state["ema"] == {"decay": 0.9}
    assert state["versions"]["torch"] == torch.__version__
    assert state["plugins"]["mmzoo-plugin-wan22"]
    assert state["fingerprint"]["components"]["predictor"]["id"] == "wandit"
    assert state["schedule"]["peak"] == 1e-3
    assert state["config"]["values"]["flags"]["ema_decay"] == 0.9
    assert {"origins", "overwrites", "sharding"} <= state["config"].keys()


class Stream(IterableDataset):
    """The tiny job's clips as a stream, each a few times an epoch."""

    def __init__(self, clips: Any) -> None:
        self.clips, self.next = clips, 0
        self.collate_fn = getattr(clips, "collate_fn", collate)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.next = self.next, 0
        for number in range(start, 5):
            self.next = number + 1
            yield self.clips.get(number % len(self.clips), number)
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def stream() -> Stream:
    os.chdir(ROOT)
    flags = [
        "--mm-model",
        str(TINY / "model.json"),
        "--mm-data",
        str(TINY / "data.json"),
        "--lr",
        "1",
        "--train-iters",
        "1",
    ]
    return Stream(build_dataset(load_training_job(parse_train_flags(flags)).components["dataset"], 7))


def streamed(run: Path) -> dict[str, Any]:
    """A run of two steps, its second one again from the first's checkpoint; then a load that cannot be."""
    flags = (*AVERAGED, "--num-workers", "1", "--train-iters", "2")
    first = run / "checkpoints/iter_0000001"
    return {
        "whole": trained(run, *flags, "--save-interval", "1", dataset=stream()),
        "again": trained(None, *flags, "--load", first, dataset=stream()),
        "workers": loaded("--load", first, *AVERAGED, dataset=stream()),
    }


def test_all_ranks_go_on_from_one_checkpoint(tmp_path):
    """Though another run saves into the folder, and one rank sees a newer one than the other."""
    early, late = tmp_path / "early", tmp_path / "late"

    def save() -> None:
        for step in (1, 2):
            state = {"step": step, "consumed_samples": 2 * step, "seed": 7}
            save_checkpoint(late, step, {"predictor": torch.nn.Linear(2, 2)}, None, state)
        shutil.copytree(late, early)
        shutil.rmtree(early / "checkpoints/iter_0000002")

    def chosen() -> str:
        os.chdir(ROOT)
        flags = parse_train_flags([
            "--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"), "--lr", "1", "--train-iters", "4",
            "--seed", "7", "--load", str(late if dist.get_rank() else early),
        ])  # fmt: skip
        found = find_resume(load_training_job(flags), range(4))
        assert found is not None
        return f"{found.checkpoint.name} of step {found.step}"

    run_ranks(save, 1)
    assert run_ranks(chosen, 2) == ["iter_0000001 of step 1"] * 2


@pytest.mark.slow
def test_a_stream_and_averages_on_two_ranks_go_on_exactly(tmp_path):
    """Averages are sharded like the weights, workers of each rank read their own part."""
    for found in run_ranks(streamed, 2, tmp_path, timeout=100):
        assert found["again"] == found["whole"]
        assert found["whole"]["averages"] != found["whole"]["weights"]
        assert "--num-workers was 1, and is 0 now" in found["workers"]

    def alone() -> Any:
        sizes = (*AVERAGED, "--num-workers", "1", "--load", str(tmp_path))
        return loaded(*sizes, dataset=stream()), loaded(*sizes, "--accept-changes", dataset=stream())

    refused, accepted = run_ranks(alone, 1, timeout=100)[0]
    assert "2 ranks read it before, and 1 would now" in refused
    assert "--accept-changes" in refused
    for kind in ("weights", "moments", "averages"):
        assert accepted[kind] == found["whole"][kind], "sharded over two ranks before"
