"""`mm generate` of a chat model: replies to one prompt, or to each row of a file."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from mm_core.cli.flag_parser import FlagParser
from mm_core.config.document import expanded
from mm_core.config.dtypes import short_dtype
from mm_core.config.kinds import Kind, detect_kind, without_schema
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.generation.chat import Reply
    from mm_core.generation.chat_requests import ChatRequest

log = logging.getLogger(__name__)

_DTYPES = ("bf16", "fp16", "fp32")
_LIMITS = (
    "image_max_pixels",
    "image_min_pixels",
    "video_max_pixels",
    "video_min_pixels",
    "video_fps",
    "video_maxlen",
)


def is_chat(argv: Sequence[str]) -> bool:
    """Return whether a command line asks a chat model: it names a folder (`--model`), a run and no model file, or the model
    file of one.
    """
    values: dict[str, str | None] = {}
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values[name.replace("_", "-")] = value if equals else following
    if "--repeat" in values:
        return False
    if "--model" in values:
        return True
    file = values.get("--mm-model")
    if file is None:
        return "--mm-model" not in values and "--load" in values
    try:
        from mm_core.config.document import read_document

        return detect_kind(without_schema(read_document(file))) is Kind.TRANSFORMERS
    except UserError:
        return False  # what is wrong with the file is said when it is read


def help_text() -> str:
    """Return what `mm generate --help` says of chat models."""
    return _parser().format_help()


def flags() -> list[str]:
    """Return the flags of a chat model's command line."""
    return _parser().flags()


def _parser() -> FlagParser:
    parser = FlagParser(
        "mm generate",
        "mm generate for a chat model",
        prog="mm generate (chat models)",
        description="Reply to a prompt with images and videos, as it comes, or to each row of a file of JSON Lines.",
        add_help=False,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER",
        help="model in Hugging Face layout, with weights, tokenizer and processor",
    )
    add("--mm-model", metavar="FILE", help="instead of --model: model file of a training job")
    add("--load", metavar="PATH", help="run or checkpoint, which needs no --model, or folder of weights")
    add(
        "--lora-load",
        metavar="PATH",
        help="adapter to add: PEFT's folder, or a run that was trained with LoRA",
    )
    add(
        "--ema",
        action="store_true",
        help="use the averaged weights of the checkpoint (--ema-decay of mm train)",
    )
    add("--init", choices=("random",), help="random weights, to see what an untrained model says")
    add(
        "--prompt",
        metavar="TEXT",
        help="what the user says; <image> and <video> say where pictures stand in it",
    )
    add("--image", metavar="FILE", nargs="+", action="extend", help="images of the prompt, in order")
    add("--video", metavar="FILE", nargs="+", action="extend", help="videos of the prompt, in order")
    add("--system", metavar="TEXT", help="system prompt")
    add(
        "--input",
        metavar="FILE",
        help="JSON Lines, one conversation a row: prompt, images, videos, system; or messages, tools",
    )
    add("--output", metavar="FILE", help="JSON Lines, each row of --input with its reply; not overwritten")
    add(
        "--template",
        metavar="ID",
        help="chat template (default: that of the run, else of the model's family)",
    )
    add(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        help="whether replies begin with thoughts, where the template has them",
    )
    add("--max-new-tokens", type=int, metavar="N", help="tokens of a reply, at most (default: 512)")
    add("--temperature", type=float, metavar="X", help="draw tokens; 0: take the likeliest each time")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="draw from the likeliest tokens that have this share together",
    )
    add("--top-k", type=int, metavar="N", help="draw from this many tokens; 0: all")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: less of what was said already")
    add(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn, and of random weights (default 0)"
    )
    add("--dtype", choices=_DTYPES, type=short_dtype, help="of the weights (default: what config.json says)")
    for name in _LIMITS:
        kind = float if name == "video_fps" else int
        add(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar="X",
            help="as in preprocess_parameters of a data file",
        )
    add("--use-deter-comp", action="store_true", help="deterministic kernels only")
    return parser


