"""Checkpoints that are written while training goes on."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.training.saving import CheckpointSaver
from mm_core.weights import CheckpointError, complete_checkpoints, load_checkpoint, resolve_load
from mm_core.weights.agreement import at_rank_0, everywhere, from_rank_0
from mm_core.weights.retention import Retention
from mm_core.weights.writing import CheckpointWriter, Contents
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import optimizer_of, sharded, train, whole_tensors

pytestmark = pytest.mark.timeout(120)

STATE = {"step": 1, "consumed_samples": 1, "seed": 0}


def contents(model: Any, adam: torch.optim.Optimizer | None, step: int) -> Contents:
    return Contents(
        {"predictor": model.predictor}, adam, {"step": step, "consumed_samples": 4 * step, "seed": 0}
    )


def moments(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    averages = [state["exp_avg"] for state in adam.state.values()]
    return [a.full_tensor() if isinstance(a, DTensor) else a.clone() for a in averages]


def draws() -> float:
    return torch.rand(1).item()


@pytest.mark.parametrize("world", [1, 2])
def test_later_steps_do_not_change_what_is_written(world, tmp_path):
    def run() -> None:
        model = sharded()
        adam = optimizer_of(model)
        train(model, adam, 0, 1)
        writer = CheckpointWriter(tmp_path)
        for step in (1, 2):  # the second one into the same host memory, by the same plan
            weights, averages = whole_tensors(model), moments(adam)
            generators = torch.get_rng_state()
            prepared = writer.prepare(step, contents(model, adam, step), snapshot=True)
            drawn = draws()
            train(model, adam, step, step + 1)
            changed = whole_tensors(model)
            checkpoint = writer.write(prepared)
            torch.set_rng_state(generators)
            state = load_checkpoint(checkpoint, {"predictor": model.predictor}, adam)
            assert state["step"] == step
            assert draws() == drawn
            loaded = whole_tensors(model)
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
            assert not any(torch.equal(changed[name], weights[name]) for name in weights)
            assert all(torch.equal(a, b) for a, b in zip(averages, moments(adam), strict=True))

    run_ranks(run, world)


def test_a_run_saves_beside_its_steps_and_keeps_what_it_shall(tmp_path):
    def run() -> None:
        model = sharded()
        adam = optimizer_of(model)
        with CheckpointSaver(tmp_path, retention=Retention(last=1, every=3)) as saver:
            for step in range(1, 6):
                train(model, adam, step - 1, step)  # the optimizer's states come with the first step
                saver.save(step, contents(model, adam if step > 1 else None, step))
                saver.poll(any(everywhere(saver.failed)))
        expected, averages = whole_tensors(model), moments(adam)
        train(model, adam, 5, 6)
        load_checkpoint(resolve_load(tmp_path), {"predictor": model.predictor}, adam)
        assert all(
            torch.equal(a, b) for a, b in zip(expected.values(), whole_tensors(model).values(), strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(averages, moments(adam), strict=True))

    run_ranks(run, 2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["iter_0000003", "iter_0000005"]
    assert (tmp_path / "checkpoints/latest").read_text() == "iter_0000005\n"
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_on_every_rank_and_harms_no_older_one(asynchronous, tmp_path):
    def run() -> str:
        from torch.distributed.checkpoint import FileSystemWriter

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        model = sharded()
        message = "saved"
        saver = CheckpointSaver(tmp_path, asynchronous=asynchronous)
        saver.save(1, contents(model, None, 1))
        saver.finish()
        write = FileSystemWriter.write_data
        if dist.get_rank() == 1:
            FileSystemWriter.write_data = full  # type: ignore[method-assign]
        try:
            saver.save(2, contents(model, None, 2))
            while not any(failed := everywhere(saver.failed)):
                train(model, optimizer_of(model), 0, 1)
            saver.poll(any(failed))
        except CheckpointError as error:
            FileSystemWriter.write_data = write  # type: ignore[method-assign]
            saver.save(3, contents(model, None, 3))  # and the next one is good again
            saver.finish()
            message = str(error)
        if dist.get_rank() == 1:
            FileSystemWriter.write_data = full  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match="iter_0000004 failed on 1 of 2 ranks; rank 1"), saver:
            saver.save(4, contents(model, None, 4))  # the last of a run
        return message

    for message in run_ranks(run, 2):
        assert "iter_0000002 failed on 1 of 2 ranks; rank 1: OSError: [Errno 28] No space left" in message
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["iter_0000001", "iter_0000003"]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_failure_that_only_another_rank_knows_ends_this_one_too(tmp_path):
    def run() -> None:
        saver = CheckpointSaver(tmp_path)
        saver.poll(failed=False)
        with pytest.raises(CheckpointError, match="another rank"):
            saver.poll(failed=True)

    run_ranks(run, 1)


def test_a_run_that_fails_still_finishes_the_checkpoint_before(tmp_path):
    def run() -> None:
        model = sharded()
        try:
            with CheckpointSaver(tmp_path) as saver:
                saver.save(1, contents(model, None, 1))
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert resolve_load(tmp_path).name == "iter_0000001"

    run_ranks(run, 2)


def test_an_interrupted_run_gives_the_checkpoint_up(tmp_path):
    def run() -> bool:
        writer = CheckpointWriter(tmp_path)
        prepared = writer.prepare(1, Contents({"m": nn.Linear(2, 2)}, None, STATE), snapshot=True)
        writer.cancel()
        with pytest.raises(CheckpointError, match="the run was interrupted"):
            writer.write(prepared)
        try:
            with CheckpointSaver(tmp_path) as saver:
                saver.save(2, Contents({"m": nn.Linear(2, 2)}, None, STATE))
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return saver.writing

    assert run_ranks(run, 1) == [False]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_rank_that_dies_while_writing_leaves_the_others_free_to_end(tmp_path):
    def run() -> None:
        model = sharded()
        saver = CheckpointSaver(tmp_path)
        saver.save(1, contents(model, None, 1))
        saver.finish()
        if dist.get_rank() == 1:
            os._exit(0)  # a peer's thread waits for this rank; the harness sees whether it comes back
        saver.save(2, contents(model, None, 2))

    with pytest.raises(AssertionError, match=r"rank 1: died(.|\n)*") as caught:
        run_ranks(run, 2, timeout=30)
    assert "did not finish" not in str(caught.value)
    assert resolve_load(tmp_path).name == "iter_0000001"


def test_a_disk_that_changes_what_is_written_is_found_out(tmp_path):
    """Checksums are made of what is written, not of what is read: the marker must not bless damage."""

    def run() -> str:
        from mm_core.weights import layout

        read = layout.checksum

        def checksum(file: Path, **kwargs: Any) -> str:
            if file.suffix == ".distcp":
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
            return read(file, **kwargs)

        layout.checksum = checksum
        writer = CheckpointWriter(tmp_path)
        prepared = writer.prepare(1, Contents({"m": nn.Linear(20, 20)}, None, STATE), snapshot=True)
        try:
            writer.write(prepared)
        except CheckpointError as error:
            return str(error)
        return "saved"

    assert "does not read as it was written" in run_ranks(run, 1)[0]
    assert complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_tell_each_other_things_of_any_size(world):
    def run() -> tuple[list[str], list[str] | None, str]:
        mine = str(dist.get_rank()) * (1 + 300_000 * dist.get_rank())
        gathered = at_rank_0(mine)
        return everywhere(mine), gathered, from_rank_0(gathered)

    results = run_ranks(run, world)
    expected = [str(r) * (1 + 300_000 * r) for r in range(world)]
    assert results == [(expected, expected if r == 0 else None, expected[r]) for r in range(world)]


def test_saving_and_loading_start_no_threads_that_slow_the_training_down(tmp_path):
    """With a second OpenMP team in the process, libgomp no longer spins at barriers: see `agreement`."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Many tensors make long plans, and some are large enough to be copied by several threads.
            sizes = [40_000] * 5 + [10] * 150
            self.parts = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])

    def run() -> tuple[int, int]:
        logging.disable()
        torch.set_num_threads(2)
        module = Wide()
        adam = torch.optim.AdamW(module.parameters())
        sum(part.sum() for part in module.parts).backward()
        adam.step()
        with CheckpointSaver(tmp_path) as saver:
            before = len(os.listdir("/proc/self/task"))
            saver.save(1, Contents({"m": module}, adam, STATE))
        load_checkpoint(resolve_load(tmp_path), {"m": module}, adam)
        everywhere("x" * 1_000_000)
        return before, len(os.listdir("/proc/self/task"))

    for before, after in run_ranks(run, 2):
        assert before == after
