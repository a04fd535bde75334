"""A step whose loss or gradient is not finite ends the run; what each rank was given in it is kept for a look.

<run>/non-finite/step-0000123/rank-00000.json           samples, their losses, what of the tensors is not finite
<run>/non-finite/step-0000123/rank-00000.safetensors    the micro batches: micro-000.video, micro-000.prompt_ids, …
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.training.run_folder import write_json
from mm_core.training.step import NonFiniteLossError, StepReport
from mm_core.weights.agreement import everywhere
from mm_core.weights.layout import let_others_read
from mm_core.weights.tensors import local_part

if TYPE_CHECKING:
    from mm_core.data.collate import Batch

log = logging.getLogger(__name__)

FOLDER = "non-finite"
#: Bytes of tensors that a rank writes; what is left out is named.
LIMIT = 4 * 2**30
_NAMED = 20  # parameters


@contextmanager
def bad_batch_kept(
    run: Path | None,
    rank: int,
    modules: Mapping[str, nn.Module],
    read_again: Callable[[StepReport], Iterator[Batch]],
) -> Iterator[None]:
    """Inside, a `NonFiniteLossError` leaves the micro batches of its step in the run's folder. All ranks enter this; the
    error is raised on all of them, and each writes what it was given.

    Args:
        run: the run's folder; None where nothing is saved.
        rank: of this process.
        modules: name of component -> what is trained of it.
        read_again: from a step's report to its micro batches on this rank.

    Raises:
        NonFiniteLossError: the same, saying where the batch is.
    """
    try:
        yield
    except NonFiniteLossError as error:
        report = error.report
        if run is None or report is None:
            raise
        # All have looked before one of them writes.
        folder = run / FOLDER / everywhere(_free_name(run / FOLDER, f"step-{report.step:07d}"))[0]
        kept = True
        try:
            keep_batch(folder, rank, report, read_again(report), modules)
        # The run ends anyway, and by the error that matters: the loss is not finite.
        except Exception:
            kept = False
            log.exception("the micro batches of step %d cannot be kept in %s", report.step, folder)
        # The first rank that ends takes the others with it: it waits until all of them have written.
        if not all(everywhere(kept)):
            raise
        raise NonFiniteLossError(f"{error} What each rank was given is in {folder}.", report) from None


def keep_batch(
    folder: Path,
    rank: int,
    report: StepReport,
    batches: Iterable[Batch],
    modules: Mapping[str, nn.Module],
    limit: int = LIMIT,
) -> None:
    """Write the micro batches of a rank. If the losses of some are not finite, the tensors of these alone.

    Args:
        folder: of the step.
        report: of it; `losses` are those of this rank.
        batches: of this rank, in order.
        modules: as `bad_batch_kept`.
        limit: bytes of tensors that are written.

    Raises:
        OSError, SafetensorError: the files cannot be written.
    """
    from safetensors.torch import save_file  # only where a run ends

    folder.mkdir(parents=True, exist_ok=True)
    losses = [[part.tolist() for part in parts] for parts in report.losses]
    wrong = [not torch.tensor(sums).isfinite().all() for sums, _ in losses]
    chosen: dict[str, torch.Tensor] = {}
    told, size = [], 0
    for number, batch in enumerate(batches):
        tensors = dict(_tensors(batch))
        entry: dict[str, Any] = {"samples": batch["sample_index"].tolist()}
        if number < len(losses):
            entry |= {"losses": list(map(_number, losses[number][0])), "weights": losses[number][1]}
        entry |= {key: value for key, value in batch.items() if _is_plain(value)}
        entry["tensors"] = {name: _described(tensor) for name, tensor in tensors.items()}
        entry["written"] = wrong[number] if any(wrong) and number < len(wrong) else True
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if entry["written"] and size + needed > limit:
            entry["written"] = False
        if entry["written"]:
            size += needed
            chosen |= {f"micro-{number:03d}.{name}": t.contiguous().cpu() for name, t in tensors.items()}
        told.append(entry)
    totals = report.sums.totals()
    record = {
        "step": report.step,
        "loss": _number(totals.loss / totals.weight if totals.weight else float("nan")),
        "grad_norm": _number(float(report.norm)),
        "learning_rate": report.rate,
        "micro_batches": told,
        "parameters_not_finite": _not_finite(modules, lambda parameter: parameter),
        "gradients_not_finite": _not_finite(modules, lambda parameter: parameter.grad),
    }
    if chosen:
        file = folder / f"rank-{rank:05d}.safetensors"
        # Tensors that share storage are written each for itself.
        temporary = file.with_name(f".tmp-{file.name}")
        save_file({name: tensor.clone() for name, tensor in chosen.items()}, temporary)
        let_others_read(temporary)
        temporary.replace(file)
    write_json(folder / f"rank-{rank:05d}.json", record)


def _free_name(folder: Path, name: str) -> str:
    """`name`, or `name-1`, … where an earlier attempt at the step left its own."""
    return next(
        n
        for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(1)))
        if not (folder / n).exists()
    )


def _tensors(batch: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch by name, those of lists by number."""
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            yield key, value
        elif isinstance(value, list | tuple):
            yield from ((f"{key}.{i}", one) for i, one in enumerate(value) if isinstance(one, torch.Tensor))


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it: names of files, captions."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    about: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.is_floating_point() and tensor.numel():
        about |= {"finite": bool(tensor.isfinite().all())}
        about |= {"min": _number(float(tensor.min())), "max": _number(float(tensor.max()))}
    return about


def _not_finite(
    modules: Mapping[str, nn.Module], of: Callable[[nn.Parameter], torch.Tensor | None]
) -> Sequence[str]:
    """Names of the first parameters of which this rank's part, or that of the gradient, is not finite."""
    names: list[str] = []
    for component, module in modules.items():
        for name, parameter in module.named_parameters():
            tensor = of(parameter)
            if (
                tensor is not None
                and len(names) < _NAMED
                and not local_part(tensor.detach())[0].isfinite().all()
            ):
                names.append(f"{component}.{name}")
    return names


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if value - value == 0 else str(value)
