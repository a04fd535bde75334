"""`mm generate`."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mm_core.cli import generate_chat
from mm_core.cli.flag_parser import FlagParser
from mm_core.cli.generate_ranks import rank_count, run_ranks
from mm_core.config import GenerationJob, load_generation_job
from mm_core.config.environment import check_environment, whole_number
from mm_core.config.findings import ConfigError, Finding, has_errors
from mm_core.config.generate_flags import classic_flag_names, take_classic_flags
from mm_core.config.generation_job import repeated_generation_job
from mm_core.config.generation_record import read_recorded
from mm_core.config.parallel import CONTEXT_ALGORITHMS, ParallelSizes
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


def _parser() -> FlagParser:
    parser = FlagParser(
        "mm generate",
        description="Write one MP4 for each prompt, and beside it a JSON that says how to make it again.",
        epilog="With --model FOLDER, with the model file of a chat model, or with --load RUN alone it replies to prompts with "
        "images and videos instead, with the flags below. "
        "Flags of MindSpeed-MM's inference scripts, which `mm train --help` lists, are accepted as well: what "
        "only training reads gets a note, and what would change the videos is refused.",
    )
    add = parser.add_argument
    add("--mm-model", metavar="FILE", help="inference file: pipeline_class, components, tokenizer")
    add(
        "--repeat",
        metavar="FILE",
        help="instead of --mm-model: the JSON beside a video, which is made again; other flags change it",
    )
    add("--prompt", metavar="TEXT", help="a text, or a .txt file with one prompt a line; else the file's")
    add("--negative-prompt", metavar="TEXT", help="what guidance moves away from")
    add(
        "--image",
        metavar="FILE",
        nargs="+",
        help="first frame: a file, several, or a .txt file with one a line; as many as prompts, or one for all",
    )
    add("--last-image", metavar="FILE", nargs="+", help="last frame, as --image; for models of both ends")
    add(
        "--load",
        metavar="PATH",
        nargs="+",
        help="run, checkpoint or folder of weights for the predictor; two: high-noise and low-noise expert",
    )
    add(
        "--lora-load",
        metavar="PATH",
        nargs="+",
        help="adapter to add to the predictor: PEFT's folder, or a run that was trained with LoRA; two: for both experts",
    )
    add(
        "--ema",
        action="store_true",
        help="use the averaged weights of the checkpoint (--ema-decay of mm train)",
    )
    add("--save-path", metavar="PATH", help="folder of the videos, or a name ending in .mp4")
    add("--seed", type=int, metavar="N", help="of the noise (default: pipeline_config.seed, else 0)")
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    add(
        "--guidance-scale",
        type=float,
        nargs="+",
        metavar="X",
        help="one number, or two: high-noise and low-noise expert",
    )
    add(
        "--batch-size",
        "--micro-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="videos made together (default 1)",
    )
    add("--nproc-per-node", type=int, metavar="N", help="ranks to start, to which videos are dealt out")
    add(
        "--context-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share each video (default 1)",
    )
    add(
        "--context-parallel-algo",
        choices=tuple(CONTEXT_ALGORITHMS),
        help="how they exchange in attention (default ulysses_cp_algo)",
    )
    add("--use-deter-comp", action="store_true", help="deterministic kernels only")
    return parser


def _own(parser: FlagParser) -> set[str]:
    """Attributes of the parser's flags."""
    return {flag.removeprefix("--").replace("-", "_") for flag in parser.flags()}


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Finding]]:
    """Parse, with underscores accepted for hyphens, and a suggestion for an unknown flag. Flags of MindSpeed-MM's
    scripts are taken out first; what there is to say about them is returned.
    """
    parser = _parser()
    parser.set_defaults(indices=None)
    argv, findings = take_classic_flags(argv, _own(parser))
    return parser.parse(argv, [*generate_chat.flags(), *classic_flag_names(_own(parser))]), findings


