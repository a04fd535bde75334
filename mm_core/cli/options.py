"""Options that several small commands share."""

from __future__ import annotations

from collections.abc import Sequence

TYPE_CHECKING = False  # typing's, which is slow to import
if TYPE_CHECKING:
    from mm_core.config.findings import ConfigError


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
                raise _mistake("missing-value", "a value is missing", name)
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
    return choice(argv, "--format", formats)


def choice(argv: Sequence[str], name: str, values: Sequence[str]) -> tuple[str, list[str]]:
    """Return the value of an option (by default the first of `values`), and the other words.

    Raises:
        ConfigError: it is none of them.
    """
    value, rest = take_option(argv, name)
    if value is not None and value not in values:
        text = f'"{value}" is no {name.removeprefix("--")}'
        raise _mistake("wrong-value", text, name, f"Write {' or '.join(values)}")
    return value or values[0], rest


def only_word(argv: Sequence[str], command: str, what: str) -> str:
    """Return the one word that is left when the options are taken: `what` says what it is.

    Raises:
        ConfigError: there is none, or another one, or an unknown option.
    """
    stray = next((word for word in argv if word.startswith("-")), None)
    if stray is None and len(argv) == 1:
        return argv[0]
    if stray is None and not argv:
        text, code = f"{what} is missing", "missing-argument"
    else:
        text, code = f'unexpected argument "{stray or argv[1]}"', "stray-argument"
    raise _mistake(code, text, command, f"See {command} --help")


def no_words(argv: Sequence[str], command: str) -> None:
    """Refuse words that are left when the options are taken.

    Raises:
        ConfigError: there is one.
    """
    if argv:
        text = f'unexpected argument "{argv[0]}"'
        raise _mistake("stray-argument", text, command, f"See {command} --help")


def _mistake(code: str, text: str, path: str, suggestion: str = "") -> ConfigError:
    from mm_core.config.findings import ConfigError, Finding  # only mistakes need it

    return ConfigError([Finding("error", code, text, path=path, suggestion=suggestion)])
