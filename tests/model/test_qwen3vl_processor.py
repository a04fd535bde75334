"""Qwen3-VL's chat templates against transformers' own processor: ids, kinds of tokens, pixels, grids."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from mm_core.data.chat.protocol import ChatTemplate, Video
from mm_core.data.chat.template import build_template
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_plugin_qwen3vl.video import VideoSettings
from tests import tiny_vlm

PICTURE, FILM = {"type": "image"}, {"type": "video"}
GOLDEN = json.loads(Path(__file__).with_name("qwen3vl_videos.json").read_text())
"""What transformers' own processor makes of videos, which needs torchvision: written with it, once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def template(folder: Path) -> Any:
    return build_template("qwen3_vl_nothink", folder)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def film(frames: int, height: int, width: int) -> torch.Tensor:
    """uint8 `[frames, 3, height, width]`; the golden file is of these numbers."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    values = (rows * columns)[None, None] * 7 + torch.arange(width) * 3
    values = (
        values + torch.arange(frames)[:, None, None, None] * 37 + torch.arange(3)[None, :, None, None] * 101
    )
    return (values % 256).to(torch.uint8)


@functools.cache
def theirs(folder: Path) -> Any:
    """transformers' processor for images, without the one for videos that it insists on."""

    class WithoutVideos(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideos(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=tiny_vlm.tokenizer(),
        video_processor=None,
        chat_template=tiny_vlm.CHAT_TEMPLATE,
    )


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


CAT = {"role": "assistant", "content": "A cat sits on a chair, naïvely – 猫 🐈."}


@pytest.mark.parametrize(
    ("messages", "sizes"),
    [
        ([user("What?"), CAT], []),
        ([user(PICTURE, "What is shown?"), CAT], [(70, 130)]),
        ([{"role": "system", "content": "Be brief."}, user("See", PICTURE), CAT], [(300, 20)]),
        ([user(PICTURE, " and ", PICTURE, "Which?"), CAT], [(32, 32), (500, 333)]),
        ([user(PICTURE, "What?"), CAT, user("And", PICTURE), CAT], [(31, 33), (64, 96)]),
    ],
    ids=["text", "image", "system", "two-images", "two-turns"],
)
def test_images_are_those_of_transformers(
    messages: Any, sizes: list[tuple[int, int]], folder: Path, template: Any
) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    text = template.render(messages)
    made = template.encode([(text, True)], images)
    expected = theirs(folder)(text=[text], images=images or None, return_tensors="pt")
    assert torch.equal(made["input_ids"], expected["input_ids"][0])
    assert template.length([(text, True)], images) == len(made["input_ids"])
    if not images:
        assert set(made) == {"input_ids", "learnt"}
        return
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(made[name], expected[name]), name
    assert torch.equal(made["mm_token_type_ids"], expected["mm_token_type_ids"][0])
    assert torch.equal(made["learnt"], made["mm_token_type_ids"] == 0)


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['frames']}x{case['height']}x{case['width']}"
)
def test_videos_are_those_of_transformers(case: dict[str, Any], template: Any) -> None:
    frames = film(case["frames"], case["height"], case["width"])
    chosen = template.videos.indices(case["frames"], case["fps"])
    segments = [(template.render([user(FILM, "What?")]), False)]
    video = Video(frames[list(chosen)], chosen, case["fps"])
    made = template.encode(segments, videos=[video])
    assert template.tokenizer.decode(made["input_ids"]) == case["text"]
    assert made["video_grid_thw"].tolist() == [case["grid"]]
    assert made["mm_token_type_ids"].sum() == 2 * np.prod(case["grid"]) // 4
    pixels = made["pixel_values_videos"]
    assert list(pixels.shape) == case["shape"]
    for row, column, value in case["values"]:
        assert pixels[row, column].item() == pytest.approx(value, abs=1e-6)
    assert pixels.double().sum().item() == pytest.approx(case["sum"], abs=1e-2)
    assert pixels.double().square().sum().item() == pytest.approx(case["squares"], abs=1e-2)
    assert template.length(segments, videos=[video]) == len(made["input_ids"])


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' processor of videos needs torchvision"
)
def test_videos_with_torchvision(folder: Path, template: Any) -> None:
    from transformers import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    frames = film(26, 90, 130)
    metadata = VideoMetadata(total_num_frames=26, fps=12.5, frames_indices=list(range(26)))
    processor = Qwen3VLVideoProcessor.from_pretrained(folder)
    expected = processor([frames], video_metadata=[metadata], do_sample_frames=True, return_tensors="pt")
    chosen = template.videos.indices(26, 12.5)
    pixels, grid, _ = template.videos.read(Video(frames[list(chosen)], chosen, 12.5))
    assert [list(grid)] == expected["video_grid_thw"].tolist()
    assert torch.allclose(pixels, expected["pixel_values_videos"], atol=1e-6, rtol=0)


