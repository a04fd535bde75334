"""Splits a shell script into words and marks. Nothing is expanded or run here."""

from __future__ import annotations

import re

from mm_core.config.migrate.shell_words import Mark, Part, Source, Token, Word

#: `${A:-${B:-…}}` deeper than this is an attack.
_MAX_DEPTH = 20
_PLAIN = re.compile(r"[^\s'\"$`\\;&|()<>#]+|#")
_IN_QUOTES = re.compile(r"[^\"$`\\\n]+|\n")
_NAME = re.compile(r"[A-Za-z_]\w*")
_SPECIAL = "0123456789@*#?$!-"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=\Z")
_HERE = re.compile(r"<<-?[ \t]*(?P<quote>['\"]?)(?P<word>[\w.!-]+)(?P=quote)")
_REDIRECT = re.compile(r"\d*(?:&>>|&>|>>|>\||>&|<&|<<<|<>|>|<)")
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:\[(?P<index>[@*\d]+)\])?(?P<operator>:?[-=])?")


def read_tokens(path: str, text: str) -> list[Token]:
    """Return the words and marks of a script, without comments, redirections and here-documents.

    Raises:
        ConfigError: a quote, a bracket or a here-document is never closed.
    """
    return _Reader(Source(path, text)).tokens()


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source = source
        self._here: list[tuple[str, bool, int]] = []

    def tokens(self) -> list[Token]:
        source = self.source
        tokens: list[Token] = []
        start = True  # of a command
        while self._skip_blanks():
            if source.starts("<<") and not source.starts("<<<") and self._here_document():
                continue
            redirect = None if source.starts("<(") or source.starts(">(") else self._redirect()
            if redirect:
                self._skip_blanks()
                if not source.done and source.peek() not in "\n;&|()":
                    self.word()
                continue
            mark = self._mark(start)
            if mark is not None:
                tokens.append(mark)
                start = mark.text != ")"
                continue
            word = self.word()
            if start and word.literal == "[[":
                self._skip_test()
                continue
            tokens.append(word)
            start = word.literal in ("if", "then", "else", "elif", "do", "while", "until", "!", "{")
        return tokens

    def _skip_blanks(self) -> bool:
        """Skip blanks, comments and joined lines; return whether anything follows."""
        source = self.source
        while not source.done:
            if source.peek() in " \t":
                source.take()
            elif source.starts("\\\n"):
                source.take(2)
            elif source.peek() == "#":
                end = source.text.find("\n", source.at)
                source.at = len(source.text) if end < 0 else end
            else:
                return True
        return False

    def _redirect(self) -> bool:
        match = _REDIRECT.match(self.source.text, self.source.at)
        if match is None:
            return False
        self.source.take(len(match.group()))
        return True

    def _mark(self, start: bool) -> Mark | None:
        source, line = self.source, self.source.line
        if start and source.starts("(("):
            self._balanced("((", "))", "the arithmetic command (( is never closed by ))")
            return Mark(";", line)
        for text in (";;", "&&", "||", "|&", ";", "&", "|", "(", ")", "\n"):
            if source.starts(text):
                source.take(len(text))
                if text == "\n":
                    self._skip_here_documents()
                return Mark({"\n": ";", "|&": "|"}.get(text, text), line)
        return None

    # -- here-documents and tests, of which nothing reaches a flag
    # ------------------------------------------------------------------------------------------------------

    def _here_document(self) -> bool:
        match = _HERE.match(self.source.text, self.source.at)
        if match is None:
            return False
        self._here.append((match["word"], match.group().startswith("<<-"), self.source.line))
        self.source.take(len(match.group()))
        return True

    def _skip_here_documents(self) -> None:
        source = self.source
        for word, indented, line in self._here:
            while True:
                if source.done:
                    raise source.fail(f"the here-document that ends with {word} has no end", line)
                end = source.text.find("\n", source.at)
                end = len(source.text) if end < 0 else end
                text = source.text[source.at : end]
                source.take(end - source.at + 1)
                if (text.lstrip("\t") if indented else text) == word:
                    break
        self._here = []

    def _skip_test(self) -> None:
        """Skip `[[ … ]]`, in which `<`, `&&` and `(` are no marks."""
        source, line = self.source, self.source.line
        while self._skip_blanks():
            if source.peek() in "\n;&|()<>":
                source.take()
            elif self.word().literal == "]]":
                return
        raise source.fail("the test [[ is never closed by ]]", line)

    # -- words
    # ------------------------------------------------------------------------------------------------------

    def word(self) -> Word:
        source, line = self.source, self.source.line
        parts: list[Part] = []
        while not source.done:
            char = source.peek()
            if char in " \t\n;&|)<>" and not source.starts("<(") and not source.starts(">("):
                break
            if char == "(":
                if self._before_array(parts):
                    source.take()
                    return Word(tuple(parts), line, self._array(line))
                if parts:
                    break
                parts.append(Part("text", source.take(), source.line))
                continue
            parts += self._parts(depth=0)
        if not parts:  # a character that starts no word, such as a lone bracket: it stands for itself
            parts.append(Part("text", source.take(), line))
        return Word(tuple(parts), line)

    def _before_array(self, parts: list[Part]) -> bool:
        if any(part.kind != "text" or part.quoted for part in parts):
            return False
        return bool(_ASSIGNMENT.match("".join(part.text for part in parts)))

    def _array(self, line: int) -> tuple[Word, ...]:
        source = self.source
        items: list[Word] = []
        while self._skip_blanks():
            if source.peek() == "\n":
                source.take()
            elif source.peek() == ")":
                source.take()
                return tuple(items)
            elif source.peek() in ";&|<>":
                raise source.fail(f"unexpected {source.peek()} in an array ( … )", source.line)
            else:
                items.append(self.word())
        raise source.fail("the array that ( opens is never closed by )", line)

    def _parts(self, depth: int) -> list[Part]:
        """Return the parts of what stands next outside quotes: a quoted text is several."""
        source, line = self.source, self.source.line
        char = source.peek()
        if char == "'":
            return self._single(line)
        if char == '"':
            return self._double(depth)
        if char == "\\":
            taken = source.take(2)
            return [] if taken == "\\\n" else [Part("text", taken[1:] or "\\", line, quoted=True)]
        if source.starts("$'"):
            source.take()
            return self._single(line)
        if source.starts('$"'):
            source.take()
            return self._double(depth)
        if char in "$`" or source.starts("<(") or source.starts(">("):
            return [self._expansion(depth, quoted=False)]
        match = _PLAIN.match(source.text, source.at)
        return [Part("text", source.take(len(match.group()) if match else 1), line)]

    def _single(self, line: int) -> list[Part]:
        source = self.source
        end = source.text.find("'", source.at + 1)
        if end < 0:
            raise source.fail("the quote ' is never closed", line, "Add ' where the text ends")
        text = source.take(end + 1 - source.at)[1:-1]
        return _by_line(text, line)

    def _double(self, depth: int) -> list[Part]:
        source, line = self.source, self.source.line
        source.take()
        parts: list[Part] = []
        while not source.done:
            char, here = source.peek(), source.line
            if char == '"':
                source.take()
                return parts or [Part("text", "", line, quoted=True)]
            if char == "\\":
                taken = source.take(2)
                if taken != "\\\n":
                    text = taken[1:] if taken[1:] in tuple('"$`\\') else taken
                    parts.append(Part("text", text, here, quoted=True))
            elif char in "$`":
                parts.append(self._expansion(depth, quoted=True))
            else:
                match = _IN_QUOTES.match(source.text, source.at)
                parts.append(Part("text", source.take(len(match.group()) if match else 1), here, quoted=True))
        raise source.fail('the quote " is never closed', line, 'Add " where the text ends')

    # -- expansions
    # ------------------------------------------------------------------------------------------------------

    def _expansion(self, depth: int, *, quoted: bool) -> Part:
        source, line, begin = self.source, self.source.line, self.source.at
        if source.starts("`"):
            end = re.compile(r"(?:[^`\\]|\\[\s\S])*+`").match(source.text, source.at + 1)
            if end is None:
                raise source.fail("the backquote ` is never closed", line, "Add ` where the command ends")
            source.take(end.end() - source.at)
            return Part("opaque", source.text[begin : source.at], line, quoted=quoted)
        if source.starts("$(("):
            text = self._balanced("$((", "))", "the arithmetic $(( is never closed by ))")
            return Part("arithmetic", text[3:-2], line, text, quoted)
        if source.starts("$["):
            text = self._balanced("$[", "]", "the arithmetic $[ is never closed by ]")
            return Part("arithmetic", text[2:-1], line, text, quoted)
        if source.starts("${"):
            return self._braced(depth, quoted)
        for opening in ("$(", "<(", ">("):
            if source.starts(opening):
                text = self._balanced(opening, ")", f"the command {opening} is never closed by )")
                return Part("opaque", text, line, quoted=quoted)
        source.take()
        match = _NAME.match(source.text, source.at)
        if match is not None:
            name = source.take(len(match.group()))
        elif not source.done and source.peek() in _SPECIAL:
            name = source.take()
        else:
            return Part("text", "$", line, quoted=quoted)
        return Part("variable", name, line, f"${name}", quoted, index=name if name in ("@", "*") else "")

    def _braced(self, depth: int, quoted: bool) -> Part:
        source, line, begin = self.source, self.source.line, self.source.at
        match = _VARIABLE.match(source.text, begin)
        opened = "the brace ${ is never closed by }"
        closed = match is not None and source.text[match.end() : match.end() + 1] == "}"
        if match is None or not (closed or match["operator"]):
            text = self._balanced("${", "}", opened)
            return Part("opaque", text, line, quoted=quoted)
        if depth >= _MAX_DEPTH:
            raise source.fail(f"expansions are nested more than {_MAX_DEPTH} deep", line)
        source.take(len(match.group()))
        default: list[Part] = []
        while not source.done and source.peek() != "}":
            if source.peek() in " \t\n":
                default.append(Part("text", source.take(), source.line))
            else:
                default += self._default(depth + 1)
        if source.done:
            raise source.fail(opened, line, "Add } where the name ends")
        source.take()
        return Part(
            "variable",
            match["name"],
            line,
            source.text[begin : source.at],
            quoted,
            match["operator"] or "",
            tuple(default),
            match["index"] or "",
        )

    def _default(self, depth: int) -> list[Part]:
        """Return the next parts of a default, in which `}` ends a plain text."""
        source = self.source
        if source.peek() in "'\"\\$`":
            return self._parts(depth)
        match = re.compile(r"[^}\s'\"\\$`]+").match(source.text, source.at)
        return [Part("text", source.take(len(match.group()) if match else 1), source.line)]

    def _balanced(self, opening: str, closing: str, problem: str) -> str:
        """Take everything up to the bracket that closes, past quotes and inner brackets; return it."""
        source, line, begin = self.source, self.source.line, self.source.at
        inner, outer = opening[-1], closing[0]
        depth = len(closing)
        at = begin + len(opening)
        quotes = re.compile(r"'[^']*+'|\"(?:[^\"\\]|\\[\s\S])*+\"|\\[\s\S]")
        # In arithmetic nothing is quoted.
        stops = re.compile(rf"[{re.escape(inner + outer)}'\"\\]" if closing == ")" or opening == "${"
                           else rf"[{re.escape(inner + outer)}]")  # fmt: skip
        while depth:
            found = stops.search(source.text, at)
            if found is None:
                raise source.fail(problem, line)
            at = found.end()
            if found.group() == inner:
                depth += 1
            elif found.group() == outer:
                depth -= 1
            else:
                quote = quotes.match(source.text, found.start())
                if quote is None:
                    raise source.fail(f"the quote {found.group()} is never closed", line)
                at = quote.end()
        return source.take(at - begin)


def _by_line(text: str, line: int) -> list[Part]:
    """Return a quoted text as one part for each of its lines, so that each knows its own."""
    pieces = re.findall(r"[^\n]*\n|[^\n]+", text) or [""]
    return [Part("text", piece, line + offset, quoted=True) for offset, piece in enumerate(pieces)]
