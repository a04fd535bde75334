"""One line a step as Megatron-LM prints it, for launch scripts that cut step times out of their log."""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from typing import TextIO

from mm_core.config.environment import read
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord

log = logging.getLogger(__name__)


class StepLog(BaseCallback):
    """Writes a line every `--log-interval` steps to the standard output of rank 0, if torchrun started it and the
    output is no terminal: `torchrun … | tee train.log`, then `awk` over `elapsed time per iteration`.

    Args:
        global_batch_size: samples of one optimizer step.
        stream: where to write instead, whoever started the run.
    """

    def __init__(self, global_batch_size: int, stream: TextIO | None = None) -> None:
        self._batch = global_batch_size
        by_torchrun = read("TORCHELASTIC_RUN_ID") is not None and read("MM_JOB") is None
        wanted = by_torchrun and not sys.stdout.isatty()
        self._stream = stream if stream is not None else sys.stdout if wanted else None
        self._seconds: list[float] = []  # of the steps since the last line

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if self._stream is None or not context.is_main:
            return
        self._seconds.append(record.seconds)
        if record.step % context.log_interval:
            return
        try:
            self._stream.write(self._line(context, record))
            self._stream.flush()
        except OSError as error:  # its reader went away, or the disk is full: no reason to stop training
            log.warning("step times are not written to the standard output any more: %s", error)
            self._stream = None
        self._seconds.clear()

    def _line(self, context: RunContext, record: StepRecord) -> str:
        # Scripts count colons: two in the time, and the step time is the fifth field.
        milliseconds = 1000 * sum(self._seconds) / len(self._seconds)
        tokens = record.tokens_per_second / record.samples_per_second if record.samples_per_second else 0.0
        parts = [
            f"[{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {record.step:8d}/{context.last_step:8d}",
            f"consumed samples: {record.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {milliseconds:.1f}",
            f"learning rate: {record.lr:.6E}",
            f"global batch size: {self._batch:5d}",
            f"loss: {record.loss:.6E}",
            f"grad norm: {record.grad_norm:.3f}",
            f"tokens per sample: {tokens:.1f}",
        ]
        return f" {' | '.join(parts)} |\n"