def test_a_file_of_a_video_is_sampled_and_timed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(30):
            values = np.full((32, 64, 3), number * 8, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    template = build_template("qwen3_vl_nothink", folder, video_fps=2.0, video_maxlen=5)
    segments = [(template.render([user(FILM)]), False)]
    made = template.encode(segments, videos=[path])
    # 3 s at 2 Hz would be 6 frames, at most 5 are taken: 0, 7, 14, 22, 29, the last one twice.
    assert made["video_grid_thw"].tolist() == [[3, 2, 4]]
    patches = made["pixel_values_videos"].unflatten(0, (3, -1)).unflatten(2, (3, 2, -1))
    brightness = (patches.mean((1, 2, 4)) * 127.5 + 127.5) / 8
    assert brightness.flatten().tolist() == pytest.approx([0, 7, 14, 22, 29, 29], abs=0.4)
    text = template.tokenizer.decode(made["input_ids"])
    assert [text.count(f"<{time} seconds>") for time in ("0.3", "1.8", "2.9")] == [1, 1, 1]
    assert template.length(segments, videos=[path]) == len(made["input_ids"])


def test_limits_are_those_of_a_frame_and_of_an_image(folder: Path) -> None:
    template: Any = build_template(
        "qwen3_vl_nothink",
        folder,
        image_max_pixels=64 * 64,
        image_min_pixels=0,
        video_max_pixels=64 * 64,
        video_min_pixels=0,
    )
    segments = [(template.render([user(PICTURE, FILM)]), True)]
    video = Video(film(6, 256, 256), tuple(range(6)), 2.0)
    made = template.encode(segments, [picture(256, 256)], [video])
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert made["video_grid_thw"].tolist() == [[3, 4, 4]]
    # The folder's images have 32 × 32 pixels at least: what is given counts.
    few: Any = build_template("qwen3_vl_nothink", folder, image_max_pixels=1)
    assert (few.images.size["shortest_edge"], few.images.size["longest_edge"]) == (1, 1)
    for name in ("image_max_pixels", "video_max_pixels"):
        with pytest.raises(DataError, match=f"{name} is 0; the largest area must be at least 1 pixel"):
            build_template("qwen3_vl", folder, **{name: 0})
    large: Any = build_template("qwen3_vl_nothink", folder, image_min_pixels=128 * 128)
    segments = [(large.render([user(PICTURE)]), True)]
    assert large.encode(segments, [picture(32, 32)])["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_a_token_is_learnt_if_it_begins_in_a_learnt_segment(template: Any) -> None:
    text = template.render([user(PICTURE, "What?"), CAT])
    begin, end = text.index("A cat"), text.index("<|im_end|>\n", text.index("A cat"))
    reply = text[begin:end]
    whole = template.encode([(text, False)], [picture(64, 64)])
    made = template.encode([(text[:begin], False), (reply, True), (text[end:], False)], [picture(64, 64)])
    assert torch.equal(made["input_ids"], whole["input_ids"])
    assert template.tokenizer.decode(made["input_ids"][made["learnt"]]) == reply
    assert not whole["learnt"].any()
    # A border inside a token: `picture` is one of the vocabulary.
    tokens = template.encode([("picture", False)])["input_ids"]
    assert len(tokens) < len("picture")
    pieces = [("p", True), ("", False), ("icture", False)]
    made = template.encode(pieces)
    assert torch.equal(made["input_ids"], tokens)
    assert made["learnt"].tolist() == [True] + [False] * (len(tokens) - 1)


def test_the_published_tokenizers_normalisation_moves_no_border(tmp_path: Path) -> None:
    """Qwen's tokenizer composes characters (NFC) before it splits them; `learnt` is about the text as it was written."""
    folder = tiny_vlm.folder(tmp_path / "model")
    model = json.loads(tiny_vlm.tokenizer().backend_tokenizer.to_str())["model"]
    published = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    published.add_special_tokens({"additional_special_tokens": list(tiny_vlm.SPECIAL_TOKENS)})
    published.chat_template = tiny_vlm.CHAT_TEMPLATE
    published.save_pretrained(folder)
    template = build_template("qwen3_vl", folder)
    composes = template.tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301")
    assert composes == "\u00e9"
    reply = " re\u0301sume\u0301  \n\n A"
    made = template.encode(
        [("<|im_start|>Cafe\u0301 e\u0301", False), (reply, True), ("<|im_end|>\n", False)]
    )
    assert template.tokenizer.decode(made["input_ids"][made["learnt"]]) == reply.replace("e\u0301", "\u00e9")


def test_what_stands_for_pictures_is_never_learnt(template: Any) -> None:
    video = Video(film(4, 64, 64), (0, 5, 10, 15), 10.0)
    made = template.encode(
        [(template.render([user(PICTURE, FILM, "What?"), CAT]), True)], [picture(64, 64)], [video]
    )
    pads = torch.isin(made["input_ids"], torch.tensor([tiny_vlm.IMAGE, tiny_vlm.VIDEO]))
    assert torch.equal(made["learnt"], ~pads)


@pytest.mark.parametrize(
    ("text", "images", "videos", "said"),
    [
        (
            "<|image_pad|>",
            0,
            0,
            "the text has 1 placeholder of images (<|image_pad|>), and there are no images",
        ),
        ("What?", 1, 0, "the text has no placeholders of images (<|image_pad|>), and there is 1 image"),
        (
            "<|image_pad|>",
            1,
            2,
            "the text has no placeholders of videos (<|video_pad|>), and there are 2 videos",
        ),
    ],
)
def test_placeholders_and_pictures_disagree(
    text: str, images: int, videos: int, said: str, template: Any
) -> None:
    given = [(text, True)], [picture(64, 64)] * images, [Video(film(2, 64, 64), (0, 1), 1.0)] * videos
    for call in (template.encode, template.length):
        with pytest.raises(DataError) as caught:
            call(*given)
        assert said in str(caught.value)


def test_shapes_that_no_limit_allows_name_the_file(template: Any, tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    picture(2, 900).save(path)
    for call in (template.encode, template.length):
        with pytest.raises(UnreadableSampleError, match=r"strip\.png: .*ratio must be smaller than 200"):
            call([("<|image_pad|>", True)], [path])
        with pytest.raises(
            UnreadableSampleError, match=r"a video in memory: one side is more than 200 times the other"
        ):
            call([("<|video_pad|>", True)], videos=[Video(film(2, 40, 9000), (0, 1), 1.0)])


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("thinking", "reply", "written", "prompt"),
    [
        (None, "A cat.", "A cat.", ""),
        (None, "<think>\nFur.\n</think>\n\nA cat.", "<think>\nFur.\n</think>\n\nA cat.", ""),
        (True, "A cat.", f"{EMPTY}A cat.", ""),
        (True, "<think>\nFur.\n</think>\n\nA cat.", "<think>\nFur.\n</think>\n\nA cat.", ""),
        (False, "A cat.", f"{EMPTY}A cat.", EMPTY),
        (False, "<think>\nFur.\n</think>\n\nA cat.", f"{EMPTY}A cat.", EMPTY),
        (False, [{"type": "text", "text": "A cat."}], f"{EMPTY}A cat.", EMPTY),
    ],
)
def test_thoughts(thinking: bool | None, reply: Any, written: str, prompt: str, folder: Path) -> None:
    template = build_template("qwen3_vl", folder)
    messages = [user("What?"), {"role": "assistant", "content": reply}]
    begun = template.render(messages[:1], add_generation_prompt=True, enable_thinking=thinking)
    text = template.render(messages, enable_thinking=thinking)
    assert begun.endswith(f"<|im_start|>assistant\n{prompt}")
    assert text == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{written}<|im_end|>\n"
    assert text.startswith(begun)
    at_once = build_template("qwen3_vl_nothink", folder)
    for options in ({}, {"add_generation_prompt": True}):
        unasked = at_once.render(messages[:1], **options)
        assert at_once.render(messages[:1], enable_thinking=thinking, **options) == unasked


def test_a_thought_that_the_folders_template_begins_is_ended(tmp_path: Path) -> None:
    folder = tiny_vlm.folder(tmp_path / "model")
    begins = tiny_vlm.CHAT_TEMPLATE.split("{%- if enable_thinking is defined")[0].rstrip()
    (folder / "chat_template.jinja").write_text(
        begins.replace("{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>assistant\\n<think>\\n' -}}")
        + "{%- endif -%}"
    )
    template = build_template("qwen3_vl", folder)
    for thinking, end in ((True, "<think>\n"), (False, EMPTY)):
        text = template.render([user("What?")], add_generation_prompt=True, enable_thinking=thinking)
        assert text.endswith(f"<|im_start|>assistant\n{end}")


def test_it_is_the_same_in_every_process(folder: Path, template: Any) -> None:
    copy = pickle.loads(pickle.dumps(template))
    assert isinstance(copy, ChatTemplate)
    assert copy.fingerprint == template.fingerprint
    segments = [(template.render([user(PICTURE)]), True)]
    for name, value in template.encode(segments, [picture(64, 64)]).items():
        assert torch.equal(copy.encode(segments, [picture(64, 64)])[name], value), name
    others = [
        build_template("qwen3_vl", folder),
        build_template("qwen3_vl_nothink", folder, image_max_pixels=4096),
        build_template("qwen3_vl_nothink", folder, video_maxlen=6),
    ]
    assert len({template.fingerprint, *(other.fingerprint for other in others)}) == 4


def _changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (
            "preprocessor_config.json",
            {"patch_size": 14},
            "vision_config.patch_size 16, but the settings of images",
        ),
        (
            "video_preprocessor_config.json",
            {"temporal_patch_size": 4},
            "but the settings of videos in the same folder have",
        ),
        (
            "video_preprocessor_config.json",
            {"do_rescale": False},
            '"do_rescale" is false, but only true is supported',
        ),
        ("video_preprocessor_config.json", {"size": [1, 2]}, "does not hold settings of videos"),
        (
            "config.json",
            {"image_token_id": 77},
            "has image_token_id 77, but <|image_pad|> is 5 in the tokenizer",
        ),
    ],
)
def test_files_of_a_folder_that_do_not_fit(
    file: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tiny_vlm.folder(tmp_path / "model")
    _changed(folder, file, **values)
    with pytest.raises(DataError) as caught:
        build_template("qwen3_vl", folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


def test_settings_of_videos_are_found_where_transformers_looks(tmp_path: Path) -> None:
    folder = tiny_vlm.folder(tmp_path / "model")
    assert VideoSettings.of(folder).max_frames == 8
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": {"max_frames": 6}}))
    assert VideoSettings.of(folder).max_frames == 6
    (folder / "processor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    assert VideoSettings.of(folder).longest_edge == 128 * 128
    (folder / "preprocessor_config.json").unlink()
    assert VideoSettings.of(folder) == VideoSettings()
    with pytest.raises(DataError, match=r"has no settings of images \(preprocessor_config.json\)"):
        build_template("qwen3_vl", folder)


def test_capped_videos_have_a_share_of_the_whole_for_each_frame() -> None:
    settings = VideoSettings(cap_pixels_per_frame=True, longest_edge=64 * 32 * 32, shortest_edge=32 * 32)
    assert settings.size(8, 512, 512) == (64, 64)  # 8 merged patches a frame: 2 × 2 is what fits
    assert VideoSettings(longest_edge=64 * 32 * 32, shortest_edge=32 * 32).size(8, 512, 512) == (64, 64)
    few = VideoSettings(cap_pixels_per_frame=True, max_video_tokens=4)
    assert few.size(8, 512, 512) == (352, 352)  # at least shortest_edge and a twentieth
