"""Randomness keyed by what it is for, not by who draws it.

Noise, timesteps, frame choice and initial weights are drawn from generators keyed by (seed, purpose, index),
where the index is that of the consumed sample. They are therefore the same on one rank or sixty-four, for any
micro batch size, and after a resume.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def keyed_global_generators(seed: int, purpose: str, *index: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global CPU generators for one purpose and index; afterwards they are as before."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    key = keyed_seed(seed, purpose, *index)
    try:
        random.seed(key)
        np.random.seed(key % 2**32)
        # Not torch.manual_seed, which seeds the devices as well.
        torch.default_generator.manual_seed(key)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
