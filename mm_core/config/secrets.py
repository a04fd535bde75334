"""Passwords and tokens in a configuration: told apart by their key, and never shown.

Nothing of ours needs one, but people's files hold them (a hub's token beside `from_pretrained`), and what is
printed ends in logs and bug reports, what is stored with a run in checkpoints that are handed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

#: What stands for a secret, wherever one would be shown or stored.
HIDDEN = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: A key is secret if one of these is among its words …
_SECRET = frozenset(
    {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
)
#: … or two of these follow each other …
_SECRET_PAIRS = frozenset((first, "key") for first in ("api", "access", "private", "auth"))
#: … or it ends in "token" and is no text model's special token (`pad_token`; `image_token_id` ends in "id").
_SPECIAL_TOKENS = frozenset(
    {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "video", "audio", "vision", "text", "special"}
    | {"start", "end", "stop", "per", "max", "min", "new", "num"}
)
#: The user's name and password in an address, and secrets among its parameters.
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/?#\"']+(?=@)")
_PARAMETER = re.compile(r"([?&;]([\w.-]+)=)([^\s&;#\"']+)")
#: A key and what separates it from its value, in data that is written on one line.
_WRITTEN_KEY = re.compile(r"(?<![\w.-])([\w.-]+)[\"']?\s*[:=]")


def is_secret(key: str) -> bool:
    """Return whether a key names a secret by its words: `api_token`, `HF_TOKEN`, `accessKey`, not `max_tokens`."""
    if len(key) > 200:
        return False
    words = [word.lower() for word in _WORD.findall(key)]
    if not _SECRET.isdisjoint(words) or any(pair in _SECRET_PAIRS for pair in pairwise(words)):
        return True
    return words[-1:] == ["token"] and _SPECIAL_TOKENS.isdisjoint(words)


def in_secret(path: Iterable[str | int]) -> bool:
    """Return whether a place of a file is secret: its key, or one around it, names a secret."""
    return any(isinstance(part, str) and is_secret(part) for part in path)


def hide(text: str) -> str:
    """Return a text with `***` for user and password in an address (`https://me:pw@host`), and for parameters
    of one that are secret (`?token=…`).
    """
    if "://" not in text:
        return text
    text = _IN_ADDRESS.sub(HIDDEN, text)
    return _PARAMETER.sub(lambda found: found[1] + HIDDEN if is_secret(found[2]) else found[0], text)


def names_secret(text: str) -> bool:
    """Return whether a text that may be data (`{api_token: x}`, well-formed or not) has a key that is secret."""
    return any(is_secret(found[1]) for found in _WRITTEN_KEY.finditer(text))


def without_secrets(value: Any, path: Iterable[str | int] = ()) -> Any:
    """Return plain data with `***` for every secret in it: values of secret keys, credentials in addresses.

    Args:
        path: where the data stands; everything at a secret place is secret.

    null, booleans and empty texts hide nothing and stay.
    """
    return _cleaned(value, in_secret(path))


def _cleaned(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _cleaned(item, secret or is_secret(str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, secret) for item in value]
    if secret:
        return value if value is None or isinstance(value, bool) or value == "" else HIDDEN
    return hide(value) if isinstance(value, str) else value
