"""Training checkpoints: exact resume, other world sizes, crashes, and files that are not to be trusted."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mm_core.config import parse_train_flags
from mm_core.training.resume import Resume
from mm_core.weights import (
    CheckpointError,
    WeightsError,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_module_weights,
    remove_temporaries,
    resolve_load,
    save_checkpoint,
)
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import SIZES, TinyWan, optimizer_of, sharded, train, whole_tensors

pytestmark = pytest.mark.timeout(120)

RUN_STATE = {"step": 1, "consumed_samples": 8, "seed": 3}


def save_run(run: Path, steps: int, *, optimizer: bool = True, with_rng: bool = True, **fsdp2: Any) -> None:
    model = sharded(**fsdp2)
    adam = optimizer_of(model)
    train(model, adam, 0, steps)
    state = {**RUN_STATE, "step": steps, "seed": 5, "note": "é"}
    save_checkpoint(
        run, steps, {"predictor": model.predictor}, adam if optimizer else None, state, with_rng=with_rng
    )


def resume_run(
    run: Path, last: int, seed: int = 9, **fsdp2: Any
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    model = sharded(seed, **fsdp2)
    adam = optimizer_of(model)
    state = load_checkpoint(resolve_load(run), {"predictor": model.predictor}, adam)
    losses = train(model, adam, state["step"], last)
    return losses, {n: t.numpy() for n, t in whole_tensors(model).items()}, state


def straight_run(last: int, **fsdp2: Any) -> tuple[list[float], dict[str, Any]]:
    model = sharded(**fsdp2)
    losses = train(model, optimizer_of(model), 0, last)
    return losses, {n: t.numpy() for n, t in whole_tensors(model).items()}


BF16 = {"param_dtype": "bf16", "recompute_modules": ("predictor.blocks.{*}",)}


@pytest.mark.parametrize(
    ("fsdp2", "world"),
    [
        pytest.param({}, 1, id="fp32-1"),
        pytest.param({}, 2, id="fp32-2"),
        pytest.param(BF16, 1, id="bf16-1"),
        pytest.param(BF16, 2, id="bf16-2", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_equal(world, fsdp2, tmp_path):
    run_ranks(save_run, world, tmp_path, 3, **fsdp2)
    expected_losses, expected = run_ranks(straight_run, world, 6, **fsdp2)[0]
    losses, weights, state = run_ranks(resume_run, world, tmp_path, 6, **fsdp2)[0]
    assert losses == expected_losses[3:]
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert state == {"step": 3, "consumed_samples": 8, "seed": 5, "note": "é", "plugins": {}}


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [(2, 1), (1, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_resume_on_another_number_of_ranks(saved_on, resumed_on, tmp_path):
    run_ranks(save_run, saved_on, tmp_path, 3)
    expected_losses, expected = run_ranks(straight_run, 1, 4)[0]

    def resume_quietly() -> Any:
        # A batch of 4 does not divide by 3 ranks: there the restored weights alone are compared.
        return resume_run(tmp_path, 4 if 4 % dist.get_world_size() == 0 else 3)

    losses, weights, _ = run_ranks(resume_quietly, resumed_on)[0]
    if losses:
        np.testing.assert_allclose(losses, expected_losses[3:], rtol=1e-5)
        for name in expected:
            np.testing.assert_allclose(weights[name], expected[name], atol=2e-5)


def test_loading_makes_optimizer_states_without_moving_parameters(tmp_path):
    def run() -> tuple[bool, bool, float]:
        model = sharded()
        adam = optimizer_of(model)
        save_checkpoint(tmp_path, 0, {"predictor": model.predictor}, adam, RUN_STATE)
        before = whole_tensors(model)
        train(model, adam, 0, 1)
        save_checkpoint(tmp_path, 1, {"predictor": model.predictor}, adam, RUN_STATE)
        moments = {
            n: s["exp_avg"].full_tensor().clone() for n, s in zip(before, adam.state.values(), strict=True)
        }
        other = sharded()
        fresh = optimizer_of(other)
        # The optimizer saved before its first step has no states: none are left behind here either.
        load_checkpoint(tmp_path / "checkpoints/iter_0000000", {"predictor": other.predictor}, fresh)
        untouched = all(
            torch.equal(a, b) for a, b in zip(before.values(), whole_tensors(other).values(), strict=True)
        )
        assert not fresh.state
        load_checkpoint(tmp_path / "checkpoints/iter_0000001", {"predictor": other.predictor}, fresh)
        same = all(
            torch.equal(m, s["exp_avg"].full_tensor())
            for m, s in zip(moments.values(), fresh.state.values(), strict=True)
        )
        return untouched, same, next(iter(fresh.state.values()))["step"].item()

    assert run_ranks(run, 2) == [(True, True, 1.0)] * 2


def test_generators_come_back_and_new_ranks_get_their_own(tmp_path):
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    def save() -> tuple[float, float, float]:
        torch.manual_seed(dist.get_rank())
        np.random.seed(dist.get_rank())
        random.seed(dist.get_rank())
        np.random.standard_normal()  # leaves half of a pair behind in the generator
        random.gauss(0, 1)
        save_checkpoint(tmp_path, 1, {"m": nn.Linear(2, 2)}, None, RUN_STATE)
        return draw()

    def load(with_rng: bool = True) -> tuple[float, float, float]:
        module = nn.Linear(2, 2)
        torch.manual_seed(77)
        load_checkpoint(resolve_load(tmp_path), {"m": module}, with_rng=with_rng)
        return draw()

    saved = run_ranks(save, 2)
    assert run_ranks(load, 2) == saved
    three = run_ranks(load, 3)
    assert three[:2] == saved
    assert three[2] not in saved
    assert run_ranks(load, 3)[2] == three[2]
    torch.manual_seed(77)
    assert run_ranks(load, 1, False)[0][0] == torch.rand(1).item()


def test_ranks_that_share_tensors_draw_alike_after_a_resume(tmp_path):
    def save() -> None:
        torch.manual_seed(dist.get_rank())
        save_checkpoint(tmp_path, 1, {"m": nn.Linear(2, 2)}, None, RUN_STATE)

    def load() -> float:
        checkpoint, module = resolve_load(tmp_path), nn.Linear(2, 2)
        flags = parse_train_flags(
            ["--tensor-model-parallel-size", "2", "--no-load-optim", "--train-iters", "2"]
        )
        Resume(checkpoint, False, RUN_STATE, ["m"], ()).restore(
            {"m": module}, torch.optim.AdamW(module.parameters()), None, flags
        )
        return torch.rand(1).item()

    run_ranks(save, 2)
    first, second, third, fourth = run_ranks(load, 4)
    assert first == second != third == fourth


def test_a_training_checkpoint_loads_into_a_plain_module(tmp_path):
    def save() -> dict[str, Any]:
        model = sharded(recompute_modules=("predictor.blocks.{*}",))
        save_checkpoint(tmp_path, 7, {"predictor": model.predictor}, None, RUN_STATE)
        return {n: t.numpy() for n, t in whole_tensors(model).items()}

    expected = run_ranks(save, 2)[0]
    module = TinyWan(**SIZES).bfloat16()
    load_module_weights(module, resolve_load(tmp_path))
    for name, value in module.state_dict().items():
        assert torch.equal(value, torch.from_numpy(expected[name]).bfloat16()), name


def test_a_crash_in_the_middle_of_a_save_leaves_the_older_checkpoint(tmp_path):
    run_ranks(save_run, 2, tmp_path, 1)

    def crash() -> None:
        from torch.distributed.checkpoint import FileSystemWriter

        original = FileSystemWriter.finish

        def finish(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            os._exit(9)  # everything is written, nothing is published

        FileSystemWriter.finish = finish
        save_run(tmp_path, 2)

    with pytest.raises(AssertionError, match="exit code 9"):
        run_ranks(crash, 2, timeout=30)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["iter_0000001"]
    assert resolve_load(tmp_path).name == "iter_0000001"
    assert (tmp_path / "checkpoints/latest").read_text() == "iter_0000001\n"
    assert remove_temporaries(tmp_path) == [".tmp-iter_0000002"]
    run_ranks(save_run, 2, tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/iter_0000002"


@pytest.mark.parametrize("where", ["data", "rng"])
def test_a_failure_on_one_rank_is_raised_on_all_and_names_it(where, tmp_path):
    run_ranks(save_run, 2, tmp_path, 1)

    def fail() -> str:
        import mm_core.weights.writing as module

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        if dist.get_rank() == 1:
            if where == "data":
                module.FileSystemWriter.write_data = full
            else:
                module._Files.write = full
        try:
            save_run(tmp_path, 2)
        except CheckpointError as error:
            return str(error)
        return "saved"

    messages = run_ranks(fail, 2)
    for message in messages:
        assert "iter_0000002" in message
        assert "rank 1: OSError: [Errno 28] No space left on device" in message
    assert resolve_load(tmp_path).name == "iter_0000001"


def test_a_complete_checkpoint_is_never_overwritten(tmp_path):
    def twice() -> str:
        save_run(tmp_path, 1)
        stamp = (tmp_path / "checkpoints/iter_0000001/.complete").read_bytes()
        try:
            save_run(tmp_path, 1)
        except WeightsError as error:
            assert (tmp_path / "checkpoints/iter_0000001/.complete").read_bytes() == stamp
            return str(error)
        return "overwritten"

    assert all("exists already and is complete" in message for message in run_ranks(twice, 2))


def test_an_optimizer_that_was_not_saved_is_asked_for_by_name(tmp_path):
    run_ranks(save_run, 1, tmp_path, 1, optimizer=False, with_rng=False)
    assert not list((tmp_path / "checkpoints/iter_0000001").glob("rng-*"))

    def load() -> str:
        model = sharded()
        with pytest.raises(WeightsError) as caught:
            load_checkpoint(resolve_load(tmp_path), {"predictor": model.predictor}, optimizer_of(model))
        load_checkpoint(resolve_load(tmp_path), {"predictor": model.predictor})
        return str(caught.value)

    assert "--no-load-optim" in run_ranks(load, 1)[0]


def test_keys_that_do_not_fit_are_all_listed(tmp_path):
    run_ranks(save_run, 1, tmp_path, 1)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wan = TinyWan(**SIZES)
            self.blocks, self.proj_out2, self.rest = wan.blocks, wan.proj_out, nn.Linear(3, 3)
            self.blocks[0].attn1.to_q = nn.Linear(48, 24)

    with pytest.raises(WeightsError) as caught:
        load_module_weights(Renamed(), resolve_load(tmp_path))
    text = str(caught.value)
    assert "missing: predictor.rest.weight" in text
    assert "unexpected: predictor.proj_out.weight (closest missing: predictor.proj_out2.weight)" in text
    assert (
        "shape: predictor.blocks.0.attn1.to_q.weight is [48, 48] in the checkpoint, [24, 48] in the model"
        in text
    )
    with pytest.raises(WeightsError, match="has no ema, only predictor"):
        load_module_weights(nn.Linear(1, 1), resolve_load(tmp_path), prefix="ema")


def test_damaged_and_unfinished_checkpoints_are_named_with_an_older_one(tmp_path):
    for step in (1, 2):
        run_ranks(save_run, 1, tmp_path, step)
    newest = tmp_path / "checkpoints/iter_0000002"
    older = "--load " + str(tmp_path / "checkpoints/iter_0000001")

    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state.replace('"iteration": 2', '"iteration": 3'))
    with pytest.raises(WeightsError, match=r"state\.json was changed") as caught:
        resolve_load(tmp_path)
    assert older in str(caught.value)
    (newest / "state.json").write_text(state)
    assert resolve_load(tmp_path) == newest

    shard = newest / "__0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(WeightsError, match=f"{len(data) - 10} bytes, {len(data)} were written"):
        resolve_load(newest)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"__0_0\.distcp is missing"):
        resolve_load(newest)

    (newest / ".complete").unlink()
    with pytest.raises(WeightsError, match="unfinished"):
        resolve_load(newest)
    assert resolve_load(tmp_path).name == "iter_0000001"
    run_ranks(save_run, 1, tmp_path, 2)  # what was never finished may be written again
    assert resolve_load(tmp_path) == newest


class Bomb:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


def _rewrite_marker(checkpoint: Path) -> None:
    """As an attacker would: make the marker agree with the changed files."""
    from mm_core.weights import layout

    (checkpoint / ".complete").unlink()
    layout.write_marker(checkpoint, 1)


def test_a_pickle_bomb_in_the_metadata_is_refused(tmp_path):
    run_ranks(save_run, 1, tmp_path, 1)
    checkpoint = resolve_load(tmp_path)
    flag = tmp_path / "executed"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(flag)))
    _rewrite_marker(checkpoint)
    with pytest.raises(WeightsError, match=r"refused: it names posix.system"):
        load_module_weights(TinyWan(**SIZES), checkpoint)
    assert not flag.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # the bomb is live
    assert flag.exists()


def test_a_pickle_bomb_among_the_tensors_is_refused(tmp_path):
    run_ranks(save_run, 1, tmp_path, 1)
    checkpoint = resolve_load(tmp_path)
    flag = tmp_path / "executed"
    size = (checkpoint / "__0_0.distcp").stat().st_size
    bomb = tmp_path / "bomb.pt"
    torch.save(Bomb(flag), bomb)
    (checkpoint / "__0_0.distcp").write_bytes(bomb.read_bytes() * (size // bomb.stat().st_size + 1))
    _rewrite_marker(checkpoint)
    with pytest.raises(WeightsError, match="is damaged: its tensors cannot be read"):
        load_module_weights(TinyWan(**SIZES), checkpoint)
    assert not flag.exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd"])
def test_metadata_that_points_outside_the_folder_is_refused(name, tmp_path):
    run_ranks(save_run, 1, tmp_path, 1)
    checkpoint = resolve_load(tmp_path)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _rewrite_marker(checkpoint)
    with pytest.raises(WeightsError, match="points outside its folder"):
        load_module_weights(TinyWan(**SIZES), checkpoint)


def test_a_checkpoint_holds_tensors_json_and_safetensors_only(tmp_path):
    run_ranks(save_run, 2, tmp_path, 1)
    checkpoint = resolve_load(tmp_path)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert names == [
        ".complete", ".metadata", "__0_0.distcp", "__1_0.distcp",
        "rng-00000.safetensors", "rng-00001.safetensors", "state.json",
    ]  # fmt: skip
    content = json.loads((checkpoint / "state.json").read_text())
    assert content["optimizer"]["groups"][0]["hyperparameters"]["betas"] == [0.9, 0.999]
    assert content["world_size"] == 2
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
