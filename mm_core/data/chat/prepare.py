"""Preparing every conversation of a set before training: how long each is, and the tokens of those without pictures."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mm_core.data.chat.conversations import Conversation
from mm_core.data.chat.files import ChatRows
from mm_core.data.chat.labels import IGNORED, ChatEncoder
from mm_core.data.chat.rows import ConversationReader
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.loader import start_worker

log = logging.getLogger(__name__)

_TOLD_AFTER = 10.0  # seconds: preparing that takes longer says how far it is


@dataclass
class Block:
    """What was found of consecutive conversations.

    Attributes:
        lengths: int32 `[N]`, tokens; 0 where a conversation cannot be used.
        turns: int32 `[N, 2]`, see `Kept`.
        sizes: int64 `[N]`, how many of the tokens below are each one's: none of those with pictures.
        ids, learnt: int32 and bool `[T]`, their tokens one after another; of no length where they are not kept.
        bad: number of a conversation -> where it stands, and why it cannot be used.
        shortened: how many do not fit whole.
    """

    lengths: np.ndarray
    turns: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    learnt: np.ndarray
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    shortened: int = 0


class ConversationSource:
    """The conversations of a set, by the number of their row."""

    def __init__(self, rows: ChatRows, reader: ConversationReader) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        """Return a conversation.

        Raises:
            UnreadableSampleError: its row is at fault, or a picture does not exist.
        """
        return self.reader(self.rows.read(index), self.rows.origin(index), self.rows.folder(index))


def prepare(
    source: ConversationSource,
    encoder: ChatEncoder,
    *,
    tokens: bool,
    at_once: int = 1000,
    num_workers: int = 0,
    what: str = "conversations",
) -> Iterator[Block]:
    """Yield what is found of all conversations, in order.

    Args:
        tokens: whether those without pictures are tokenised for good.
        at_once: conversations of a block.
        num_workers: processes; 0: this one. No more than there are cores and blocks.
        what: the set, for the log.
    """
    chunks = _Chunks(source, encoder, at_once, tokens)
    workers = min(
        num_workers,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_workers,
        len(chunks),
    )
    workers = workers if workers > 1 else 0
    loader: DataLoader[Any] = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # nothing is drawn, but torch would take a seed from the global one
        worker_init_fn=start_worker if workers else None,
    )
    started = told = time.monotonic()
    done = 0
    for block in loader:
        yield block
        done += len(block.lengths)
        if time.monotonic() - told > _TOLD_AFTER:
            told = time.monotonic()
            rate = done / (told - started)
            log.info("preparing %s: %d of %d, %.0f a second", what, done, len(source), rate)


def _as_it_is(block: Block) -> Block:
    return block


class _Chunks(Dataset[Block]):
    def __init__(self, source: ConversationSource, encoder: ChatEncoder, at_once: int, tokens: bool) -> None:
        self.source, self.encoder, self.at_once, self.tokens = source, encoder, at_once, tokens

    def __len__(self) -> int:
        return -(-len(self.source) // self.at_once)

    def __getitem__(self, chunk: int) -> Block:
        numbers = range(chunk * self.at_once, min(len(self.source), (chunk + 1) * self.at_once))
        block = Block(
            np.zeros(len(numbers), np.int32),
            np.zeros((len(numbers), 2), np.int32),
            np.zeros(len(numbers), np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, bool),
        )
        ids: list[np.ndarray] = []
        learnt: list[np.ndarray] = []
        for place, number in enumerate(numbers):
            try:
                conversation = self.source[number]
                kept, sample = self.encoder.prepare(conversation)  # of pictures only the headers are read
            except UnreadableSampleError as error:
                block.bad[number] = (error.path, error.reason)
                continue
            block.lengths[place], block.turns[place] = kept.length, (kept.first, kept.end)
            whole = (kept.first, kept.end) == (0, len(conversation.replies))
            block.shortened += kept.length == self.encoder.cutoff or not whole
            if sample is not None and self.tokens:
                block.sizes[place] = kept.length
                ids.append(sample["input_ids"].numpy().astype(np.int32))
                learnt.append((sample["labels"] != IGNORED).numpy())
        if ids:
            block.ids, block.learnt = np.concatenate(ids), np.concatenate(learnt)
        return block
