"""`mm convert`: weights of a run, of MindSpeed-MM or of a Hugging Face folder as a new Hugging Face folder."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mm_core.cli.flag_parser import FlagParser
from mm_core.cli.tables import json_text, printable
from mm_core.config.component_file import SECTIONS
from mm_core.config.document import expanded
from mm_core.config.dtypes import short_dtype
from mm_registry.errors import UserError
from mm_registry.suggestions import closest

if TYPE_CHECKING:
    from mm_core.weights.convert import Conversion

_DTYPES = ("bf16", "fp16", "fp32")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", re.IGNORECASE)


def _parser() -> FlagParser:
    parser = FlagParser(
        "mm convert",
        description="Write weights as a folder that diffusers and transformers load: safetensors files and config.json. "
        "One process and no device; memory holds a few tensors.",
    )
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        metavar="PATH",
        required=True,
        help="a run or one of its checkpoints; a checkpoint folder of MindSpeed-MM or its model_optim_rng.pt; or a "
        "Hugging Face folder",
    )
    add("--to", dest="folder", metavar="FOLDER", required=True, help="the new folder; nothing is overwritten")
    add(
        "--mm-model",
        metavar="FILE",
        help="model file with the component's section, which a checkpoint of MindSpeed-MM does not carry",
    )
    add(
        "--component",
        choices=tuple(SECTIONS),
        help="which component (default: that of the run, else predictor)",
    )
    add(
        "--dtype",
        type=_dtype,
        metavar="{" + ",".join(_DTYPES) + "}",
        help="of all floating-point tensors (default: as they came)",
    )
    add(
        "--merge-lora",
        action="store_true",
        help="of a run with LoRA write the whole network with the adapter added (default: the adapter's folder)",
    )
    add("--base", metavar="FOLDER", help="weights under the adapter, if they lie elsewhere than in training")
    add("--ema", action="store_true", help="take the averaged weights of a run")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="bytes of one file, such as 500MB or 10GiB")
    add("--format", choices=("text", "json"), default="text", help="of what is printed (default: text)")
    return parser


def _dtype(text: str) -> str:
    dtype: str = short_dtype(text)
    if dtype in _DTYPES:
        return dtype
    near = closest(dtype, _DTYPES, 1)
    mend = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_DTYPES)}"
    raise argparse.ArgumentTypeError(f"{dtype!r} is no dtype that is written; {mend}")


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[(found[2] or "").upper()] if found else 0.0
    if not 1 <= size < 2**63:
        raise UserError(
            f"--max-shard-size {text}: it must be a number of bytes, such as 5GB, 500MB or 10GiB."
        )
    return math.floor(size)


def run(argv: list[str]) -> int:
    """Convert what the command line names, say what was written, and return 0.

    Raises:
        UserError: the command line is wrong, or `mm_core.models.conversion.convert` raises it.
    """
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_parser().format_help())
        return 0
    options = _parser().parse(argv)
    limit = _bytes(options.max_shard_size)

    from mm_core.accelerator import parse_dtype  # imports torch: only once the command line is right
    from mm_core.models.conversion import convert
    from mm_core.observe.console import setup_logging

    setup_logging(0)
    done = convert(
        expanded(options.source),
        Path(expanded(options.folder)),
        model_file=options.mm_model,
        component=options.component,
        dtype=parse_dtype(options.dtype) if options.dtype else None,
        ema=options.ema,
        merge_lora=options.merge_lora,
        base=options.base,
        max_file_bytes=limit,
    )
    sys.stdout.write(json_text(done.as_json()) if options.format == "json" else printable(_text(done)))
    return 0


def _text(done: Conversion) -> str:
    counts = ", ".join(f"{count} × {name}" for name, count in done.dtypes.items())
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    lines = [
        f"{done.source}: {done.kind}",
        f"{done.folder}: {done.tensors} tensors ({counts}), {done.parameters:,} parameters, "
        f"{done.nbytes / 1e9:.3f} GB in {files}",
    ]
    if done.left_out:
        groups = ", ".join(dict.fromkeys(name.split(".")[0] for name in done.left_out))
        lines.append(f"left out: {len(done.left_out)} tensors that belong to something else ({groups})")
    if not done.has_config and not (done.folder / "adapter_config.json").is_file():
        lines.append("no config.json was written: neither a weights adapter nor the library says what it is")
    return "".join(f"{line}\n" for line in lines)
