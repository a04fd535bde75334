"""Options that several small commands share."""

from __future__ import annotations

from collections.abc import Sequence

from mm_core.config.findings import ConfigError, Finding


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of `--name value` or `--name=value` (the last one counts), and the other words.

    Raises:
        ConfigError: the value is missing.
    """
    rest: list[str] = []
    value: str | None = None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise ConfigError([Finding("error", "missing-value", "a value is missing", path=name)])
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def output_format(argv: Sequence[str], formats: Sequence[str]) -> tuple[str, list[str]]:
    """Return the value of `--format` (by default the first of `formats`), and the other words.

    Raises:
        ConfigError: it is none of them.
    """
    value, rest = take_option(argv, "--format")
    if value is not None and value not in formats:
        text = f'"{value}" is no format'
        mend = f"Write {' or '.join(formats)}"
        raise ConfigError([Finding("error", "wrong-value", text, path="--format", suggestion=mend)])
    return value or formats[0], rest
