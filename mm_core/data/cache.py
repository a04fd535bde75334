"""A memory of decoded clips, for sets that are small enough to be read again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor
from torch.utils.data import get_worker_info


class ClipCache:
    """The most recently used clips, within a number of bytes.

    Each loader worker has its own; together they stay within the budget. A stored tensor is handed out as it
    is: do not write into it.

    Args:
        max_bytes: the budget; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._clips: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the clip stored under `key`, or None."""
        clip = self._clips.get(key)
        if clip is not None:
            self._clips.move_to_end(key)
        return clip

    def put(self, key: Hashable, clip: Tensor) -> None:
        """Store a clip, unless it is larger than the budget, and forget the least recently used beyond it."""
        budget = self._budget()
        if clip.nbytes > budget or key in self._clips:
            return
        self._clips[key] = clip
        self.bytes += clip.nbytes
        while self.bytes > budget:
            _, oldest = self._clips.popitem(last=False)
            self.bytes -= oldest.nbytes

    def _budget(self) -> int:
        worker = get_worker_info()
        return self.max_bytes if worker is None else self.max_bytes // worker.num_workers
