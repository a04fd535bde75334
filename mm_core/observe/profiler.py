"""`tools.json`'s static profile: `torch.profiler` on chosen ranks and steps."""

from __future__ import annotations

import logging
from typing import Any

from mm_core.config import ToolsConfig
from mm_core.config.document import expanded
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


class StaticProfile(BaseCallback):
    """Records the steps `start_step <= step < end_step` (counted from 1) and writes one Chrome trace a rank.

    The fields are those of `profile.static_param`; a trace opens in https://ui.perfetto.dev or TensorBoard. A run that resumes
    within the window records the rest of it.
    """

    def __init__(self, tools: ToolsConfig) -> None:
        self.profile = tools.profile
        self._folder = expanded(self.profile.static_param.save_path)
        self._profiler: Any = None
        self._first = 0  # recorded step
        self._last = 0

    def _wanted(self, rank: int) -> bool:
        return rank in self.profile.ranks or -1 in self.profile.ranks

    def on_train_start(self, context: RunContext) -> None:
        if not self._wanted(context.rank):
            return
        try:  # now, and not after the steps were taken
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"profile.static_param.save_path: {self._folder} cannot be made ({error.strerror}); name another folder."
            ) from error
        if not self._activities():
            raise UserError(
                "profile.static_param.with_cpu is false, and there is no accelerator here whose activity could be recorded."
            )

    def _activities(self) -> set[Any]:
        from torch.profiler import ProfilerActivity, supported_activities

        activities = set(supported_activities())
        return activities if self.profile.static_param.with_cpu else activities - {ProfilerActivity.CPU}

    def on_step_start(self, context: RunContext, step: int) -> None:
        settings = self.profile.static_param
        in_window = settings.start_step <= step < settings.end_step
        if self._profiler is not None or not in_window or not self._wanted(context.rank):
            return
        from torch.profiler import profile

        self._profiler = profile(
            activities=self._activities(),
            record_shapes=settings.record_shapes,
            profile_memory=settings.with_memory,
            with_stack=settings.with_stack,
        )
        self._profiler.start()
        self._first = step

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        self._last = record.step
        if self._profiler is not None and record.step + 1 >= self.profile.static_param.end_step:
            self._write(context)

    def on_train_end(self, context: RunContext) -> None:
        if self._profiler is not None:
            self._write(context)
        elif self._wanted(context.rank) and not self._first:
            settings = self.profile.static_param
            log.warning(
                "nothing was profiled on rank %d: profile.static_param asks for steps %d to %d, this run took %s",
                context.rank,
                settings.start_step,
                settings.end_step - 1,
                f"steps {context.first_step + 1} to {self._last}" if self._last else "none",
            )

    def _write(self, context: RunContext) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._folder / f"rank-{context.rank:05d}.steps-{self._first}-{self._last + 1}.pt.trace.json"
        profiler.export_chrome_trace(str(path))
        log.info("profile of rank %d written to %s", context.rank, path)
