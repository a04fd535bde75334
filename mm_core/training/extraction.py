"""`mm extract-features`: encodes each clip and each caption of a set once, and stores what training needs of them.

The work is cut into shards of so many items. A shard is written whole or not at all, and those that are there are not made
again: after a kill, the same command on any number of ranks goes on with the rest.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from mm_core.accelerator import Accelerator
from mm_core.config.component import ComponentConfig
from mm_core.config.extraction_job import ExtractionJob
from mm_core.config.features import CONDITION, INDEX, SAMPLES
from mm_core.data import build_dataset
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.feature_store import shard_name
from mm_core.data.loader import loader_settings
from mm_core.data.t2v import T2VDataset
from mm_core.models.factory import build_sora_model
from mm_core.models.sora import SoRAModel
from mm_core.models.text_encoders import check_vocabulary
from mm_core.training.extraction_plan import (
    LENGTHS,
    UNREADABLE,
    ExtractionPlan,
    Item,
    plan_extraction,
    write_index,
)
from mm_core.training.tasks.encoding import clip_features, text_features
from mm_core.weights.layout import let_others_read, sync_folder, write_text
from mm_registry.errors import UserError
from mm_registry.words import described

log = logging.getLogger(__name__)

PLAN = "plan.json"
_SECONDS = 10.0  # between two lines about the progress


@dataclass(frozen=True)
class Extracted:
    """What a command has done.

    Attributes:
        made: items that this command encoded, on all ranks; 0 if all was there.
    """

    index: Path
    samples: int
    clips: int
    prompts: int
    unreadable: int
    made: int


def extract(
    job: ExtractionJob, folder: Path, *, clips_per_video: int = 1, items_per_shard: int = 32
) -> Extracted:
    """Encode a job's set into a folder. All ranks of the process group call this, or a process without one.

    Args:
        clips_per_video: how many clips are drawn of a video that is longer than one.
        items_per_shard: clips or captions in a file.

    Raises:
        UserError: the folder holds something else, a component or the set cannot be used, or too many videos cannot be read.
    """
    accelerator = Accelerator.current()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = build_dataset(_whole(job.components["dataset"]), job.flags.seed, job.flags.seq_length)
    if not isinstance(dataset, T2VDataset):
        raise UserError(
            f"dataset_type {job.components['dataset'].model_id}: features are extracted of t2v datasets only"
        )
    plan = plan_extraction(job, dataset, clips_per_video, items_per_shard)
    done = _together(lambda: _open(folder, plan), rank, ranks)
    missing = [shard for shard in plan.shards if not _is_whole(folder / shard_name(*shard))]
    made = 0
    if not done:
        missing = (
            missing if ranks == 1 else _from_first(missing)
        )  # a rank may already write while another looks
        if len(missing) < len(plan.shards):
            log.info("%d of %d shards are there already", len(plan.shards) - len(missing), len(plan.shards))
        model = build_sora_model(
            job.components, device=accelerator.device, with_predictor=False, hooks=job.hooks
        )
        if model.text_encoder is not None and dataset.tokenizer_size is not None:
            check_vocabulary(model.text_encoder, dataset.tokenizer_size, tokenizer="tokenizer_config")
        if getattr(model.ae, "do_sample", False):
            log.info("the autoencoder draws its latents (do_sample): one draw a clip is stored")
        writer = _Writer(job, plan, dataset, model, accelerator.device, folder)
        made = writer.write(missing[rank::ranks])
        made = _sum(made, ranks)
        _together(lambda: write_index(folder, plan, dataset), rank, ranks)
    return _summary(folder, plan, made)


def _whole(section: ComponentConfig) -> ComponentConfig:
    """The set with the samples that training holds back to validate with."""
    basic = section.fields.get("basic_parameters")
    if not isinstance(basic, Mapping):
        return section
    left_out = {name: None for name in basic if name.startswith("val_")}
    return replace(section, fields={**section.fields, "basic_parameters": {**basic, **left_out}})


class _Writer:
    """Encodes the items of shards and writes them."""

    def __init__(
        self,
        job: ExtractionJob,
        plan: ExtractionPlan,
        dataset: T2VDataset,
        model: SoRAModel,
        device: torch.device,
        folder: Path,
    ) -> None:
        self.job, self.plan, self.dataset, self.model = job, plan, dataset, model
        self.device, self.folder = device, folder
        self.lengths: set[int] = set()

    def write(self, shards: Sequence[tuple[str, int]]) -> int:
        """Write shards, and return how many items they have."""
        items = [item for shard in shards for item in self.plan.items(*shard)]
        progress = _Progress(len(items))
        inputs = self._inputs(items)
        for shard in shards:
            tensors: dict[str, torch.Tensor] = {}
            unreadable: dict[str, str] = {}
            self.lengths = set()
            for item in self.plan.items(*shard):
                given = next(inputs)
                if isinstance(given, UnreadableSampleError):
                    assert item.sample is not None, "only files are unreadable"
                    self.dataset.bad.add(item.sample, given)
                    unreadable[item.key] = str(given)
                else:
                    encoded = (
                        self._clip(given, item) if item.sample is not None else self._prompt(given, item)
                    )
                    tensors |= {f"{item.key}/{name}": value for name, value in encoded.items()}
                progress.add()
            metadata = {UNREADABLE: json.dumps(unreadable), LENGTHS: json.dumps(sorted(self.lengths))}
            _save(self.folder / shard_name(*shard), tensors, metadata)
        return len(items)

    def _inputs(self, items: Sequence[Item]) -> Iterator[Any]:
        """What the encoders are given, decoded by `--num-workers` processes, in order."""
        if not items:
            return iter(())
        workers = self.job.flags.num_workers
        loader: DataLoader[Any] = DataLoader(
            _Inputs(self.dataset, items),
            batch_size=None,
            shuffle=False,
            **loader_settings(self.job.data, workers),
        )
        return iter(loader)

    def _clip(self, given: dict[str, torch.Tensor], item: Item) -> dict[str, torch.Tensor]:
        batch = {name: value.unsqueeze(0) for name, value in given.items()}
        latents, conditions = clip_features(
            self.model, batch, self.device, self.job.flags.seed, [item.number]
        )
        named = {"latents": latents, **{CONDITION + name: value for name, value in conditions.items()}}
        return {name: value[0].cpu().contiguous() for name, value in named.items()}

    def _prompt(self, given: dict[str, torch.Tensor], item: Item) -> dict[str, torch.Tensor]:
        batch = {name: value.unsqueeze(0) for name, value in given.items()}
        encoded = text_features(self.model, batch, self.device)
        prompt, mask = encoded["prompt"][0].cpu(), encoded["prompt_mask"][0].cpu()  # [L, D], [L]
        length = int(mask.sum())
        if not bool((mask[:length] == 1).all()):
            raise UserError(
                f"the caption {item.caption!r}: its tokens do not come first, the tokenizer pads on the left; set its "
                "padding_side to right"
            )
        self.lengths.add(len(mask))
        return {"prompt": prompt[:length].contiguous()}


class _Inputs(Dataset[Any]):
    """What the encoders are given of each item, or why it cannot be read."""

    def __init__(self, dataset: T2VDataset, items: Sequence[Item]) -> None:
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor] | UnreadableSampleError:
        item = self.items[number]
        if item.sample is None:
            return self.dataset.text(item.caption)
        try:
            return self.dataset.pixels(self.dataset.samples[item.sample], item.frames)
        except UnreadableSampleError as error:
            return error


class _Progress:
    """A line every few seconds: how much of this rank's share is done, how fast, how long it takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._begun = self._told = time.monotonic()

    def add(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._told < _SECONDS and self.done < self.total:
            return
        self._told = now
        rate = self.done / max(now - self._begun, 1e-9)
        left = (self.total - self.done) / rate
        log.info("%d of %d items, %.2f a second, %.0f s left", self.done, self.total, rate, left)


def _open(folder: Path, plan: ExtractionPlan) -> bool:
    """Make the folder, or go on with one of the same plan; whether nothing is left to do.

    Raises:
        UserError: it holds something else.
    """
    file = folder / PLAN
    if file.is_file():
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{file}: is damaged ({error}); remove the folder, or choose another --output"
            ) from error
        differ = plan.differences(other)
        if differ:
            raise UserError(
                f"{folder}: holds features of another set or of other encoders ({', '.join(differ)} differ); choose another "
                "--output, or remove the folder"
            )
        for left in folder.glob(".tmp-*"):  # of a command that was killed
            left.unlink()
        files = [folder / INDEX, folder / SAMPLES]
        return all(file.is_file() for file in files) and all(
            _is_whole(folder / shard_name(*shard)) for shard in plan.shards
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than features; choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{PLAN}"
        write_text(temporary, json.dumps(plan.as_json(), indent=1) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    return False


def _is_whole(file: Path) -> bool:
    """Whether a shard is there and as long as its header says; one that was lost or cut off is made again."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _save(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a shard; it appears whole."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    save_file(tensors, temporary, metadata)
    let_others_read(temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def _together(work: Any, rank: int, ranks: int) -> Any:
    """What rank 0 finds out or writes; a mistake that it meets is every rank's."""
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except UserError as error:
            told[1] = str(error)
        except OSError as error:  # the others wait in the broadcast
            told[1] = f"--output: {described(error)}"
    if ranks > 1:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


def _from_first(value: Any) -> Any:
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _sum(number: int, ranks: int) -> int:
    """Over all ranks; none goes on before all are done."""
    if ranks == 1:
        return number
    numbers: list[int] = [0] * ranks
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def _summary(folder: Path, plan: ExtractionPlan, made: int) -> Extracted:
    data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return Extracted(
        folder / INDEX, data["samples"], len(plan.clips), len(plan.prompts), data["unreadable"], made
    )
