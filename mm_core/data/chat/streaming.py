"""Conversations read as a stream of JSON Lines: nothing is indexed, nothing is prepared, the next line is all that is known."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mm_core.data.chat.collate import ChatCollate, join
from mm_core.data.chat.files import is_json_list, origin_of, parse_row
from mm_core.data.chat.labels import ChatEncoder
from mm_core.data.chat.rows import ConversationReader
from mm_core.data.errors import DataError, UnreadableSampleError

log = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_SHOWN = 3


class _Position(NamedTuple):
    """Before a line: its file and byte, its number in the file from 1, rows before it in its file, in the group of its file and
    in all.
    """

    file: int = 0
    byte: int = 0
    line: int = 1
    row: int = 0
    of_group: int = 0
    of_all: int = 0


class ChatStream(IterableDataset[dict[str, Tensor]]):
    """Conversations in the order of their files. Items as of `ChatDataset`.

    `shard` deals the lines round; `state_dict` is the place after the last item. With `capacity` an item is as many
    consecutive conversations as fit into that many tokens.

    Args:
        files: JSON Lines.
        reader, encoder: make samples of rows.
        limit: conversations of each group of files; None: all.
        groups: how many files each name of `dataset` stood for; None: one each.
        capacity: tokens of a sequence of several conversations; None: each has its own.
        documents: whether conversations of one sequence are kept apart.
        max_bad_samples: how many may be unusable, each reported and left out: a number, or a share of those read.
        name: of the set, for messages.

    Raises:
        DataError: a file is missing, or a JSON list, which cannot be read line by line.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reader: ConversationReader,
        encoder: ChatEncoder,
        collate_fn: ChatCollate,
        *,
        limit: int | None = None,
        groups: Sequence[int] | None = None,
        capacity: int | None = None,
        documents: bool = True,
        max_bad_samples: int | float = 0.01,
        name: str = "conversations",
    ) -> None:
        self.files, self.reader, self.encoder, self.collate_fn = list(files), reader, encoder, collate_fn
        self.limit, self.capacity, self.documents = limit, capacity, documents
        self.max_bad_samples, self.name = max_bad_samples, name
        self.group_of = [g for g, count in enumerate(groups or [1] * len(self.files)) for _ in range(count)]
        self.validation: Dataset[dict[str, Tensor]] | None = None
        self.shards = (1, 0)
        self._at = _Position()  # of the first line that is in no item that was yielded
        self._read = 0
        self._bad = 0
        self._examples: list[str] = []
        self._goes_on = False
        for file in self.files:
            if is_json_list(file):
                raise DataError(
                    f'{file} is a JSON list, and a stream is read line by line; write one object a line, or "streaming": false'
                )

    @property
    def tokenizer_size(self) -> int:
        """Number of ids that texts can have; the network must embed them all."""
        return len(self.encoder.template.tokenizer)

    def shard(self, num_shards: int, index: int) -> ChatStream:
        """Return the stream of process `index` of `num_shards`."""
        own = ChatStream(
            self.files, self.reader, self.encoder, self.collate_fn, limit=self.limit, capacity=self.capacity,
            documents=self.documents, max_bad_samples=self.max_bad_samples, name=self.name,
        )  # fmt: skip
        own.group_of, own.shards = self.group_of, (num_shards, index)
        return own

    def state_dict(self) -> dict[str, Any]:
        """The position after the last item."""
        files = [str(file) for file in self.files]
        return {
            "at": list(self._at),
            "read": self._read,
            "bad": self._bad,
            "examples": self._examples,
            "files": files,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is the position in other files.
        """
        if state["files"] != [str(file) for file in self.files]:
            raise ValueError(
                f"it is one in {', '.join(state['files'])}; the job reads {', '.join(map(str, self.files))}"
            )
        self._at, self._read = _Position(*state["at"]), int(state["read"])
        self._bad, self._examples = int(state["bad"]), list(state["examples"])
        self._goes_on = True

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """One epoch.

        Raises:
            DataError: too many conversations cannot be used.
        """
        if not self._goes_on:
            self._at = _Position()
        self._goes_on = False
        if self.capacity is None:
            for sample, _, end in self._samples():
                self._at = end
                yield sample
            return
        waiting: list[dict[str, Tensor]] = []
        filled = 0
        for sample, begin, _ in self._samples():
            if waiting and filled + len(sample["input_ids"]) > self.capacity:
                self._at = begin  # which is read again after a resume
                yield join(waiting, documents=self.documents)
                waiting, filled = [], 0
            waiting.append(sample)
            filled += len(sample["input_ids"])
        if waiting:
            self._at = _Position(file=len(self.files))
            yield join(waiting, documents=self.documents)

    def _samples(self) -> Iterator[tuple[dict[str, Tensor], _Position, _Position]]:
        """This process's samples, with the places before and after their lines."""
        shards, own = self.shards
        for text, begin, end in self._lines():
            if begin.of_all % shards != own:
                continue
            file = self.files[begin.file]
            origin = origin_of(file, begin.line, begin.row)
            self._read += 1
            try:
                row = parse_row(text, origin)
                sample = self.encoder.encode(self.reader(row, origin, file.parent))
            except UnreadableSampleError as error:
                self._leave_out(error)
                continue
            yield sample, begin, end

    def _lines(self) -> Iterator[tuple[bytes, _Position, _Position]]:
        at = self._at
        while at.file < len(self.files):
            with self.files[at.file].open("rb") as file:
                file.seek(at.byte)
                for text in file:
                    end = at._replace(byte=at.byte + len(text), line=at.line + 1)
                    if text.removeprefix(_BOM).strip():
                        if self.limit is not None and at.of_group >= self.limit:
                            break
                        end = end._replace(row=at.row + 1, of_group=at.of_group + 1, of_all=at.of_all + 1)
                        yield text.removeprefix(_BOM), at, end
                    at = end
            following = at.file + 1
            same = following < len(self.files) and self.group_of[following] == self.group_of[at.file]
            at = _Position(following, of_group=at.of_group if same else 0, of_all=at.of_all)

    def _leave_out(self, error: UnreadableSampleError) -> None:
        """Report a conversation that cannot be used.

        Raises:
            DataError: there are now more than the limit.
        """
        self._bad += 1
        self._examples = [*self._examples, str(error)][:_SHOWN]
        count, limit = self._bad, self.max_bad_samples
        allowed = limit if isinstance(limit, int) else max(1, int(limit * self._read)) if limit else 0
        if count > allowed:
            examples = "; ".join(self._examples) + (f"; and {count - _SHOWN} more" if count > _SHOWN else "")
            raise DataError(
                f"{self.name}: {count} of the {self._read} conversations read so far cannot be used, more than "
                f"max_bad_samples ({allowed}): {examples}"
            ) from error
        log.warning("a conversation is left out (%d so far): %s", count, error)
