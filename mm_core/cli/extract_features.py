"""`mm extract-features`: latents and embeddings of a job's videos and captions, stored for training."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from mm_core.cli.flag_parser import FlagParser
from mm_core.cli.generate_ranks import rank_count, run_ranks
from mm_core.cli.options import take_option
from mm_core.cli.tables import json_text, printable
from mm_core.config.document import expanded
from mm_core.config.environment import whole_number
from mm_core.config.extraction_job import ExtractionJob, load_extraction_job
from mm_core.config.flags import TrainFlags
from mm_registry.errors import UserError
from mm_registry.suggestions import closest

log = logging.getLogger(__name__)

_OWN = (
    "--output",
    "--what",
    "--clips-per-video",
    "--items-per-shard",
    "--nproc-per-node",
    "--format",
)
_HALVES = ("video", "text")
_LARGEST = 100_000
_HELP = """\
usage: mm extract-features --mm-model FILE --mm-data FILE --output FOLDER [OPTIONS] [FLAGS OF mm train] [key.path=value...]
       mm extract-features job.yaml --output FOLDER [OPTIONS] [FLAG_OR_OVERRIDE...]

Encode each clip and each caption of a training job's set once: latents, conditions of given frames and embeddings go into
safetensors shards, beside an index.json that training reads (load_video_features, load_text_features). After a kill, the
same command goes on with what is missing, on any number of ranks.

--output FOLDER          where the features go (default: sorafeature.save_path of tools.json)
--what video,text        what is stored (default: both)
--clips-per-video N      clips drawn of a video that is longer than one (default: 1)
--items-per-shard N      clips or captions in a file (default: 32)
--nproc-per-node N       ranks that this command starts on this machine; or start it with torchrun
--num-workers N          processes of each rank that decode, as in mm train
--seed N                 of the frames that are drawn, as in mm train
--format text|json       of what is printed (default: text)
"""


def run(argv: list[str]) -> int:
    """Extract what the command line names, say what was stored, and return 0.

    Raises:
        UserError: the command line or the job is wrong, or `mm_core.training.extraction.extract` raises it.
    """
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    options, rest = _options(argv)
    _refuse_misspelt(rest)
    what = _halves(options.what)

    def load() -> ExtractionJob:
        return load_extraction_job(rest, what)

    if rank_count(options) > 1:
        return int(run_ranks(argv, options, load, lambda job: _extract(job, options), "extract-features"))
    return _extract(load(), options)


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the words for the flags of training."""
    own: list[str] = []
    rest = [_hyphens(word) for word in argv]
    for name in _OWN:
        value, rest = take_option(rest, name)
        if value is not None:
            own += [name, value]
    parser = FlagParser("mm extract-features")
    parser.add_argument("--output")
    parser.add_argument("--what", default=",".join(_HALVES))
    for name, default in (("--clips-per-video", 1), ("--items-per-shard", 32), ("--nproc-per-node", None)):
        parser.add_argument(name, type=_count, default=default)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser.parse(own), rest


def _refuse_misspelt(words: list[str]) -> None:
    """A misspelling of one of this command's own options, which the flags of `mm train` are no help against."""
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") not in TrainFlags.model_fields:
            near = closest(flag, _OWN, 1)
            if near:
                raise UserError(
                    f"{flag}: there is no such flag of mm extract-features; did you mean {near[0]}?"
                )


def _hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    name = name.replace("_", "-") if name.startswith("--") else name
    return name + equals + value if name in _OWN else word


def _halves(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    wrong = next((name for name in names if name not in _HALVES), None)
    if wrong is not None:
        raise UserError(f"--what {text}: {wrong!r} cannot be extracted; write video, text or video,text")
    return names


def _folder(job: ExtractionJob, options: argparse.Namespace) -> Path:
    place = options.output or job.output
    if place is None:
        raise UserError(
            "mm extract-features: nothing says where features go; add --output FOLDER, or sorafeature.save_path to tools.json"
        )
    return expanded(place)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_LARGEST}")
    return int(text)


def _extract(job: ExtractionJob, options: argparse.Namespace) -> int:
    from mm_core.observe.console import setup_logging  # imports torch: only once everything written is right
    from mm_core.training.extraction import extract

    rank = whole_number("RANK", 0) or 0
    setup_logging(rank)
    for finding in job.findings:
        log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding)
    done = extract(
        job,
        _folder(job, options),
        clips_per_video=options.clips_per_video,
        items_per_shard=options.items_per_shard,
    )
    if rank:
        return 0
    if options.format == "json":
        told = {name: getattr(done, name) for name in ("samples", "clips", "prompts", "unreadable", "made")}
        sys.stdout.write(json_text({"index": str(done.index), **told}))
        return 0
    left = f", {done.unreadable} clips could not be read" if done.unreadable else ""
    sys.stdout.write(
        printable(
            f"{done.index}: {done.samples} samples, {done.clips} clips, {done.prompts} prompts; {done.made} of them made "
            f"now{left}\n"
        )
    )
    return 0
