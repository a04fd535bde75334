"""Which bracket was forgotten: the indentation tells what the brackets themselves cannot."""

from __future__ import annotations

from collections.abc import Sequence

from mm_core.config.findings import ConfigError, clip
from mm_core.config.json_tokens import Source, Token

CLOSING = {"{": "}", "[": "]"}


def never_closed(source: Source, tokens: Sequence[Token], stack: Sequence[Token]) -> ConfigError:
    """Return the error of a file that ends while brackets are open.

    Without the closing bracket of an inner section the next one closes it, and so on, until the file ends
    with the outermost open. If a bracket closes one whose line is indented otherwise, the inner one is the one
    that is missing, and it belongs where the indentation falls back.
    """
    return _by_indentation(source, tokens) or _missing(source, stack[-1], tokens[-1].end, None)


def _missing(source: Source, opened: Token, at: int, following: Token | None) -> ConfigError:
    line, column = source.place(opened.start)
    closing = CLOSING[opened.kind]
    before = (
        f"{following.text[0] if following.kind != 'string' else clip(following.text)}" if following else ""
    )
    where = f"before {before}" if following is not None else "before the file ends"
    message = f"missing '{closing}' {where}: '{opened.kind}' of line {line}, column {column} is not closed"
    return source.fail(at, message, f"Add '{closing}' here")


def _by_indentation(source: Source, tokens: Sequence[Token]) -> ConfigError | None:
    """Return the error of the first bracket that seems to be missing its partner, by the indentation of those that are
    closed.
    """
    stack: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind in CLOSING:
            stack.append(index)
        elif token.kind in ("}", "]") and stack:
            opened = stack.pop()
            indent = source.indent(tokens[opened].start)
            same_line = source.place(tokens[opened].start)[0] == source.place(token.start)[0]
            if not same_line and source.begins_line(token.start) and source.indent(token.start) < indent:
                return _fallback(source, tokens, opened, indent)
    return None


def _fallback(source: Source, tokens: Sequence[Token], opened: int, indent: int) -> ConfigError | None:
    item = opened > 0 and tokens[opened - 1].kind in ("[", ",")  # else it is the value of a key
    depth = 0
    for index in range(opened + 1, len(tokens)):
        token = tokens[index]
        fits = token.kind != "," and (item or token.kind not in CLOSING)
        if depth == 0 and fits and source.begins_line(token.start) and source.indent(token.start) <= indent:
            return _missing(source, tokens[opened], _end(tokens, index - 1), token)
        depth += (token.kind in CLOSING) - (token.kind in ("}", "]"))
    return None


def wrong_closing(
    source: Source, tokens: Sequence[Token], position: int, opened: Token, around: Sequence[Token]
) -> ConfigError:
    """Return the error of a bracket that closes one of the other kind; if it can close one around that, on a line of
    its own, one is missing before it.
    """
    token, wanted = tokens[position], CLOSING[opened.kind]
    earlier = _by_indentation(source, tokens[:position])
    if earlier is not None:
        return earlier
    if source.begins_line(token.start) and any(CLOSING[outer.kind] == token.kind for outer in around):
        return _missing(source, opened, _end(tokens, position - 1), token)
    line, column = source.place(opened.start)
    message = (
        f"'{token.text}' closes the '{opened.kind}' of line {line}, column {column}; expected '{wanted}'"
    )
    return source.fail(token.start, message, f"Write '{wanted}', or add the missing one before")


def _end(tokens: Sequence[Token], position: int) -> int:
    """Return the end of the last token before a position that is no comma."""
    while position > 0 and tokens[position].kind == ",":
        position -= 1
    return tokens[position].end


def value_for_key(
    source: Source, tokens: Sequence[Token], position: int, stack: Sequence[Token]
) -> ConfigError:
    """Return the error of an object or list where a key belongs: the object around it was not closed, if that is in a
    list, or the value before it is one of a list without its bracket.
    """
    token, opened = tokens[position], stack[-1]
    earlier = _by_indentation(source, tokens[:position])
    if earlier is not None:
        return earlier
    if len(stack) > 1 and stack[-2].kind == "[" and token.kind == "{":
        return _missing(source, opened, _end(tokens, position - 1), token)
    begin = _begin(tokens, position - 1)
    if begin is not None:
        number = source.place(token.start)[0]
        message = f"missing '[' before this value: another follows at line {number} without a key"
        return source.fail(begin, message, "Add '[' here, and ']' after the last")
    return source.fail(token.start, f"found {token.text} where a key in double quotes belongs")


def _begin(tokens: Sequence[Token], position: int) -> int | None:
    """Return where the object or list begins that ends before a comma at a position."""
    depth = 0
    for token in reversed(tokens[:position]):
        depth += (token.kind in ("}", "]")) - (token.kind in ("{", "["))
        if depth == 0:
            return token.start if token.kind in ("{", "[") else None
    return None


def colon_after_value(source: Source, tokens: Sequence[Token], position: int) -> ConfigError:
    """Return the error of a colon where a comma or a closing bracket belongs: the text before it is a key, of an object
    without its bracket.
    """
    token, before = tokens[position], tokens[position - 1]
    if before.kind == "string" and tokens[position - 2].kind == ":":
        message = f"missing '{{' before {clip(before.text)}, which a ':' follows as if it were a key"
        return source.fail(
            tokens[position - 2].end, message, "Add '{' here, or remove the ':' after the text"
        )
    return source.fail(token.start, "':' stands where ',' or a closing bracket belongs")


def key_in_list(source: Source, tokens: Sequence[Token], position: int, opened: Token) -> ConfigError:
    """Return the error of a list that was not closed before the next key; `position` is of the key's colon."""
    key = tokens[position - 1]
    last = _end(tokens, position - 2)
    line, column = source.place(opened.start)
    if last <= opened.end:  # ["key": 1]
        return source.fail(
            opened.start, f"a list has no keys such as {clip(key.text)}", "Use { } for an object"
        )
    message = (
        f"missing ']' before the key {clip(key.text)}: '[' of line {line}, column {column} is not closed"
    )
    return source.fail(last, message, "Add ']' here")
