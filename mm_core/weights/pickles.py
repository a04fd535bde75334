"""What every pickle that we read has to pass before and while it is unpickled, and how what came of it gets into a
message.
"""

from __future__ import annotations

import pickle
import pickletools
import reprlib
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from mm_registry.words import clip

#: Opcodes that fetch from places other than the pickle itself.
_ELSEWHERE = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"})
_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})

_LONGEST_KEY = 16
_PLAIN = frozenset({bool, int, float, complex, str, bytes})
_METHODS: dict[int, Callable[..., None]] = dict(pickle._Unpickler.dispatch)


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
        if opcode.name == "FRAME" and int(argument or 0) > len(data):
            raise Refused(f"it has a frame of {argument} bytes, which are not there")
        if opcode.name in _MEMO and not 0 <= int(argument or 0) <= (position or 0):
            raise Refused(f"it puts something at position {argument} of its memo")


class PlainKeys(pickle._Unpickler):
    """An unpickler of which no key of a dictionary and no member of a set is more than a number, a text, one of the
    `key_types` or a short tuple of these.

    To hash a tuple means to hash all that is in it, which has an end only in the universe's time if each holds another
    one twice, and needs more stack than there is if a million lie in each other. It is Python's own unpickler in Python:
    in that in C nothing can be asked before a key is hashed.
    """

    #: Classes whose objects may be keys, since hashing one takes a moment.
    key_types: ClassVar[tuple[type, ...]] = ()
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_METHODS)
    # What pickle's own methods use, and its stubs do not declare.
    stack: list[Any]
    metastack: list[list[Any]]

    def _check(self, keys: Collection[object]) -> None:
        for key in keys:
            parts = key if type(key) is tuple and len(key) <= _LONGEST_KEY else (key,)
            for part in parts:
                if not (part is None or type(part) in _PLAIN or isinstance(part, self.key_types)):
                    raise Refused(f"it has a {type(part).__name__} in the key of a dictionary, or in a set")

    def _setitem(self) -> None:
        self._check(self.stack[-2:-1])
        _load(self, pickle.SETITEM)

    def _pairs(self, opcode: bytes) -> None:
        self._check(self.stack[::2])
        _load(self, opcode)

    def _setitems(self) -> None:
        self._pairs(pickle.SETITEMS)

    def _dict(self) -> None:
        self._pairs(pickle.DICT)

    def _additems(self) -> None:
        self._check(self.stack)
        _load(self, pickle.ADDITEMS)

    def _frozenset(self) -> None:
        self._check(self.stack)
        _load(self, pickle.FROZENSET)

    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = _setitems
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.ADDITEMS[0]] = _additems
    dispatch[pickle.FROZENSET[0]] = _frozenset


def _load(unpickler: PlainKeys, opcode: bytes) -> None:
    _METHODS[opcode[0]](unpickler)


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
