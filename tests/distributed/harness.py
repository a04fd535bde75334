"""The multi-rank tests' harness is the conformance kit's own; see `mm_core.testing.forked`."""

from __future__ import annotations

from mm_core.testing.forked import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
