"""A predictor in training: recompute, two ranks, and a resumed run compute what one plain process computes.

Ranks are forked from the kit's worker, over gloo on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds, sharded
    from mm_core.testing.case import Case
else:
    torch = LazyModule("torch")
    builds, sharded = LazyModule("mm_core.testing.builds"), LazyModule("mm_core.testing.sharded")

PREDICTOR = ("predictor",)
TRAINED = ("predictor", "transformers_model")
Losses = tuple[list[float], dict[str, Any]]


def _one_process(case: Case) -> Any:
    def compute() -> Any:
        return sharded.on_ranks(1, lambda: sharded.loss_and_gradients(case))[0]

    return case.plugin.once(f"one process {case.subject}", compute)


@check("with recompute the losses and gradients are the same", stage="ranks", roles=TRAINED)
def recompute_is_exact(case: Case) -> None:
    def compare() -> tuple[float, float, int]:
        plain = sharded.build(case, recompute=())
        modules = sharded.recomputed_modules(case)
        if not modules:
            return 0.0, 0.0, 0
        again = sharded.build(case, recompute=modules)
        losses, gradients = [], []
        for model in (plain, again):
            sharded.excite(model.predictor)
            torch.manual_seed(0)  # for dropout
            loss = builds.forward_loss(case, model.predictor.train(), builds.inputs(case))
            loss.backward()
            losses.append(loss.item())
            gradients.append(sharded.whole_gradients(model))
        return abs(losses[0] - losses[1]), sharded.gradient_distance(*gradients), len(modules)

    loss, gradient, count = sharded.on_ranks(1, compare)[0]
    if not count:
        raise CheckSkipped("the policy names no module to recompute, and there are no units")
    if loss > 0 or gradient > 1e-6:
        raise CheckFailed(
            f"recomputing {count} modules changes the loss by {loss:.2g} and gradients by {gradient:.2g} of the largest; "
            "something in them is not the same when it runs a second time"
        )


@check("two ranks with FSDP2 give the loss and gradients of one process", stage="ranks", roles=TRAINED)
def two_ranks_equal_one(case: Case) -> None:
    reference = _one_process(case)
    found = sharded.on_ranks(2, lambda: sharded.loss_and_gradients(case))[0]
    sharded.must_agree(found, reference, 1e-4, "two ranks with FSDP2")


@check(
    "two ranks that share each sequence give the loss and gradients of one process",
    stage="ranks",
    roles=PREDICTOR,
)
def shared_sequences_equal_one(case: Case) -> None:
    from mm_core.config.parallel import ParallelSizes

    policy = builds.sharding_policy(case)
    if policy is None or policy.context is None:
        raise CheckSkipped("the policy does not say where sequences are split (context)")
    reference = _one_process(case)
    sizes = ParallelSizes(cp=2, cp_algo="ring")  # which any number of heads goes with
    found = sharded.on_ranks(2, lambda: sharded.loss_and_gradients(case, parallel=sizes))[0]
    sharded.must_agree(found, reference, 1e-4, "two ranks that share each sequence (context)")


@check("bf16 mixed precision on two ranks stays near fp32, with fp32 gradients", stage="ranks", roles=TRAINED)
def mixed_precision_works(case: Case) -> None:
    reference = _one_process(case)
    found = sharded.on_ranks(
        2, lambda: sharded.loss_and_gradients(case, param_dtype="bf16", reduce_dtype="fp32")
    )[0]
    sharded.must_agree(found, reference, 0.2, "bf16 mixed precision (param_dtype of fsdp2.yaml)")


@check("first values are the same on one rank and on two", stage="ranks", roles=TRAINED)
def first_values_do_not_depend_on_ranks(case: Case) -> None:
    one = sharded.on_ranks(1, lambda: sharded.whole_parameters(sharded.build(case)))[0]
    two = sharded.on_ranks(2, lambda: sharded.whole_parameters(sharded.build(case)))[0]
    different = [name for name, value in one.items() if not (value == two[name]).all()]
    if different:
        raise CheckFailed(
            f"{len(different)} parameters start from other values on two ranks: {', '.join(different[:3])}; draw them from "
            "torch's global generator alone, for each module by itself"
        )


@check("a run that is saved and resumed goes on bit by bit as one that was not", stage="ranks", roles=TRAINED)
def resume_is_bit_equal(case: Case) -> None:
    """In two processes of one rank each: what is in a checkpoint does not depend on the number of ranks."""
    from mm_core.weights import load_checkpoint, resolve_load, save_checkpoint

    state = {"step": 2, "consumed_samples": 4, "seed": 0, "plugins": {}}

    def straight(run: Path) -> Losses:
        torch.manual_seed(0)
        model = sharded.build(case)
        optimizer = sharded.optimizer_of(model)
        sharded.train(case, model, optimizer, 0, 2)
        save_checkpoint(run, 2, {"predictor": model.predictor}, optimizer, state)
        losses = sharded.train(case, model, optimizer, 2, 4)
        return losses, sharded.whole_parameters(model)

    def resumed(run: Path) -> Losses:
        torch.manual_seed(77)
        model = sharded.build(case, seed=9)
        optimizer = sharded.optimizer_of(model)
        load_checkpoint(resolve_load(run), {"predictor": model.predictor}, optimizer)
        losses = sharded.train(case, model, optimizer, 2, 4)
        return losses, sharded.whole_parameters(model)

    with TemporaryDirectory(prefix="mm-kit-") as folder:
        run = Path(folder)
        losses, expected = sharded.on_ranks(1, straight, run)[0]
        found_losses, found = sharded.on_ranks(1, resumed, run)[0]
    if losses != found_losses:
        raise CheckFailed(
            f"after a resume the losses are {found_losses} instead of {losses}; a value is in no checkpoint"
        )
    different = [name for name, value in expected.items() if not (value == found[name]).all()]
    if different:
        raise CheckFailed(
            f"after a resume and two steps {len(different)} parameters differ: {', '.join(different[:3])}"
        )
