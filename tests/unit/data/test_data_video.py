from __future__ import annotations

import contextlib
import gc
import os
import pickle
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_helpers import CLIPS, WriteVideo, index_of

from mm_core.data.errors import DataError, UnreadableSampleError
from mm_core.data.video import probe, read_frames
from mm_registry.errors import UserError


def decode_all(path: Path) -> torch.Tensor:
    """All frames, uint8 [T, 3, H, W], by PyAV and Pillow alone."""
    with av.open(str(path)) as container:
        images = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_the_shipped_clips_are_read_as_they_are(clip: Path) -> None:
    info = probe(clip)
    assert (info.frames, info.fps, info.height, info.width) == (24, 12.0, 96, 128)
    assert torch.equal(torch.stack(list(read_frames(clip, range(24)))), decode_all(clip))


def test_chosen_frames_may_repeat_and_skip(write_video: WriteVideo) -> None:
    path = write_video(frames=12)
    frames = list(read_frames(path, [0, 3, 3, 11]))
    assert [index_of(frame) for frame in frames] == [0, 3, 3, 11]
    assert frames[0].dtype == torch.uint8
    assert frames[0].shape == (3, 32, 64)


def test_no_frames_are_no_work(write_video: WriteVideo) -> None:
    assert list(read_frames(write_video(), [])) == []


@pytest.mark.parametrize("indices", [[3, 2], [-1, 0]])
def test_frame_numbers_must_ascend(write_video: WriteVideo, indices: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        list(read_frames(write_video(), indices))


def test_late_frames_are_sought_not_decoded_through(
    write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(frames=120)
    everything = decode_all(path)
    decoded = 0
    from mm_core.data import video

    timed = video._timed

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal decoded
        for item in timed(*args, **kwargs):  # type: ignore[arg-type]
            decoded += 1
            yield item

    monkeypatch.setattr(video, "_timed", counting)
    indices = [97, 100, 119]
    assert torch.equal(torch.stack(list(read_frames(path, indices))), everything[indices])
    assert decoded < 40  # key frames are ten apart


@pytest.mark.parametrize("first", range(18, 34))
def test_every_start_is_exact_around_the_seek_limit(write_video: WriteVideo, first: int) -> None:
    path = write_video(frames=40)
    assert torch.equal(torch.stack(list(read_frames(path, [first]))), decode_all(path)[[first]])


def test_a_variable_frame_rate_keeps_its_timing(write_video: WriteVideo) -> None:
    # Ten frames a second, but frame 2 stays on screen for 0.5 s.
    path = write_video(name="video.mkv", frames=8, times=[0, 1, 2, 7, 8, 9, 10, 11])
    fps = probe(path).fps
    wanted = [0.05, 0.25, 0.45, 0.62, 0.72, 1.05]  # seconds
    frames = list(read_frames(path, [round(t * fps) for t in wanted]))
    times = np.array([0, 1, 2, 7, 8, 9, 10, 11]) / 10
    shown = [int(np.searchsorted(times, round(t * fps) / fps + 0.5 / fps)) - 1 for t in wanted]
    assert [index_of(frame) for frame in frames] == shown
    assert shown.count(2) >= 2


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_phone_videos_are_turned_upright(write_video: WriteVideo, angle: int) -> None:
    path = write_video(rotation=angle)
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
    assert first.rotation % 360 == angle
    upright = np.rot90(first.to_ndarray(format="rgb24"), angle // 90)
    frame = next(read_frames(path, [0]))
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), upright)
    assert (probe(path).height, probe(path).width) == upright.shape[:2]


def bad_file(kind: str, tmp_path: Path, write_video: WriteVideo) -> Path:
    path = tmp_path / "bad.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no video\n" * 50, encoding="utf-8")
    elif kind == "truncated":
        whole = write_video().read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound only":
        path = tmp_path / "bad.wav"
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(1600))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        ("text", "cannot be decoded"),
        ("truncated", "cannot be decoded"),
        ("folder", "cannot be decoded"),
        ("sound only", "no video"),
    ],
)
def test_an_unreadable_file_is_named(kind: str, reason: str, tmp_path: Path, write_video: WriteVideo) -> None:
    path = bad_file(kind, tmp_path, write_video)
    for read in (probe, lambda p: list(read_frames(p, [0]))):
        with pytest.raises(UnreadableSampleError, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert caught.value.path == str(path)
        assert isinstance(caught.value, UserError)
        assert isinstance(caught.value, DataError)


def test_a_file_cut_off_in_the_middle_is_noticed(write_video: WriteVideo) -> None:
    # With the index in front, the header promises all frames.
    path = write_video(frames=60, height=64, width=128, movflags="faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    assert probe(path).frames == 60
    assert index_of(next(read_frames(path, [0, 59]))) == 0
    with pytest.raises(UnreadableSampleError, match=r"bad|ends after|damaged|cannot be decoded") as caught:
        list(read_frames(path, range(60)))
    assert str(path) in str(caught.value)


def test_frames_beyond_the_end_are_an_error(write_video: WriteVideo) -> None:
    path = write_video(frames=12)
    with pytest.raises(
        UnreadableSampleError, match=r"ends after 1\.20 s, but frame 12, at 1\.20 s, is wanted"
    ):
        list(read_frames(path, [11, 12]))


def test_the_error_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(UnreadableSampleError("a/b.mp4", "it is empty")))
    assert (error.path, error.reason, str(error)) == ("a/b.mp4", "it is empty", "a/b.mp4: it is empty")


def open_files() -> set[str]:
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor is gone again
            links.add(os.readlink(entry))
    return links


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_a_reader_that_is_dropped_closes_its_file(write_video: WriteVideo) -> None:
    path = write_video(frames=30)
    frames = read_frames(path, range(30))
    next(frames)
    assert str(path) in open_files()
    del frames
    gc.collect()
    assert str(path) not in open_files()