def run(argv: Sequence[str]) -> int:
    """Check the command line and the questions, then build the model and reply.

    Raises:
        UserError: something is wrong with them.
    """
    options = _parser().parse(argv)
    _check(options)
    from mm_core.generation.chat_requests import read_requests, request_of

    if options.input is not None:
        requests = read_requests(options.input)
    else:
        requests = [
            request_of(
                options.prompt, images=options.image or (), videos=options.video or (), system=options.system
            )
        ]
    return _reply(options, requests)


def _check(options: argparse.Namespace) -> None:
    if options.model and options.mm_model:
        raise UserError("--mm-model: --model names the model already; leave one of them out.")
    if (options.prompt is None) == (options.input is None):
        raise UserError(
            "mm generate needs a question: --prompt TEXT, or --input FILE with one a row; one of them."
        )
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt: it is empty; say what the model is asked.")
    for name in ("image", "video", "system"):
        if options.input is not None and getattr(options, name):
            raise UserError(f"--{name} goes with --prompt; in a file each row has its own.")
    if options.output is not None and options.input is None:
        raise UserError("--output goes with --input; the reply to a --prompt is printed.")
    if options.output is not None and expanded(options.output).exists():
        raise UserError(f"--output {options.output}: it exists already and is not overwritten.")
    if options.init == "random" and (options.load or options.lora_load):
        raise UserError("--init random: --load and --lora-load name weights; leave one of them out.")
    for name, least in (
        ("max_new_tokens", 1), ("top_k", 0), ("temperature", 0), ("video_maxlen", 1),
        ("image_max_pixels", 1), ("image_min_pixels", 0), ("video_max_pixels", 1), ("video_min_pixels", 0),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be a number of at least {least}.")
    for name, most in (("top_p", 1.0), ("repetition_penalty", math.inf), ("video_fps", math.inf)):
        value = getattr(options, name)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            limit = f" and at most {most:g}" if math.isfinite(most) else ""
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0{limit}.")
    if options.temperature == 0 and (options.top_p is not None or options.top_k is not None):
        raise UserError("--temperature 0 takes the likeliest token each time; leave --top-p and --top-k out.")


def _reply(options: argparse.Namespace, requests: Sequence[ChatRequest]) -> int:
    from mm_core.accelerator import Accelerator  # imports torch: only once everything written is right
    from mm_core.generation.chat import Sampling
    from mm_core.generation.chat_build import ChatSources, build_chat
    from mm_core.observe.console import setup_logging

    setup_logging(0)
    if options.use_deter_comp:
        Accelerator.current().deterministic()
    sources = ChatSources(
        model=options.model,
        mm_model=options.mm_model,
        load=options.load,
        lora_load=options.lora_load,
        ema=options.ema,
        init=options.init,
        template=options.template,
        limits={name: getattr(options, name) for name in _LIMITS},
        dtype=options.dtype,
    )
    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.top_k,
        options.repetition_penalty,
    )
    chat = build_chat(sources, seed=options.seed)
    shared: dict[str, Any] = {
        "sampling": sampling, "seed": options.seed, "enable_thinking": options.enable_thinking,
    }  # fmt: skip
    if options.input is None:
        reply = chat.reply(requests[0], **shared, on_text=_say)
        sys.stdout.write("\n")
        if not reply.finished:
            log.info("cut off after %d tokens; --max-new-tokens N allows more", reply.tokens)
        return 0
    with _opened(options.output) as stream:
        for index, request in enumerate(requests):
            reply = chat.reply(request, **shared, index=index)
            stream.write(_row(request, reply))
            stream.flush()  # what is done stays, whatever happens to the rest
    log.info("%d replies%s", len(requests), f" in {options.output}" if options.output else "")
    return 0


@contextmanager
def _opened(output: str | None) -> Iterator[TextIO]:
    """The file of the replies; without one, the terminal."""
    if output is None:
        yield sys.stdout
        return
    target = expanded(output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = target.open("x", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {output}: it cannot be written: {(error.strerror or str(error)).lower()}"
        ) from error
    with stream:
        yield stream


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _row(request: ChatRequest, reply: Reply) -> str:
    row = {
        **(request.row or {}),
        "reply": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": reply.tokens,
        "finished": reply.finished,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
