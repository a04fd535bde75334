"""The load of experts, in the log and in files."""

from __future__ import annotations

import json
import logging
from typing import IO

import torch
import torch.distributed as dist

from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_core.sharding.expert_load import ExpertLoad

log = logging.getLogger(__name__)
FILE = "expert_load.jsonl"
_DIGITS = 6


class ExpertLoadLog(BaseCallback):
    """Every `--log-interval` steps: how evenly tokens were dealt to experts since the last time. Does nothing for a model
    without experts.

    The step's record gets the metrics of `ExpertLoad.metrics`, so callbacks that write records come after this one. The
    share of every expert of every layer goes to `logs/expert_load.jsonl` of the run's folder, one line each time; where a
    resumed run repeats steps, the later line counts.

    Args:
        device: of the sums over ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._load: ExpertLoad | None = None
        self._file: IO[str] | None = None
        self._since = 0

    def on_train_start(self, context: RunContext) -> None:
        load = ExpertLoad(context.model)
        if not load.layers:
            return
        self._load, self._since = load, context.first_step
        if context.is_main and context.folder is not None:
            path = context.folder / "logs" / FILE
            path.parent.mkdir(exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if self._load is None or record.step % context.log_interval:
            return
        numbers = self._load.numbers(self._device)
        if context.world_size > 1:
            dist.all_reduce(numbers)
        steps, self._since = record.step - self._since, record.step
        if not context.is_main:
            return
        numbers = numbers.cpu()
        metrics = self._load.metrics(numbers)
        if not metrics:
            return
        record.extra.update(metrics)
        log.info(
            "step %d: the fullest expert has %.2f times an even load, the emptiest %.2f; entropy %.3f of 1; %d idle",
            record.step,
            *metrics.values(),
        )
        if self._file is not None:
            shares = {
                path: [round(value, _DIGITS) for value in share.tolist()]
                for path, share in self._load.shares(numbers.double()).items()
            }
            line = {"step": record.step, "steps": steps, **metrics, "shares": shares}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def on_train_end(self, context: RunContext) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
