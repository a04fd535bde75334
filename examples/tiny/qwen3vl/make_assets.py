"""Makes this example's photographs, conversations and model folder from pictures inside packages (see NOTICE.md).

The files are committed; this script is how they came to be and repeats them:

    pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1 matplotlib==3.11.2    # the wheels that carry the pictures
    unzip -j -d pictures scikit_image-*.whl 'skimage/data/*'
    unzip -j -d pictures scikit_learn-*.whl 'sklearn/datasets/images/*'
    unzip -j -d pictures matplotlib-*.whl '*/sample_data/grace_hopper.jpg'
    python examples/tiny/qwen3vl/make_assets.py --pictures pictures

Needs Pillow, tokenizers and transformers, all of which mmzoo-core installs.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

logger = logging.getLogger("make_assets")

HERE = Path(__file__).resolve().parent
LONGEST = 256  # pixels of a photograph's longer side
VOCABULARY = 512
QUESTION = "What does this photograph show?"
# Name of the photograph -> the file that it is made of, and its caption.
PHOTOS = {
    "astronaut": ("astronaut.png", "An astronaut in an orange space suit smiles in front of a flag."),
    "cat": ("chelsea.png", "The face of a tabby cat with green eyes."),
    "coffee": ("coffee.png", "A cup of coffee with a spoon on a red saucer."),
    "rocket": ("rocket.jpg", "A white rocket waits on its launch pad at dusk."),
    "galaxies": ("hubble_deep_field.jpg", "Thousands of galaxies in the darkness of deep space."),
    "pagoda": ("china.jpg", "A Chinese pagoda with four roofs rises above the trees by a lake."),
    "dahlia": ("flower.jpg", "An orange dahlia in front of dark green leaves."),
    "admiral": ("grace_hopper.jpg", "A navy officer with glasses and a black hat looks at the camera."),
}
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)  # the first ids, in this order
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def shrink(source: Path, target: Path) -> None:
    """Write a photograph as a JPEG of at most `LONGEST` pixels a side, without metadata."""
    with Image.open(source) as image:
        small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    target.parent.mkdir(exist_ok=True)
    small.save(target, quality=85, optimize=True)


def write_conversations() -> None:
    """Write `conversations.json` to learn from, and `questions.jsonl`, the same without replies."""
    rows, questions = [], []
    for name, (_, caption) in PHOTOS.items():
        image = f"photos/{name}.jpg"
        ask = {"role": "user", "content": f"<image>{QUESTION}"}
        rows.append({"messages": [ask, {"role": "assistant", "content": caption}], "images": [image]})
        questions.append({"prompt": QUESTION, "images": [image]})
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    (HERE / "conversations.json").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in questions)
    (HERE / "questions.jsonl").write_text(lines, encoding="utf-8")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Write a byte-level BPE tokenizer with Qwen3-VL's special tokens, and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path) -> None:
    """Write config.json of a network of a million parameters, and the settings of images and videos."""
    ids = {token: SPECIAL_TOKENS.index(token) for token in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(folder)
    sizes = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    # 96 × 128 pixels: an image takes at most 12 tokens.
    image = {"shortest_edge": 32 * 32, "longest_edge": 96 * 128}
    video = {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **sizes,
            "size": image,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor", **sizes, "size": video, "fps": 2, "min_frames": 4, "max_frames": 8,
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the folder of the source pictures and write everything into this folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, help="folder of the pictures in the wheels")
    pictures: Path = parser.parse_args().pictures
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    for name, (file, _) in PHOTOS.items():
        shrink(pictures / file, HERE / "photos" / f"{name}.jpg")
    write_conversations()
    model = HERE / "model"
    model.mkdir(exist_ok=True)
    texts = [QUESTION, "user assistant system"] * 2 + [caption for _, caption in PHOTOS.values()]
    train_tokenizer(texts, model)
    write_model(model)
    for path in sorted(p for p in HERE.rglob("*") if p.is_file()):
        logger.info("%8d  %s", path.stat().st_size, path.relative_to(HERE))


if __name__ == "__main__":
    main()
