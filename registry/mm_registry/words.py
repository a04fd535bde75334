"""How what others wrote gets into our messages: on one line, short, and without control characters, which a
terminal would obey.
"""

from __future__ import annotations


def visible(text: str) -> str:
    """Return a text with everything but line feeds and printable characters spelt out (`\\x1b`)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def clip(text: str, limit: int = 80) -> str:
    """Return a text cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def shown(value: object, limit: int = 80) -> str:
    """Return the `repr` of a plain value, cut to `limit` characters."""
    return clip(repr(value), limit)


def described(error: BaseException, limit: int = 300) -> str:
    """Return `ValueError: what it says`, the message cut to `limit` characters."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a stranger's __str__ may raise anything
        return f"{name} (whose message cannot be read)"
    return visible(f"{name}: {clip(text, limit)}" if text else name)
