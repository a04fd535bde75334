"""Errors of the data room."""

from __future__ import annotations

import os

from mm_registry.errors import UserError


class DataError(UserError):
    """The data or the way they are described is at fault; the message says where, what and how to mend it."""


class UnreadableSampleError(DataError):
    """One sample cannot be read; a dataset may put another in its place.

    Attributes:
        path: the file.
        reason: why, a part of a sentence.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self) -> tuple[type[UnreadableSampleError], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # crosses process borders, as errors of loader workers do
