"""Integer arithmetic of a shell, `$(( … ))`, evaluated without running anything: + - * / % ( ) and names."""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\s*(?:(?P<number>0[xX][0-9a-fA-F]+|\d+)|(?P<name>[A-Za-z_]\w*)|(?P<mark>[-+*/%()]))")
_MAX_LENGTH = 2_000
_MAX_DEPTH = 50
#: Variables that are looked up for one value: `A=B+B`, `B=C+C`, … would double them at each step.
_MAX_NAMES = 1_000
_LIMIT = 2**63


class ArithmeticShellError(ValueError):
    """Why an expression has no value here; a part of a sentence."""


def evaluate(text: str, value_of: Callable[[str], str]) -> int:
    """Return the value of an expression; `value_of` gives the text of a name, or raises ArithmeticShellError.

    Raises:
        ArithmeticShellError: an operator or a number that is not read, a division by zero, a value beyond 64 bits.
    """
    names = 0

    def counted(name: str) -> str:
        nonlocal names
        names += 1
        if names > _MAX_NAMES:
            raise ArithmeticShellError(f"its variables refer to each other more than {_MAX_NAMES} times")
        return value_of(name)

    return _Expression(text, counted, 0).value()


class _Expression:
    def __init__(self, text: str, value_of: Callable[[str], str], depth: int) -> None:
        if len(text) > _MAX_LENGTH:
            raise ArithmeticShellError(f"it is longer than {_MAX_LENGTH} characters")
        self.tokens = _tokens(text)
        self.value_of = value_of
        self.at = 0
        self.depth = depth

    def value(self) -> int:
        if not self.tokens:
            return 0
        result = self._sum()
        if self.at < len(self.tokens):
            raise ArithmeticShellError(f'"{self.tokens[self.at]}" is not expected there')
        return result

    def _next(self, *marks: str) -> str:
        if self.at < len(self.tokens) and self.tokens[self.at] in marks:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def _sum(self) -> int:
        result = self._product()
        while mark := self._next("+", "-"):
            right = self._product()
            result = _bounded(result + right if mark == "+" else result - right)
        return result

    def _product(self) -> int:
        result = self._unary()
        while mark := self._next("*", "/", "%"):
            right = self._unary()
            if mark == "*":
                result = _bounded(result * right)
                continue
            if right == 0:
                raise ArithmeticShellError("it divides by zero")
            # As in C, towards zero; Python rounds down.
            quotient = abs(result) // abs(right) * (1 if (result < 0) == (right < 0) else -1)
            result = quotient if mark == "/" else result - quotient * right
        return result

    def _unary(self) -> int:
        sign = 1
        while mark := self._next("+", "-"):
            sign = -sign if mark == "-" else sign
        return sign * self._atom()

    def _atom(self) -> int:
        if self.at >= len(self.tokens):
            raise ArithmeticShellError("it ends too early")
        token = self.tokens[self.at]
        self.at += 1
        if token == "(":
            self._deeper()
            result = self._sum()
            self.depth -= 1
            if not self._next(")"):
                raise ArithmeticShellError("a ( is not closed")
            return result
        if token[0].isdigit():
            return _number(token)
        if token[0].isalpha() or token[0] == "_":
            self._deeper()
            result = _Expression(self.value_of(token), self.value_of, self.depth).value()
            self.depth -= 1
            return result
        raise ArithmeticShellError(f'"{token}" is not expected there')

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ArithmeticShellError(
                f"it is nested more than {_MAX_DEPTH} deep, or a variable refers to itself"
            )


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ArithmeticShellError(f'"{text[at:].strip()[:20]}" is not read: only + - * / % ( ) are')
        if match.group("mark") in ("*", "/") and text[match.end() : match.end() + 1] == match.group("mark"):
            raise ArithmeticShellError("** is not read: only + - * / % ( ) are")
        tokens.append(match.group().strip())
        at = match.end()
    return tokens


def _number(token: str) -> int:
    if token[:2] in ("0x", "0X"):
        return _bounded(int(token, 16))
    if len(token) > 1 and token[0] == "0":  # octal, as in bash
        try:
            return _bounded(int(token, 8))
        except ValueError:
            raise ArithmeticShellError(f"{token} begins with 0 and is no octal number") from None
    return _bounded(int(token))


def _bounded(value: int) -> int:
    if not -_LIMIT <= value < _LIMIT:
        raise ArithmeticShellError("a value does not fit into 64 bits")
    return value
