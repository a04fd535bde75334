"""`mm data inspect FILE…`: what videos and images a job would be trained on, and what would be left out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import output_format, take_option
from mm_core.cli.tables import json_text, printable, table
from mm_core.config.findings import ConfigError, Finding
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.data.inspection import Inspected, Inspection

_HELP = """\
usage: mm data inspect FILE... [OPTIONS]

Say what a set of videos and images gives: clips per bucket (frames × height × width), what is left out and why, lengths of
captions in tokens. FILE is data.json or a job file, or annotations (.txt, .csv, .parquet, .jsonl, .json): these are shown
as the files are, for they have no rules.

--micro-batch-size N  also say how many samples fill no micro batch of N; by default that of the job file
--decode              read a clip of every sample, which finds damaged files, and takes as long
--contact-sheet PNG   draw frames of some samples as training gets them
--rows N              samples on the contact sheet (16)
--limit N             look at the first N annotations only
--seed N              of drop_short_ratio and of the frames that are shown; by default that of the job file, else 1234
--all                 list every sample that is left out, not only the first 5 of each rule
--format json         everything as data
"""
_SEED = 1234  # the default of --seed of mm train
_ANNOTATIONS = (".txt", ".csv", ".parquet", ".jsonl")
_SHOWN, _SHEET_ROWS = 5, 16


def run(argv: list[str]) -> int:
    """Print what was found in each file; return 0."""
    if argv[:1] != ["inspect"] or "-h" in argv or "--help" in argv:
        if argv and argv[0] not in ("inspect", "-h", "--help"):
            raise UserError(f"mm data: there is no command {argv[0]!r}; write `mm data inspect FILE`.")
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    form, rest = output_format(argv[1:], ("text", "json"))
    sheet, rest = take_option(rest, "--contact-sheet")
    numbers: dict[str, int | None] = {}
    for name in ("--micro-batch-size", "--limit", "--seed", "--rows"):
        text, rest = take_option(rest, name)
        numbers[name] = _whole(name, text, least=0 if name == "--seed" else 1)
    switches = {name: name in rest for name in ("--decode", "--all")}
    files = [word for word in rest if word not in switches]
    _check_words(files, sheet)

    from mm_core.data.inspection import inspect  # imports torch: only once the words are right

    found: list[dict[str, Any]] = []
    for file in files:
        dataset, micro_batch = _dataset(file, numbers["--seed"])
        micro_batch = numbers["--micro-batch-size"] or micro_batch
        if numbers["--limit"] is not None:
            del dataset.annotations[numbers["--limit"] :]
        result = inspect(dataset, decode=switches["--decode"], progress=_progress(len(dataset.annotations)))
        if sheet is not None:
            _draw(Path(sheet), dataset, result, numbers["--rows"] or _SHEET_ROWS)
        if form == "json":
            found.append({"file": file, **_data(result, dataset, micro_batch)})
        else:
            shown = None if switches["--all"] else _SHOWN
            sys.stdout.write(printable(_text(file, result, dataset, micro_batch, shown)))
    if form == "json":
        sys.stdout.write(json_text(found))
    return 0


def _dataset(file: str, seed: int | None) -> tuple[Inspected, int | None]:
    """The set that a file names, and the size of a micro batch if the file says it."""
    if _is_annotations(file):
        from mm_core.data.t2v_parts import inspected_files

        return inspected_files(file), None
    from mm_core.config.dataset_file import read_dataset_file
    from mm_registry.manager import default_manager

    read = read_dataset_file(file)
    for finding in read.findings:
        sys.stderr.write(printable(f"{finding}\n"))
    cls: Any = default_manager().load(read.component.spec)
    inspected = getattr(cls, "inspected", None)
    if inspected is None:
        raise UserError(
            f'{file}: a dataset of type "{read.component.model_id}" cannot be inspected; {cls.__name__} has no method `inspected`'
        )
    seed = next(s for s in (seed, read.seed, _SEED) if s is not None)
    return inspected(seed=seed, **read.component.fields), read.micro_batch_size


def _is_annotations(file: str) -> bool:
    """Whether a file holds annotations or names files that do: by its ending, and JSON by its being a list."""
    if file.lower().endswith(_ANNOTATIONS):
        return True
    try:
        with Path(file).open(encoding="utf-8-sig") as stream:
            return file.lower().endswith(".json") and stream.read(4096).lstrip().startswith("[")
    except (OSError, ValueError):
        return False  # said when it is read


def _data(result: Inspection, dataset: Inspected, micro_batch: int | None) -> dict[str, Any]:
    captions = result.captions
    lengths = {
        "least": captions.quantile(0.0), "median": captions.quantile(0.5), "p90": captions.quantile(0.9),
        "most": captions.quantile(1.0),
    }  # fmt: skip
    return {
        "set": result.name,
        "samples": result.total,
        "kept": len(result.samples),
        "images": result.images,
        "video_seconds": round(result.seconds, 3),
        "buckets": [
            {"frames": shape.frames, "height": shape.height, "width": shape.width, "samples": count}
            | ({} if micro_batch is None else {"stay_out": count % micro_batch})
            for shape, count in result.buckets.most_common()
        ],
        "left_out": [
            {"at": item.origin, "path": item.path, "rule": item.rule, "reason": item.reason}
            for item in result.left_out
        ],
        "captions": {
            "texts": captions.texts,
            "empty": captions.empty,
            "tokens": lengths if captions.tokens else None,
            "cut": captions.cut if captions.tokens else None,
            "limit": captions.limit,
            "not_counted": dataset.no_tokens or None,
        },
    }


def _text(
    file: str, result: Inspection, dataset: Inspected, micro_batch: int | None, shown: int | None
) -> str:
    kept, videos = len(result.samples), len(result.samples) - result.images
    lines = [
        f"{file}: {result.total} samples of {result.name}: {kept} kept ({videos} videos of {_clock(result.seconds)} in all, "
        f"{result.images} images), {len(result.left_out)} left out\n"
    ]
    if result.samples:
        header = ["frames × height × width", "samples", "share"]
        rows = [[str(s), str(n), f"{n / kept:.1%}"] for s, n in result.buckets.most_common()]
        if micro_batch is not None:
            header.append(f"fill no micro batch of {micro_batch}")
            for row, (_, count) in zip(rows, result.buckets.most_common(), strict=True):
                row.append(str(count % micro_batch))
        lines += ["\nbuckets\n", table(header, rows, indent="  ")]
    for rule, count in result.rules.most_common():
        items = [item for item in result.left_out if item.rule == rule]
        lines.append(f"\nleft out, {rule}: {count}\n")
        lines += [f"  {item.origin}: {item.path}: {item.reason}\n" for item in items[:shown]]
        if shown is not None and count > shown:
            lines.append(f"  … and {count - shown} more (--all)\n")
    captions = result.captions
    lines.append(f"\ncaptions: {captions.texts}, of which {captions.empty} empty\n")
    if captions.tokens:
        least, median, most, top = (captions.quantile(share) for share in (0.0, 0.5, 0.9, 1.0))
        lines.append(
            f"  tokens: at least {least}, half of them at most {median}, 90% at most {most}, all at most {top}; "
            f"{captions.cut} have more than {captions.limit} (model_max_length) and are cut\n"
        )
    elif dataset.no_tokens:
        lines.append(f"  tokens are not counted: {dataset.no_tokens}\n")
    return "".join(lines)


def _draw(path: Path, dataset: Inspected, result: Inspection, rows: int) -> None:
    from mm_core.data.contact_sheet import write_contact_sheet
    from mm_core.data.inspection import spread

    try:
        write_contact_sheet(path, spread(result.samples, rows), dataset.rules, dataset.reader)
    except OSError as error:
        raise UserError(f"--contact-sheet {path} cannot be written: {error.strerror or error}") from error


def _check_words(files: list[str], sheet: str | None) -> None:
    flag = next((word for word in files if word.startswith("-")), None)
    if flag is not None:
        raise _mistake(flag, "unknown-flag", "there is no such flag", "See `mm data inspect --help`")
    if not files:
        raise _mistake(
            "mm data inspect", "missing-file", "a file is required", "Write `mm data inspect data.json`"
        )
    if sheet is not None and len(files) > 1:
        text = f"there is one picture for {len(files)} files"
        raise _mistake("--contact-sheet", "wrong-value", text, "Give one file")
    if sheet is not None and not sheet.lower().endswith(".png"):
        raise _mistake("--contact-sheet", "wrong-value", f'"{sheet}" is no PNG file', "Let it end in .png")


def _progress(total: int) -> Any:
    """A counter for people who wait, None where nobody does."""
    if not sys.stderr.isatty() or total < 100:
        return None

    def tell(done: int) -> None:
        if done % 50 == 0 or done == total:
            sys.stderr.write(f"\r{done} of {total}" + ("\r" + " " * 30 + "\r" if done == total else ""))

    return tell


def _whole(name: str, text: str | None, *, least: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and least <= int(text) < 2**62):
        raise _mistake(
            name, "wrong-value", f'"{text}" is no number for it', f"Write a whole number from {least}"
        )
    return int(text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _mistake(flag: str, code: str, text: str, mend: str) -> ConfigError:
    return ConfigError([Finding("error", code, text, path=flag, suggestion=mend)])
