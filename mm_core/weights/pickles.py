"""What every pickle that we read has to pass before it is unpickled, and how what came of it gets into a message."""

from __future__ import annotations

import pickle
import pickletools
import reprlib

from mm_registry.words import clip

#: Opcodes that fetch from places other than the pickle itself.
_ELSEWHERE = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"})
_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


class Refused(pickle.UnpicklingError):
    """Why a pickle is not read on."""


def check_opcodes(data: bytes) -> None:
    """Refuse what would make the unpickler allocate more than the pickle has bytes for: it believes the lengths and
    memo positions that it reads.

    Raises:
        Refused: an opcode has no business here.
        ValueError: of pickletools: an argument is longer than what is left of the data, or an opcode is unknown.
    """
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name in _ELSEWHERE:
            raise Refused(f"it has the opcode {opcode.name}, which torch does not write")
        if opcode.name in _MEMO and not 0 <= int(argument or 0) <= (position or 0):
            raise Refused(f"it puts something at position {argument} of its memo")


class _Repr(reprlib.Repr):
    """A `repr` that ends, whatever holds whatever: a list that holds a list twice, and so on, has no end of places."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 80

    def repr_instance(self, x: object, level: int) -> str:
        """Of a class of its own: of a dictionary's or a list's without what it holds."""
        if isinstance(x, dict | list | tuple | set | frozenset):
            return f"<{type(x).__name__} of {len(x)}>"
        return super().repr_instance(x, level)


def shown(value: object, limit: int = 80) -> str:
    """Return the `repr` of something that came out of a pickle, cut in depth and to `limit` characters."""
    return clip(_Repr().repr(value), limit)
