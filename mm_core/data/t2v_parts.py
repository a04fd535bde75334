"""What the sections of a `t2v` dataset mean: its annotations, its rules, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mm_core.config.document import expanded
from mm_core.config.features import STORED
from mm_core.data.annotations import Annotation, read_annotations, read_data_list
from mm_core.data.clips import ClipReader
from mm_core.data.errors import DataError
from mm_core.data.frames import FrameRule
from mm_core.data.inspection import Inspected, whole_files
from mm_core.data.resolution import ResolutionRule
from mm_core.data.selection import Rules
from mm_core.data.text import PromptTokenizer
from mm_core.data.transforms import build_pipeline, clip_size, to_unit_range

if TYPE_CHECKING:
    from mm_core.config.dataset import BasicParameters, PreprocessParameters, T2VDatasetConfig
    from mm_core.config.transforms import TransformConfig


def set_annotations(basic: BasicParameters) -> list[Annotation]:
    """Read a data list (combine) or one annotation file with its videos beside it (standard).

    Raises:
        DataError: a file is missing or malformed, with file and line.
    """
    path = expanded(basic.data_path)
    if basic.is_list():
        return read_data_list(path)
    return read_annotations(path, Path(path).parent)


def selection_rules(video: PreprocessParameters, seed: int) -> Rules:
    """Return what `preprocess_parameters` ask of a sample."""
    frames = FrameRule(
        num_frames=video.num_frames,
        train_fps=video.train_fps,
        auto_interval=video.auto_interval,
        frame_interval=video.frame_interval,
        speed_factor=video.speed_factor,
        min_num_frames=video.min_num_frames,
        drop_short_ratio=video.drop_short_ratio,
        temporal_stride=video.vae_scale_factor[0],
    )
    resolution = ResolutionRule(
        max_height=video.max_height,
        max_width=video.max_width,
        force_resolution=video.force_resolution,
        max_hxw=video.max_hxw,
        min_hxw=video.min_hxw,
        hw_stride=video.hw_stride,
        hw_aspect_thr=video.hw_aspect_thr,
    )
    return Rules(frames, resolution, clip_size(transform_steps(video), resolution), seed)


def inspected_files(file: str) -> Inspected:
    """Return annotations without rules: a data list (.txt), or an annotation file; clips are whole files.

    Raises:
        DataError: the lists cannot be read.
    """
    path = Path(file)
    annotations = (
        read_data_list(path) if path.suffix.lower() == ".txt" else read_annotations(path, path.parent)
    )
    return Inspected(
        file, annotations, whole_files(), ClipReader(to_unit_range), no_tokens="no file names a tokenizer"
    )


def inspected_set(config: T2VDatasetConfig, seed: int) -> Inspected:
    """Return the set, its rules, and what reads its clips and captions.

    Raises:
        DataError: the lists cannot be read.
    """
    if config.basic_parameters.data_storage_mode == STORED:
        raise DataError(
            f"{config.basic_parameters.data_path}: stored features hold no frames; inspect the set that they were made of"
        )
    video = config.preprocess_parameters
    rules = selection_rules(video, seed)
    reader = ClipReader(build_pipeline(transform_steps(video), rules.resolution))
    count, reason = None, ""
    try:
        tokenizer = prompt_tokenizer(config)
        count = tokenizer.count
    except DataError as error:  # the data can be looked at where the tokenizer is not
        reason = str(error)
    return Inspected(
        config.basic_parameters.data_path,
        set_annotations(config.basic_parameters),
        rules,
        reader,
        count,
        config.tokenizer_config.model_max_length,
        reason,
    )


def prompt_tokenizer(config: T2VDatasetConfig) -> PromptTokenizer:
    """Return what turns captions into tokens.

    Raises:
        DataError: the folder is missing or holds no tokenizer.
    """
    return PromptTokenizer(
        config.tokenizer_config.from_pretrained,
        config.tokenizer_config.model_max_length,
        methods=config.text_methods(),
        class_name=config.tokenizer_config.autotokenizer_name,
    )


def transform_steps(video: PreprocessParameters) -> list[TransformConfig] | None:
    """Return the transforms that are written, None for the usual ones."""
    return None if video.train_pipeline is None else video.train_pipeline.video
