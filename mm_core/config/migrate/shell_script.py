"""Reads a launch script of MindSpeed-MM, without running anything: what it starts, with which words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from mm_core.config.document import closest_path, syntax_error
from mm_core.config.findings import ConfigError, Finding, clip
from mm_core.config.migrate.shell_reader import read_tokens
from mm_core.config.migrate.shell_values import Piece, Unknown, Value, Variables, line_of, text_of, unknown_of
from mm_core.config.migrate.shell_words import Mark, Token, Word

#: A launch script has a few kilobytes.
MAX_BYTES = 2**20
_MAX_WORDS = 50_000
TRAINING = ("pretrain_sora.py", "pretrain_transformers.py")
#: Programs of MindSpeed-MM that start something else, and what to do instead.
OTHERS = {
    "inference_sora.py": "it generates videos; `mm generate` takes its flags as they are",
    "inference_vlm.py": "it generates text, which is not available",
    "posttrain_sora_dpo.py": "it trains on preferences (DPO), which is not available",
    "posttrain_qwen2vl_dpo.py": "it trains on preferences (DPO), which is not available",
    "pretrain_vlm.py": "its models are not available; vision-language models come as transformers models",
    "pretrain_ae.py": "it trains an autoencoder, which is not available",
}
_OPENING = {"if": "fi", "for": "done", "while": "done", "until": "done", "select": "done", "case": "esac",
            "{": "}", "(": ")"}  # fmt: skip
_CLOSING = frozenset(_OPENING.values())
_PREFIXES = ("then", "else", "elif", "do", "!", "time", "nohup", "exec", "command", "env", "sudo", "eval")
_KEYWORDS = frozenset((*_PREFIXES, *_OPENING, *_CLOSING))
_DECLARATIONS = ("export", "declare", "local", "readonly", "typeset")
_HARMLESS = ("cd", "mkdir", "echo", "export", "source", ".", "set", "true", "sleep", "ulimit")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")


@dataclass(frozen=True)
class Export:
    """A variable that the script puts into the environment of what it starts."""

    name: str
    value: Value
    line: int


@dataclass(frozen=True)
class Launch:
    """The command that starts training: words before its program (`torchrun …`), and the program's own."""

    program: str
    line: int
    launcher: tuple[Value, ...]
    words: tuple[Value, ...]
    #: The folder in which it runs, as far as `cd` said so.
    folder: str = ""
    #: "the `if` of line 3", when it stands in a block.
    block: str = ""


@dataclass
class Script:
    """What a launch script says.

    Attributes:
        launch: the one command that starts training.
        exports: the last value of each exported variable, in the order of the script.
        findings: notes and warnings about what was not followed.
    """

    path: str
    launch: Launch
    exports: tuple[Export, ...]
    findings: tuple[Finding, ...]


def read_script(path: str, given: Mapping[str, str] | None = None) -> Script:
    """Read a launch script.

    Args:
        given: values for its variables and arguments (`{"1": …}`), which win over what it sets.

    Raises:
        ConfigError: it cannot be read, or starts no training that is known, or several.
    """
    text = _read(path)
    run = _Run(path, given or {})
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
        run.say(1, "note", "windows-lines", "its lines end as on Windows; bash would refuse it as it is")
    run.walk(read_tokens(path, text))
    return Script(path, run.only_launch(), tuple(run.exports.values()), tuple(run.findings))