def run(argv: list[str]) -> int:
    """Check the inference file without torch, then build the pipeline and write the videos."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(f"{_parser().format_help()}\n{generate_chat.help_text()}")
        return 0
    if generate_chat.is_chat(argv):
        return generate_chat.run(argv) if _is_alone() else 0
    options, findings = _parse(argv)
    _check(options)

    def load() -> GenerationJob:
        return _load(options, findings)

    if rank_count(options) > 1:
        return int(run_ranks(argv, options, load, lambda job: _generate(job, options, findings)))
    return _generate(load(), options, findings)


def _check(options: argparse.Namespace) -> None:
    if (options.mm_model is None) == (options.repeat is None):
        raise UserError(
            "mm generate needs --mm-model FILE (an inference file), or --repeat FILE (the JSON of a video); one of them."
        )
    for flag in ("num_inference_steps", "batch_size", "nproc_per_node", "context_parallel_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: it must be at least 1.")
    for flag in ("guidance_scale", "load", "lora_load"):
        if len(getattr(options, flag) or ()) > 2:
            what = "number" if flag == "guidance_scale" else "path"
            raise UserError(
                f"--{flag.replace('_', '-')}: give one {what}, or two (high-noise and low-noise expert)."
            )
    if not all(map(math.isfinite, options.guidance_scale or ())):
        raise UserError(f"--guidance-scale {options.guidance_scale}: it must be a finite number.")
    ranks, share = rank_count(options), options.context_parallel_size
    if ranks % share:
        raise UserError(
            f"--context-parallel-size {share}: it does not divide the {ranks} rank{'s' if ranks > 1 else ''} that there "
            f"{'are' if ranks > 1 else 'is'}; give --nproc-per-node {share}, or start as many with torchrun."
        )


def _load(options: argparse.Namespace, findings: list[Finding]) -> GenerationJob:
    """Check the inference file, with what the command line says over it."""
    overrides = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "image": _one_or_all(options.image),
        "last_image": _one_or_all(options.last_image),
        "load": _one_or_all(options.load),
        "save_path": options.save_path,
    }
    findings += _wrong_variables()
    if options.repeat is None:
        return load_generation_job(options.mm_model, overrides)
    recorded = read_recorded(options.repeat)
    for name, value in recorded.settings.items():
        if getattr(options, name) is None or getattr(options, name) is False:  # 0 is a seed
            setattr(options, name, value)
    options.indices = recorded.indices
    return repeated_generation_job(recorded.source, {**recorded.overrides, **_given(overrides)})


def _one_or_all(values: list[str] | None) -> str | list[str] | None:
    return values[0] if values is not None and len(values) == 1 else values


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if value is not None}


def _is_alone() -> bool:
    """Whether this process does everything by itself.

    Raises:
        UserError: on rank 0 of several.
    """
    ranks = whole_number("WORLD_SIZE", 1)
    if ranks > 1 and whole_number("RANK", 0) == 0:
        raise UserError(
            f"mm generate works in one process, and {ranks} were started (WORLD_SIZE={ranks}); start one "
            "(torchrun --nproc_per_node 1), or several commands, each with its own prompts and its own place to save."
        )
    return ranks <= 1


def _wrong_variables() -> list[Finding]:
    findings = [finding for finding in check_environment() if finding.level != "note"]
    if has_errors(findings):
        raise ConfigError(findings)
    return findings


def _generate(job: GenerationJob, options: argparse.Namespace, findings: Iterable[Finding] = ()) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from mm_core.accelerator import Accelerator
    from mm_core.generation import generate  # imports torch: only once everything written is right
    from mm_core.generation.sharing import patient_group, share_work
    from mm_core.observe.console import console, setup_logging
    from mm_core.weights.agreement import everywhere, rank

    setup_logging(rank())
    for finding in (*findings, *job.findings):
        log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding)
    if options.use_deter_comp:
        Accelerator.current().deterministic()
    guidance = options.guidance_scale
    columns = (
        TextColumn("generating"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    algorithm = CONTEXT_ALGORITHMS[options.context_parallel_algo or "ulysses_cp_algo"]
    sharing = share_work(ParallelSizes(cp=options.context_parallel_size, cp_algo=algorithm))
    group = patient_group()
    shown = console.is_terminal and rank() == 0
    with Progress(*columns, console=console, refresh_per_second=2, disable=not shown) as bar:
        task = bar.add_task("generating", total=None)
        paths = generate(
            job,
            indices=options.indices,
            seed=options.seed,
            lora=options.lora_load or (),
            ema=options.ema,
            steps=options.num_inference_steps,
            guidance_scale=guidance[0] if guidance and len(guidance) == 1 else guidance,
            batch_size=options.batch_size,
            sharing=sharing,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    everyone = [path for written in everywhere([str(path) for path in paths], group) for path in written]
    if rank() == 0:
        sys.stdout.write("".join(f"{path}\n" for path in sorted(everyone, key=_by_number)))
    return 0


def _by_number(path: str) -> list[tuple[int, str]]:
    """Sort key of a path in which 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
