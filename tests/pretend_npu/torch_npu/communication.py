"""The backend `hccl`: gloo underneath, less what HCCL lacks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pretend_npu_library as library
import torch.distributed as dist


def _hccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return library.hccl(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def register() -> None:
    dist.Backend.register_backend("hccl", _hccl, devices=["npu"])
