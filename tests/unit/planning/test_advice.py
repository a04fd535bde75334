"""What is advised, with plans that are made up: the smaller settings take less memory and more time."""

from __future__ import annotations

from mm_core.config import TrainingJob
from mm_core.config.planned_job import load_planned_job
from mm_core.planning.advice import advise
from mm_core.planning.model import MemoryEvent, PlanResult, RankBytes, StepTime, Timeline
from mm_registry.errors import UserError
from tests.unit.planning.made import costs, plan

TINY = "examples/tiny/wan22-t2v"
LIMIT = 1000


def job(*more: str) -> TrainingJob:
    return load_planned_job(["--mm-model", f"{TINY}/model.json", "--mm-data", f"{TINY}/data.json", *more], 4)


def planned(given: TrainingJob) -> PlanResult:
    """Recomputation, offload and context parallelism each save a part of 2000 bytes, and take time."""
    fsdp2, size = given.fsdp2, given.flags.context_parallel_size
    peak, seconds = 2000.0, 1.0
    if fsdp2.recompute_granularity is not None:
        peak, seconds = peak * 0.7, seconds + 0.2
    if fsdp2.offload_to_cpu:
        peak, seconds = peak * 0.6, seconds + 2
    if size > 1:
        peak, seconds = peak * 0.8, seconds + 0.1
    if size > 2:
        raise UserError("three heads cannot be dealt to four ranks.")
    made = plan(
        offload_to_cpu=fsdp2.offload_to_cpu,
        recompute=("blocks.0", "blocks.1") if fsdp2.recompute_granularity else (),
        recompute_granularity=fsdp2.recompute_granularity or "full",
    )
    timeline = Timeline((MemoryEvent("forward", "", RankBytes(activations=int(peak))),))
    one = costs(made, timeline=timeline)
    return PlanResult(one, 4, {}, "test", LIMIT, (), StepTime(matmul=seconds), peak <= LIMIT)


def test_changes_are_made_on_top_of_each_other() -> None:
    """None is enough by itself; the cheapest for each byte is kept."""
    given = job()
    advice = advise(given, planned(given), planned)
    fitting = [one for one in advice if one.fits]
    assert advice[: len(fitting)] == tuple(fitting)
    assert fitting[0].seconds == min(one.seconds for one in fitting if one.seconds is not None)
    assert all(one.peak_bytes <= LIMIT for one in fitting)
    assert any(one.change.startswith("--context-parallel-size 2 --global-batch-size 4; ") for one in fitting)
    assert not any("--context-parallel-size 4" in one.change for one in advice)  # not possible
    alone = [one for one in advice if ";" not in one.change]
    assert {one.change.split(" in ")[0] for one in alone} >= {
        "recompute_granularity: full", "offload_to_cpu: true", "--context-parallel-size 2 --global-batch-size 4",
    }  # fmt: skip


def test_nothing_to_change() -> None:
    """A job that fits, and that nothing makes faster, gets no advice."""
    given = job()
    fits = PlanResult(
        costs(plan(reshard_after_forward=False)), 4, {}, "test", LIMIT, (), StepTime(matmul=1.0), True
    )
    assert advise(given, fits, lambda _: fits) == ()


def test_a_job_that_fits_may_be_faster() -> None:
    """Nothing recomputed takes less time here, and still fits."""
    given = job("fsdp2.recompute_granularity=full")

    def replan(other: TrainingJob) -> PlanResult:
        again = other.fsdp2.recompute_granularity is not None
        made = costs(plan(recompute=("blocks.0",) if again else ()))
        return PlanResult(made, 4, {}, "test", LIMIT, (), StepTime(matmul=1.3 if again else 1.0), True)

    (one,) = advise(given, replan(given), replan)
    assert one.change == "recompute_modules: [] in the sharding file"
    assert one.seconds == 1.0


def test_activations_may_wait_in_host_memory() -> None:
    """Where there are more blocks than stay on the device, by the pattern that the sharding file takes."""
    given = job()

    def replan(other: TrainingJob) -> PlanResult:
        moved = other.fsdp2.offload_activations
        assert moved in (None, ("predictor.blocks.{*}",))
        timeline = Timeline((MemoryEvent("forward", "", RankBytes(activations=900 if moved else 2000)),))
        one = costs(plan(4, offload_activations=moved or ()), timeline=timeline)
        return PlanResult(one, 4, {}, "test", LIMIT, (), StepTime(matmul=1.0), bool(moved))

    (only,) = advise(given, replan(given), replan)
    assert only.fits
    assert only.change == "offload_activations: ['predictor.blocks.{*}'] in the sharding file"
