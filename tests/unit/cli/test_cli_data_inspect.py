"""`mm data inspect`: counts per bucket, what is left out and why, captions, and the contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mm_core.cli.main import main

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "wan22-t2v"


def video(path: Path, frames: int, height: int, width: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in range(frames):
            pixels = np.full((height, width, 3), 20 * level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three good videos of two shapes, an image, and one of each fault."""
    monkeypatch.chdir(tmp_path)
    for name, frames, height, width in (
        ("a", 9, 32, 64), ("b", 9, 32, 64), ("c", 9, 48, 48), ("short", 2, 32, 64), ("tall", 9, 192, 32),
    ):  # fmt: skip
        video(tmp_path / f"{name}.mp4", frames, height, width)
    Image.new("RGB", (64, 32), (255, 0, 0)).save(tmp_path / "i.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = ["a.mp4", "b.mp4", "c.mp4", "short.mp4", "tall.mp4", "i.png", "broken.mp4", "gone.mp4"]
    rows = "".join(f'{name},"a caption, of {name}"\n' for name in names)
    (tmp_path / "set.csv").write_text("path,cap\n" + rows, encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps({
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": "set.csv"},
            "preprocess_parameters": {
                "num_frames": 5, "auto_interval": False, "force_resolution": False, "max_hxw": 2048, "hw_stride": 8,
                "hw_aspect_thr": 3.0,
            },
            "tokenizer_config": {"from_pretrained": str(TINY / "tokenizer"), "model_max_length": 8},
        },
    }), encoding="utf-8")  # fmt: skip
    return tmp_path


def test_what_a_set_gives_as_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "data.json", "--format", "json", "--micro-batch-size", "2"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["kept"], found["images"]) == (8, 4, 1)
    assert found["video_seconds"] == pytest.approx(27 / 8, abs=1e-3)
    buckets = {
        (b["frames"], b["height"], b["width"]): (b["samples"], b["stay_out"]) for b in found["buckets"]
    }
    assert buckets == {(5, 32, 64): (2, 0), (5, 40, 40): (1, 1), (1, 32, 64): (1, 1)}
    left_out: dict[str, list[str]] = {}
    for item in found["left_out"]:
        left_out.setdefault(item["rule"], []).append(f"{item['at']} {item['reason']}")
    assert left_out["too short"] == ["set.csv:5 2 frames after sampling, num_frames is 5"]
    assert left_out["wrong shape"][0].startswith("set.csv:6 height / width is")
    assert [text.split()[0] for text in left_out["unreadable"]] == ["set.csv:8", "set.csv:9"]
    captions = found["captions"]
    assert (captions["texts"], captions["empty"], captions["limit"]) == (4, 0, 8)
    assert captions["tokens"]["least"] > 8
    assert captions["cut"] == 4


def test_what_a_set_gives_as_text(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "data.json", "--contact-sheet", "sheet.png", "--rows", "3"]) == 0
    text = capsys.readouterr().out
    assert (
        "data.json: 8 samples of set.csv: 4 kept (3 videos of 0:00:03 in all, 1 images), 4 left out\n" in text
    )
    assert "\n  5×32×64                  2        50.0%\n" in text
    assert "\nleft out, unreadable: 2\n  set.csv:8: broken.mp4: it cannot be decoded (" in text
    assert "  set.csv:9: gone.mp4: no such file or directory\n" in text
    assert "4 have more than 8 (model_max_length) and are cut\n" in text
    with Image.open(data / "sheet.png") as sheet:
        assert sheet.size[1] == 3 * 156  # one of each bucket
        colours = [colour for _, colour in sheet.convert("RGB").getcolors(2**24) or []]
    assert (255, 0, 0) in colours


def test_decoding_finds_files_that_are_not_what_their_annotations_say(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = ",9,8,32,64\n"  # nothing is left to ask the files
    rows = "".join(f"{name}.mp4,x{facts}" for name in ("a", "broken", "c", "short"))
    (data / "set.csv").write_text("path,cap,num_frames,fps,height,width\n" + rows, encoding="utf-8")

    def unreadable(*options: str) -> list[str]:
        assert main(["data", "inspect", "data.json", "--format", "json", *options]) == 0
        [found] = json.loads(capsys.readouterr().out)
        return [Path(item["path"]).name for item in found["left_out"] if item["rule"] == "unreadable"]

    assert unreadable() == []
    assert unreadable("--decode") == ["broken.mp4", "c.mp4", "short.mp4"]


def test_annotations_alone_are_shown_as_the_files_are(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "set.csv", "--limit", "5"]) == 0
    text = capsys.readouterr().out
    assert "9×192×32" in text
    assert "2×32×64" in text
    assert "5 samples of set.csv: 5 kept" in text
    assert "tokens are not counted: no file names a tokenizer" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "inspct", "x.json"], "there is no command 'inspct'"),
        (["data", "inspect"], "a file is required"),
        (["data", "inspect", "none.json"], "none.json"),
        (["data", "inspect", "a.json", "--decod"], "--decod: there is no such flag"),
        (["data", "inspect", "a.csv", "b.csv", "--contact-sheet", "x.png"], "one picture for 2 files"),
        (["data", "inspect", "a.csv", "--contact-sheet", "x.jpg"], '"x.jpg" is no PNG file'),
        (["data", "inspect", "a.csv", "--limit", "0"], "--limit: "),
        (["data", "inspect", str(TINY / "model.json")], "Give data.json, a job file"),
        (["data", "inspect", str(TINY.parent / "qwen3vl" / "data.json")], "cannot be inspected"),
    ],
)
def test_mistakes_are_named(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_job_file_says_seed_and_micro_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TINY.parents[2])
    assert main(["data", "inspect", str(TINY / "job.yaml"), "--format", "json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["kept"] == 2
    assert "stay_out" in found["buckets"][0]
