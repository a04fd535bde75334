"""Randomness keyed by what it is for, not by who draws it.

Noise, timesteps, frame choice and initial weights are drawn from generators keyed by (seed, purpose, index),
where the index is that of the consumed sample. They are therefore the same on one rank or sixty-four, for any
micro batch size, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, purpose: str, *index: int) -> int:
    """A 64-bit seed that depends on every argument; `purpose` keeps streams of different uses apart."""
    key = "\x1f".join([str(int(seed)), purpose, *(str(int(i)) for i in index)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def keyed_generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU `torch.Generator` for one purpose and index.

    Torch's Mersenne twister keeps 32 bits of the seed.
    """
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *index))


def keyed_normal(seed: int, purpose: str, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise `[len(indices), *shape]` in fp32 on the CPU, one stream for each index.

    The generator is the counter-based Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3", SC 2011): the key is (seed, purpose), the counter's high words are the index, so two samples can never
    share a stretch of the stream.
    """
    import numpy as np
    import torch

    key = keyed_seed(seed, purpose)
    rows = np.empty((len(indices), *shape), dtype=np.float32)
    for position, index in enumerate(indices):
        bits = np.random.Philox(key=[key, 0], counter=[0, 0, int(index), 0])
        np.random.Generator(bits).standard_normal(out=rows[position, ...], dtype=np.float32)
    return torch.from_numpy(rows)
