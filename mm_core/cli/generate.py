"""`mm generate`."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Sequence

from mm_core.cli import generate_chat
from mm_core.cli.flag_parser import FlagParser
from mm_core.config import GenerationJob, load_generation_job
from mm_core.config.environment import check_environment, whole_number
from mm_core.config.findings import ConfigError, Finding, has_errors
from mm_core.config.generate_flags import classic_flag_names, take_classic_flags
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
    add(
        "--mm-model",
        metavar="FILE",
        required=True,
        help="inference file: pipeline_class, components, tokenizer",
    )
    add("--prompt", metavar="TEXT", help="a text, or a .txt file with one prompt a line; else the file's")
    add("--negative-prompt", metavar="TEXT", help="what guidance moves away from")
    add("--load", metavar="PATH", help="run, checkpoint or folder of weights for the predictor")
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
    if not _is_alone():
        return 0  # rank 0 says it; the launcher would kill it before, if another rank failed first
    for flag in ("num_inference_steps", "batch_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: it must be at least 1.")
    if options.guidance_scale and len(options.guidance_scale) > 2:
        raise UserError("--guidance-scale: give one number, or two (high-noise and low-noise expert).")
    if not all(map(math.isfinite, options.guidance_scale or ())):
        raise UserError(f"--guidance-scale {options.guidance_scale}: it must be a finite number.")
    job = load_generation_job(
        options.mm_model,
        {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "load": options.load,
            "save_path": options.save_path,
        },
    )
    return _generate(job, options, [*findings, *_wrong_variables()])


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


def _wrong_variables() -> Iterable[Finding]:
    findings = [finding for finding in check_environment() if finding.level != "note"]
    if has_errors(findings):
        raise ConfigError(findings)
    return findings


def _generate(job: GenerationJob, options: argparse.Namespace, findings: Iterable[Finding] = ()) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from mm_core.accelerator import Accelerator
    from mm_core.generation import generate  # imports torch: only once everything written is right
    from mm_core.observe.console import console, setup_logging

    setup_logging(0)
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
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task("generating", total=None)
        paths = generate(
            job,
            seed=options.seed,
            ema=options.ema,
            steps=options.num_inference_steps,
            guidance_scale=guidance[0] if guidance and len(guidance) == 1 else guidance,
            batch_size=options.batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for path in paths:
        sys.stdout.write(f"{path}\n")
    return 0