def _read(path: str) -> str:
    file = Path(path)
    try:
        if not file.exists():
            mend = closest_path(path)
            raise ConfigError([Finding("error", "missing-file", "no such file", path, suggestion=mend)])
        if not file.is_file():
            raise syntax_error(path, "this is no regular file, expected a launch script")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise syntax_error(path, f"the file cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise syntax_error(path, f"the file has more than {MAX_BYTES} bytes; a launch script has fewer")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise syntax_error(path, "this is no text: it holds a NUL byte", line)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"the file is not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise syntax_error(path, message, line, None, "Save it as UTF-8") from error
    if not text.strip():
        raise syntax_error(path, "the file is empty")
    return text


@dataclass
class _Block:
    word: str
    line: int
    function: bool = False

    def __str__(self) -> str:
        what = "function" if self.function else f"`{self.word}`"
        return f"the {what} of line {self.line}"


@dataclass
class _Run:
    path: str
    given: Mapping[str, str]
    exports: dict[str, Export] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    others: list[tuple[str, int]] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    folder: str = ""

    def __post_init__(self) -> None:
        here = {"PWD": str(Path.cwd()), "HOME": str(Path.home())}
        self.variables = Variables(self.path, self.given, here)

    def say(self, line: int, level: str, code: str, message: str, mend: str = "") -> None:
        finding = Finding("note" if level == "note" else "warning", code, message, self.path, line,
                          suggestion=mend)  # fmt: skip
        if finding not in self.findings:
            self.findings.append(finding)

    # -- commands
    # ------------------------------------------------------------------------------------------------------

    def walk(self, tokens: Sequence[Token]) -> None:
        """Follow the script from top to bottom."""
        command: list[Word] = []
        before, harmless = ";", True  # the mark before this command, and whether what stands there can fail
        function = False
        for token in [*tokens, Mark(";", tokens[-1].line if tokens else 1)]:
            if isinstance(token, Word):
                opens = function and token.literal == "{" and not command
                if opens:
                    self.blocks.append(_Block("{", token.line, function=True))
                    function = False
                    continue
                command.append(token)
                continue
            if token.text == "(" and len(command) in (1, 2) and command[-1].literal:
                function = True  # name ( ) { … }
                command = []
                continue
            if function and token.text in (")", ";"):
                continue
            sure = before != "||" and (before != "&&" or harmless)
            if command:
                harmless = self._command(command, sure=sure, piped="|" in (before, token.text))
            command = []
            before = token.text
            if token.text == "(":
                self.blocks.append(_Block("(", token.line))
            elif token.text == ")" and self.blocks and self.blocks[-1].word == "(":
                self.blocks.pop()

    def _command(self, words: list[Word], *, sure: bool, piped: bool) -> bool:
        """Follow one command; return whether it is one that does not fail in a script that works."""
        start = 0
        while start < len(words) and (first := words[start].literal) in _KEYWORDS:
            if first in _OPENING:
                self.blocks.append(_Block(str(first), words[start].line))
            elif first in _CLOSING and self.blocks:
                self.blocks.pop()
            if first in ("for", "select", "case"):
                self._loop(words[start:])
                return False
            start += 1
        words = words[start:]
        if not words:
            return False
        first = words[0].literal
        if first == "function":
            self.blocks.append(_Block("function", words[0].line, function=True))
            return False
        assignments, words = self._assignments(words)
        doubt = self._doubt(sure)
        if not words:
            if not piped:  # in a pipe they are gone with its process
                for name, value in assignments.items():
                    self._assign(name, value, doubt)
            return True
        return self._run(words, assignments, doubt, piped=piped)

    def _loop(self, words: list[Word]) -> None:
        """A loop's variable has a value for each turn, so none that is known."""
        if len(words) > 1 and words[0].literal != "case" and words[1].literal:
            name, line = words[1].literal, words[0].line
            why = Unknown(f"{name} takes several values, in the loop of line {line}", line, self._give(name))
            self.variables.set(name, (Piece(f"${name}", line, why),))

    def _doubt(self, sure: bool) -> str:
        if self.blocks:
            return f"is set in {self.blocks[-1]}"
        return "" if sure else "is set only if another command succeeds or fails"

    def _give(self, name: str) -> str:
        return f"Give it: mm migrate {self.path} {name}=…"

    def _assignments(self, words: list[Word]) -> tuple[dict[str, tuple[Word, bool]], list[Word]]:
        """Split `A=1 B=2 command …` into name -> (word, whether it is appended to) and the command."""
        found: dict[str, tuple[Word, bool]] = {}
        for index, word in enumerate(words):
            match = _ASSIGNMENT.match(word.parts[0].text) if word.parts and not word.parts[0].quoted else None
            if match is None or word.parts[0].kind != "text":
                return found, words[index:]
            found[match[1]] = (word, bool(match[2]))
        return found, []

    def _assign(self, name: str, written: tuple[Word, bool], doubt: str) -> None:
        word, append = written
        if doubt:
            why = Unknown(f"{name} {doubt} (line {word.line})", word.line, self._give(name))
            self.variables.set(name, (Piece(f"${name}", word.line, why),))
        elif word.items is not None:
            items = [value for item in word.items for value in self.variables.fields(item)]
            self.variables.set_array(name, items, append=append)
        else:
            self.variables.set(name, self._right_side(word), append=append)

    def _right_side(self, word: Word) -> Value:
        head, *rest = word.parts
        text = head.text.partition("=")[2]
        return self.variables.joined(rest if not text else [replace(head, text=text), *rest])

    def _run(self, words: list[Word], assignments: Mapping[str, tuple[Word, bool]], doubt: str, *,
             piped: bool) -> bool:  # fmt: skip
        first, line = words[0].literal, words[0].line
        if first in _DECLARATIONS:
            self._declare(words, doubt)
        elif first in ("source", "."):
            names = [text_of(value) for word in words[1:2] for value in self.variables.fields(word)]
            if names:
                self.variables.sourced.append((line, names[0]))
                self.say(
                    line,
                    "note",
                    "not-followed",
                    f"{clip(names[0])} is not read: what it sets is unknown here",
                )
        elif first == "unset":
            for word in words[1:]:
                self.variables.values.pop(word.literal or "", None)
                self.variables.arrays.pop(word.literal or "", None)
        elif first in ("read", "mapfile", "readarray", "let"):
            for word in words[1:]:
                name = (word.literal or "").partition("=")[0]
                why = Unknown(f"`{first}` of line {line} sets {name}", line, self._give(name))
                self.variables.set(name, (Piece(f"${name}", line, why),))
        elif first == "cd" and not piped:
            self._change_folder(words, doubt)
        elif first not in ("echo", "printf", "grep", "awk", "sed"):
            self._program(words, assignments)
        return first in _HARMLESS

    def _declare(self, words: list[Word], doubt: str) -> None:
        exported = words[0].literal == "export"
        for word in words[1:]:
            plain = word.literal
            if plain is not None and plain.startswith("-"):
                exported = exported or "x" in plain
                continue
            found, _ = self._assignments([word])
            for name, written in found.items():
                self._assign(name, written, doubt)
            names = list(found) or ([plain] if plain and plain.isidentifier() else [])
            for name in names:
                if exported and (found or self.variables.is_set(name)):
                    value = self.variables.value(name, word.line, f"${name}")
                    self.exports.pop(name, None)
                    self.exports[name] = Export(name, value, word.line)

    def _change_folder(self, words: list[Word], doubt: str) -> None:
        target = [value for word in words[1:2] for value in self.variables.fields(word)]
        line = words[0].line
        if doubt or not target or unknown_of(target[0]) is not None or text_of(target[0]) == "-":
            mend = "Run `mm migrate` from the folder in which training starts"
            text = "this `cd` is not followed: relative paths are taken from the working directory"
            self.say(line, "warning", "not-followed", text, mend)
            return
        self.folder = str(PurePosixPath(self.folder) / text_of(target[0]))

    # -- what is started
    # ------------------------------------------------------------------------------------------------------

    def _program(self, words: list[Word], assignments: Mapping[str, tuple[Word, bool]]) -> None:
        line = words[0].line
        values: list[Value] = []
        for word in words:
            values += self.variables.fields(word)
            if len(values) > _MAX_WORDS:
                raise syntax_error(self.path, f"a command of more than {_MAX_WORDS} words", line)
        texts = [text_of(value) for value in values]
        names = [PurePosixPath(text).name for text in texts]
        at = next((index for index, name in enumerate(names) if name in (*TRAINING, *OTHERS)), None)
        if at is None and "mm_core" in texts and texts[texts.index("mm_core") - 1] == "-m":
            at = texts.index("mm_core")
            at = at + 1 if texts[at + 1 : at + 2] == ["train"] else None
            if at is not None:
                names[at] = "mm_core train"
        if at is None:
            starts = next((name for name in names if name.endswith(".py")), None)
            if starts and names[0] in ("torchrun", "python", "python3", "accelerate", "deepspeed", "msrun"):
                self.others.append((starts, line_of(values[names.index(starts)], line)))
            return
        place = line_of(values[at], line)
        if names[at] in OTHERS:
            self.others.append((names[at], place))
            return
        for name, (word, _) in assignments.items():
            value = self._right_side(word) if word.items is None else ()
            self.exports[name] = Export(name, value, word.line)
        block = str(self.blocks[-1]) if self.blocks else ""
        launch = Launch(names[at], place, tuple(values[:at]), tuple(values[at + 1 :]), self.folder, block)
        self.launches.append(launch)

    def only_launch(self) -> Launch:
        """Return the one command that starts training."""
        if len(self.launches) == 1:
            launch = self.launches[0]
            if launch.block:
                text = f"training starts in {launch.block}: it is taken as if that ran once"
                self.say(launch.line, "note", "not-followed", text)
            return launch
        if self.launches:
            lines = " and ".join(str(launch.line) for launch in self.launches)
            message = f"training starts more than once, in lines {lines}"
            line, mend = self.launches[1].line, "Make a copy of the script that holds one of them"
            raise syntax_error(self.path, message, line, None, mend)
        known = " or ".join(TRAINING)
        if not self.others:
            message = f"it starts no training: no command runs {known}"
            raise syntax_error(self.path, message, None, None, "Name the script that starts training")
        name, line = self.others[0]
        why = OTHERS.get(name, f"only {known} are known")
        raise syntax_error(
            self.path, f"it starts {clip(name)}, which is no training that is known here: {why}", line
        )
