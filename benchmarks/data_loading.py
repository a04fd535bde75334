"""Our loading of videos against a plain decode loop, alternating: frames per second, and the memory of a process.

The plain loop is what one would write by hand with PyAV: open a video, decode to its last wanted frame, keep every wanted
one, scale it in 8 bits with antialiasing, bring it into [-1, 1]; in a torch `Dataset` and `DataLoader` with as many workers.
Ours does the same and looks after time stamps, rotation, damaged frames, captions' tokens, keyed randomness and buckets.
Nothing is cached. Both read the same frames of the same files. Target: at least 0.9 times the plain rate.

    python benchmarks/data_loading.py [--clips 16] [--rounds 5] [--workers 0 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from mm_core.config.data import DataConfig
from mm_core.data import T2VDataset, build_loader

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "tiny" / "wan22-t2v" / "tokenizer"
FRAMES = 49


@dataclass(frozen=True)
class Case:
    """Videos of one size, and the clips that are made of them."""

    name: str
    source: tuple[int, int]
    clip: tuple[int, int]


CASES = (
    Case("480p as it is", (480, 832), (480, 832)),
    Case("720p to 480p", (720, 1248), (480, 832)),
)


def write_videos(folder: Path, case: Case, number: int) -> list[Path]:
    """Moving gradients with noise: about as hard to decode as filmed material."""
    height, width = case.source
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    paths = []
    for index in range(number):
        path = folder / f"{case.source[0]}-{index}.mp4"
        paths.append(path)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in range(FRAMES):
                wave = (x + y * (index + 1) + 5 * frame) % 200
                pixels = (wave[..., None].astype(np.uint8) + np.roll(noise, frame, axis=1)).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    return paths


class PlainClips(Dataset[torch.Tensor]):
    """What one would write by hand."""

    def __init__(self, paths: list[Path], case: Case, threads: int) -> None:
        self.paths, self.case, self.threads = paths, case, threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        clip = torch.empty(FRAMES, 3, *self.case.clip)
        with av.open(str(self.paths[index])) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self.threads
            for number, frame in enumerate(islice(container.decode(stream), FRAMES)):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None]
                if self.case.source != self.case.clip:
                    pixels = F.interpolate(pixels, size=self.case.clip, mode="bilinear", antialias=True)
                clip[number] = pixels[0].float().div_(127.5).sub_(1.0)
        return clip.permute(1, 0, 2, 3)


def plain_batches(paths: list[Path], case: Case, workers: int) -> Iterator[Any]:
    """Epoch after epoch, so that workers live as long as ours."""
    threads = 0 if not workers else max(1, (os.cpu_count() or 1) // workers)
    endless = PlainClips(paths * 1000, case, threads)
    return iter(DataLoader(endless, batch_size=1, num_workers=workers, worker_init_fn=_one_thread))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def our_batches(paths: list[Path], case: Case, workers: int, folder: Path) -> Iterator[Any]:
    annotations = folder / f"{case.source[0]}.jsonl"
    lines = [json.dumps({"path": path.name, "cap": "a moving gradient"}) for path in paths]
    annotations.write_text("\n".join(lines), encoding="utf-8")
    dataset = T2VDataset(
        seed=1,
        basic_parameters={"data_path": str(annotations)},
        preprocess_parameters={
            "num_frames": FRAMES, "auto_interval": False, "max_height": case.clip[0], "max_width": case.clip[1],
        },
        tokenizer_config={"from_pretrained": str(TOKENIZER), "model_max_length": 512},
        clip_cache_bytes=0,
    )  # fmt: skip
    data = DataConfig.model_validate(
        {"dataset_param": {"dataset_type": "t2v"}, "dataloader_param": {"group_data": True}}
    )
    loader = build_loader(
        dataset,
        data,
        seed=1,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=1,
        num_workers=workers,
    )
    return iter(loader)


def measure(case: Case, workers: int, clips: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Alternate the two in rounds of `clips` clips, after a warm-up of both."""
    paths = sorted(folder.glob(f"{case.source[0]}-*.mp4"))
    batches = {
        "ours": our_batches(paths, case, workers, folder),
        "plain": plain_batches(paths, case, workers),
    }
    _same(next(batches["ours"])["video"], next(batches["plain"]))
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(rounds + 1):
        # Who has just been idle has its queue full: both take turns in going first, and empty the queue beforehand.
        order = list(batches) if number % 2 else list(reversed(batches))
        for name in order:
            for _ in range(2 * workers):
                next(batches[name])
            started = time.perf_counter()
            for _ in range(clips):
                next(batches[name])
            if number:
                rates[name].append(clips * FRAMES / (time.perf_counter() - started))
            if workers:
                time.sleep(
                    1.0
                )  # until its workers have filled their queue again, and leave the cores to the other
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "case": case.name,
        "workers": workers,
        "frames_per_s": medians,
        "ratio": medians["ours"] / medians["plain"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def _same(ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Both must make the same clip of the first file."""
    worst = float((ours - plain).abs().max())
    if worst > 1e-6:
        raise SystemExit(f"the clips differ by {worst:g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=16, help="clips of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--videos", type=int, default=8, help="files that are written and read")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, av {av.__version__}\n")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            write_videos(Path(name), case, options.videos)
            for workers in options.workers:
                row = measure(case, workers, options.clips, options.rounds, Path(name))
                rows.append(row)
                rates = row["frames_per_s"]
                sys.stdout.write(
                    f"{case.name}, {workers} workers: ours {rates['ours']:.0f} frames/s, plain {rates['plain']:.0f}, "
                    f"ratio {row['ratio']:.3f} (target >= 0.9); at most {row['peak_mib']:.0f} MiB here, "
                    f"{row['peak_worker_mib']:.0f} MiB in a worker that ended\n"
                )
                sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
