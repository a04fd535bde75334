"""Book-keeping of samples that cannot be read: each is reported once, and too many are an error."""

from __future__ import annotations

import logging

import torch

from mm_core.data.errors import DataError, UnreadableSampleError

logger = logging.getLogger(__name__)

_SHOWN = 3


class BadSamples:
    """Which samples of a set this rank found unreadable; its loader workers share the account.

    Args:
        size: samples in the set.
        limit: how many may be unreadable before it is an error: a number (int), or a share of the set
            (float), which allows at least one unless it is 0.
        what: the set, for messages.
    """

    def __init__(self, size: int, limit: int | float, what: str) -> None:
        self.size = size
        self.what = what
        share = max(1, int(limit * size)) if limit else 0
        self.limit = limit if isinstance(limit, int) else share
        # Shared memory: a fork or a spawned worker sees and sets the same bytes.
        self._bad = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self._reasons: list[str] = []

    def __contains__(self, index: int) -> bool:
        return bool(self._bad[index])

    @property
    def count(self) -> int:
        """Distinct unreadable samples found so far."""
        return int(self._bad.sum())

    def add(self, index: int, error: UnreadableSampleError) -> None:
        """Report a sample, once, with its path and the reason.

        Raises:
            DataError: there are now more than the limit, or none is left.
        """
        if index in self:
            return
        self._bad[index] = 1
        self._reasons.append(str(error))
        count = self.count
        if count >= self.size:
            raise DataError(
                f"{self.what}: none of its {self.size} samples can be read: {self._examples()}"
            ) from error
        if count > self.limit:
            raise DataError(
                f"{self.what}: {count} of {self.size} samples cannot be read, more than max_bad_samples "
                f"({self.limit}): {self._examples()}"
            ) from error
        logger.warning(
            "unreadable sample, another takes its place (%d of at most %d): %s", count, self.limit, error
        )

    def _examples(self) -> str:
        more = len(self._reasons) - _SHOWN
        return "; ".join(self._reasons[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
