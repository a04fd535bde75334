"""Prepared conversations on the disk: made once, by one process, and only ever seen whole.

A folder `chat-<fingerprint>` in `cache_dir`: `index.safetensors` (lengths, turns), `tokens-*.safetensors` (the tokens of
conversations without pictures) and `complete.txt`, which has the size and the CRC-32 of the others (in its first line its
own) and is written last. The fingerprint is that of everything that decides the content: files, chat template, tokenizer,
limits, labels.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from mm_core.config.document import expanded
from mm_core.data.chat.labels import IGNORED, Kept
from mm_core.data.chat.prepare import Block
from mm_core.data.errors import DataError

log = logging.getLogger(__name__)

_COMPLETE, _INDEX = "complete.txt", "index.safetensors"
_TOKENS_OF_A_FILE = 1 << 26


class Prepared:
    """What is known of a set's conversations.

    Attributes:
        lengths: int32 `[N]`, tokens; 0 where a conversation cannot be used.
        bad: number of a conversation -> where it stands, and why it cannot be used.
        shortened: how many do not fit whole.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        turns: np.ndarray,
        sizes: np.ndarray,
        bad: dict[int, tuple[str, str]],
        shortened: int = 0,
        folder: Path | None = None,
        files: list[tuple[str, int]] | None = None,
    ) -> None:
        self.lengths, self.turns, self.bad, self.shortened = lengths, turns, bad, shortened
        self._ends = np.cumsum(sizes)  # of each conversation's tokens, over all files
        self._folder, self._files = folder, files or []
        self._file_ends = np.cumsum([count for _, count in self._files])
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process opens the files itself

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Prepared:
        """Keep what is found in memory, without tokens."""
        return cls(*_joined(list(blocks)))

    def kept(self, index: int) -> Kept:
        first, end = self.turns[index]
        return Kept(int(first), int(end), int(self.lengths[index]))

    def sample(self, index: int) -> dict[str, Tensor] | None:
        """Return `input_ids` and `labels` int64 `[S]` of a conversation whose tokens are kept."""
        end = int(self._ends[index])
        begin = int(self._ends[index - 1]) if index else 0
        if self._folder is None or begin == end:
            return None
        number = int(np.searchsorted(self._file_ends, begin, side="right"))
        name, count = self._files[number]
        before = int(self._file_ends[number]) - count
        if name not in self._open:
            # Mapped, not read: every process shares the pages.
            self._open[name] = safe_open(self._folder / name, framework="pt").__enter__()
        file = self._open[name]
        ids = file.get_slice("ids")[begin - before : end - before].long()
        learnt = file.get_slice("learnt")[begin - before : end - before]
        return {"input_ids": ids, "labels": torch.where(learnt, ids, IGNORED)}


def _joined(
    blocks: list[Block],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, tuple[str, str]], int]:
    bad: dict[int, tuple[str, str]] = {}
    for block in blocks:
        bad |= block.bad
    return (
        np.concatenate([block.lengths for block in blocks]),
        np.concatenate([block.turns for block in blocks]),
        np.concatenate([block.sizes for block in blocks]),
        bad,
        sum(block.shortened for block in blocks),
    )


class PreparedCache:
    """Where the prepared conversations of one set are kept.

    Args:
        folder: `cache_dir`, made if it is missing.
        fingerprint: of everything that decides what is in them.
    """

    def __init__(self, folder: str, fingerprint: str) -> None:
        self.folder = expanded(folder)
        self.fingerprint = fingerprint
        self.place = self.folder / f"chat-{fingerprint}"

    def load_or_make(
        self,
        blocks: Iterable[Block],
        *,
        overwrite: bool = False,
        outdated: Callable[[Prepared], bool] = lambda _: False,
    ) -> Prepared:
        """Return what is kept; make it if there is nothing, or it is damaged. Other processes that ask meanwhile wait.

        Args:
            blocks: of `prepare`; asked for when they are needed.
            overwrite: make it in any case.
            outdated: whether what is kept is to be made again.

        Raises:
            DataError: nothing can be written there.
        """
        asked = time.time()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                complete = self.place / _COMPLETE
                if complete.exists() and (not overwrite or complete.stat().st_mtime >= asked):
                    try:
                        kept = self._load()
                    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                        log.warning(
                            "%s is damaged (%s); its conversations are prepared again", self.place, error
                        )
                    else:
                        if not outdated(kept):
                            return kept
                        log.info(
                            "%s: what could not be used then can be now; it is prepared again", self.place
                        )
                self._make(blocks)
                return self._load()
        except (OSError, SafetensorError) as error:  # the latter of a full disk, too
            raise DataError(f"cache_dir: {self.folder} cannot be used: {error}") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        import fcntl  # POSIX only, as is everything that trains

        with (self.folder / f"chat-{self.fingerprint}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            yield

    def _load(self) -> Prepared:
        checksum, _, text = (self.place / _COMPLETE).read_text().partition("\n")
        if int(checksum) != zlib.crc32(text.encode()):
            raise ValueError(f"{_COMPLETE} is not what was written")
        complete = json.loads(text)
        for name, (size, crc) in complete["files"].items():
            path = self.place / name
            if path.stat().st_size != size or _crc(path) != crc:
                raise ValueError(f"{name} is not what was written")
        with safe_open(self.place / _INDEX, framework="numpy") as index:
            lengths, turns, sizes = (index.get_tensor(name) for name in ("lengths", "turns", "sizes"))
        bad = {int(number): (str(where), str(why)) for number, (where, why) in complete["bad"].items()}
        files = [(str(name), int(count)) for name, count in complete["tokens"]]
        return Prepared(lengths, turns, sizes, bad, int(complete["shortened"]), self.place, files)

    def _make(self, blocks: Iterable[Block]) -> None:
        unfinished = self.folder / f".chat-{self.fingerprint}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            self._write(blocks, unfinished)
            shutil.rmtree(self.place, ignore_errors=True)
            unfinished.rename(self.place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, blocks: Iterable[Block], folder: Path) -> None:
        known: list[Block] = []
        waiting: list[Block] = []
        tokens: list[tuple[str, int]] = []

        def flush() -> None:
            ids = np.concatenate([block.ids for block in waiting])
            if len(ids):
                name = f"tokens-{len(tokens):05d}.safetensors"
                learnt = np.concatenate([block.learnt for block in waiting])
                save_file({"ids": ids, "learnt": learnt}, folder / name)
                tokens.append((name, len(ids)))
            for block in waiting:
                block.ids, block.learnt = block.ids[:0].copy(), block.learnt[:0].copy()  # no longer in memory
            waiting.clear()

        for block in blocks:
            known.append(block)
            waiting.append(block)
            if sum(len(one.ids) for one in waiting) >= _TOKENS_OF_A_FILE:
                flush()
        if waiting:
            flush()
        lengths, turns, sizes, bad, shortened = _joined(known)
        save_file({"lengths": lengths, "turns": turns, "sizes": sizes}, folder / _INDEX)
        files = {file.name: (file.stat().st_size, _crc(file)) for file in sorted(folder.iterdir())}
        content = {"files": files, "tokens": tokens, "bad": bad, "shortened": shortened}
        text = json.dumps(content, indent=1)
        (folder / _COMPLETE).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
