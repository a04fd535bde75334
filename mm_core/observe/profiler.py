"""`tools.json`'s static profile: `torch.profiler` on chosen ranks and steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mm_core.config import ToolsConfig
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord

log = logging.getLogger(__name__)


class StaticProfile(BaseCallback):
    """Records the steps `start_step <= step < end_step` (counted from 1) and writes one Chrome trace a rank.

    The fields are those of `profile.static_param`; a trace opens in https://ui.perfetto.dev or TensorBoard.
    """

    def __init__(self, tools: ToolsConfig) -> None:
        self.profile = tools.profile
        self._profiler: Any = None

    def _wanted(self, rank: int) -> bool:
        return rank in self.profile.ranks or -1 in self.profile.ranks

    def on_step_start(self, context: RunContext, step: int) -> None:
        settings = self.profile.static_param
        if step != settings.start_step or not self._wanted(context.rank):
            return
        from torch.profiler import ProfilerActivity, profile, supported_activities

        activities = set(supported_activities())
        if not settings.with_cpu:
            activities.discard(ProfilerActivity.CPU)
        self._profiler = profile(
            activities=activities,
            record_shapes=settings.record_shapes,
            profile_memory=settings.with_memory,
            with_stack=settings.with_stack,
        )
        self._profiler.start()

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if self._profiler is not None and record.step + 1 >= self.profile.static_param.end_step:
            self._write(context)

    def on_train_end(self, context: RunContext) -> None:
        if self._profiler is not None:
            self._write(context)
        elif self._wanted(context.rank) and context.last_step < self.profile.static_param.start_step:
            log.warning(
                "profile.static_param.start_step %d lies after the last step %d: nothing was profiled",
                self.profile.static_param.start_step,
                context.last_step,
            )

    def _write(self, context: RunContext) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(self.profile.static_param.save_path)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.profile.static_param
        path = folder / f"rank-{context.rank:05d}.steps-{settings.start_step}-{settings.end_step}.pt.trace.json"
        profiler.export_chrome_trace(str(path))
        log.info("profile of rank %d written to %s", context.rank, path)
