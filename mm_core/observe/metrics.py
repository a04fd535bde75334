"""Step records for machines: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_registry.errors import UserError


class MetricsFile(BaseCallback):
    """Appends one JSON object a step; each line is flushed, so that a killed run keeps what it reported.

    A metric that is NaN or infinite becomes `null`: JSON has no word for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_train_start(self, context: RunContext) -> None:
        if context.is_main:
            self._file = self.path.open("a", encoding="utf-8")

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if self._file is not None:
            numbers = {name: value if math.isfinite(value) else None for name, value in record.flat().items()}
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()

    def on_train_end(self, context: RunContext) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard(BaseCallback):
    """The same numbers as scalars, for `tensorboard --logdir`; records after the first step of a resumed run are purged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_train_start(self, context: RunContext) -> None:
        if context.is_main:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(self.folder), purge_step=context.first_step + 1)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: TensorBoard's files cannot be written there ({error.strerror}); "
                    "name another folder with --tensorboard-dir."
                ) from error

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if self._writer is not None:
            for name, value in record.flat().items():
                if name != "step":
                    # Numbers of the validation set lie beside those of training, under the same name.
                    group, shown = "train", name
                    if name.startswith("val_"):
                        group, shown = "validation", name.removeprefix("val_")
                    self._writer.add_scalar(f"{group}/{shown}", value, record.step)

    def on_train_end(self, context: RunContext) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
