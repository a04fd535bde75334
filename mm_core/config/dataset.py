"""`dataset_param` with `dataset_type: t2v`: videos with captions."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from mm_core.config.features import STORED
from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import SectionModel, invalid
from mm_core.config.text import TextMethods, method_names
from mm_core.config.tokenizer import TokenizerConfig
from mm_core.config.transforms import FrameTransformConfig, TransformConfig

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
ANNOTATION_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
_READERS = "PyAV reads every video"
_CLIP_FRAME = "the image processor scales and normalises CLIP's images as the model was trained"
_SPLICING = "images are not spliced into videos"


class BasicParameters(SectionModel):
    """Where the samples are."""

    data_path: Annotated[
        str,
        Field(
            min_length=1,
            description="A text file with a line `folder,annotation.json` for each part, or an "
            "annotation file (.json, .jsonl, .csv, .parquet), or the index.json of stored features.",
        ),
    ]
    val_data_path: Annotated[
        str | None,
        Field(min_length=1, description="What is validated with (`--eval-interval`), named as data_path is."),
    ] = None
    val_rate: Annotated[
        Annotated[float, Field(ge=0.0, lt=1.0)] | None,
        Field(description="Share of the samples that is held back to validate with, drawn by --seed."),
    ] = None
    val_max_samples: Annotated[
        PositiveInt | None, Field(description="Samples to validate with, at most; null: all.")
    ] = None
    data_folder: Annotated[
        str | None,
        Only(None, reason="name the folder in the data list, a line `folder,annotation.json` (combine)"),
        Field(description="Folder of the videos."),
    ] = None
    data_storage_mode: Annotated[
        Literal["standard", "combine", "sorafeatured", "vace"] | None,
        NotYet(None, "standard", "combine", STORED, reason="VACE conditions cannot be read yet"),
        Field(
            description="`combine`: data_path is a data list. `standard`: it is an annotation file. "
            "`sorafeatured`: it is the index.json of stored features. `vace`: videos with VACE's conditions. "
            "Default: by the ending of data_path."
        ),
    ] = None
    return_type: Annotated[
        str | None, NoEffect("samples are always dicts of tensors"), Field(description="Kind of a sample.")
    ] = None
    reserved_keys: Annotated[
        list[str] | None,
        NoEffect("other keys of the annotations are not used"),
        Field(description="Keys of the annotations that samples keep."),
    ] = None
    use_multiprocess: Annotated[
        bool,
        NoEffect("annotations are read once", quiet_for=(False,)),
        Field(description="Read annotations with several processes."),
    ] = False

    @model_validator(mode="after")
    def _mode(self) -> Self:
        annotations = self.data_path.lower().endswith(ANNOTATION_ENDINGS)
        if self.data_storage_mode == "standard" and not annotations:
            endings = ", ".join(ANNOTATION_ENDINGS)
            raise invalid("data_path", f"an annotation file ends in {endings}; for a data list use combine")
        if self.data_storage_mode == STORED and not self.data_path.lower().endswith(".json"):
            raise invalid("data_path", f"{STORED} needs the index.json that `mm extract-features` wrote")
        if self.data_storage_mode == "combine" and annotations:
            raise invalid("data_path", "combine needs a text file with lines `folder,annotation.json`")
        return self

    @model_validator(mode="after")
    def _validation(self) -> Self:
        if self.val_data_path is not None and self.val_rate:
            raise invalid("val_rate", "val_data_path is given too; validate with one of them")
        if self.val_max_samples is not None and self.val_data_path is None and not self.val_rate:
            raise invalid(
                "val_max_samples", "there is nothing to validate with; give val_data_path or val_rate"
            )
        return self

    def of_validation(self) -> dict[str, Any]:
        """Return the section of the set that `val_data_path` names."""
        mode = self.data_storage_mode if self.data_storage_mode == STORED else None
        return {"data_path": self.val_data_path, "data_storage_mode": mode}

    def is_list(self) -> bool:
        """Whether `data_path` is a data list, rather than one annotation file."""
        mode = self.data_storage_mode
        return mode == "combine" or (mode is None and not self.data_path.lower().endswith(ANNOTATION_ENDINGS))


class TrainPipeline(SectionModel):
    """`train_pipeline`: the transforms of a clip, in order."""

    video: Annotated[
        list[TransformConfig], Field(min_length=1, description="What every clip goes through, in order.")
    ]
    first_frame_vae: Annotated[
        list[FrameTransformConfig] | None,
        Field(
            description="What the clip's first frame goes through before it is given to an image-to-video model; `auto` is "
            "the clip's own size, which it must have in the end."
        ),
    ] = None
    first_frame_clip: Annotated[
        list[dict[str, Any]] | None,
        NoEffect(_CLIP_FRAME),
        Field(description="What the first frame goes through for CLIP."),
    ] = None


class PreprocessParameters(SectionModel):
    """How a video becomes a clip `[3, num_frames, height, width]` in [-1, 1].

    With `force_resolution` every clip is `max_height` × `max_width`. Without, a clip keeps its own aspect
    ratio within `hw_aspect_thr`, has at most `max_hxw` pixels, and sides that are multiples of `hw_stride`.
    """

    video_processor_type: Annotated[
        str,
        Only(
            "OpensoraplanVideoProcessor",
            reason="other processors belong to models that are not available yet",
        ),
        Field(description="How videos become clips."),
    ] = "OpensoraplanVideoProcessor"
    video_reader_type: Annotated[
        Literal["DecordVideo", "TorchvisionVideo", "AvVideo"],
        NoEffect(_READERS, quiet_for=("AvVideo",)),
        Field(description="Library that decodes videos."),
    ] = "AvVideo"
    image_reader_type: Annotated[
        str | None,
        NoEffect("Pillow reads every image", quiet_for=("Image", None)),
        Field(description="Library that decodes images."),
    ] = None
    image_processer_type: Annotated[
        str | None,
        NoEffect("an image is a video of one frame", quiet_for=("image2video", None)),
        Field(description="How images become samples."),
    ] = None
    use_aesthetic: Annotated[
        bool,
        Only(False, reason="captions are not extended by aesthetic scores"),
        Field(description="Write aesthetic scores into captions."),
    ] = False

    num_frames: Annotated[int, Field(ge=1, le=100_000, description="Frames of a clip.")] = 16
    min_num_frames: Annotated[
        int,
        Field(ge=1, description="Videos with fewer frames (after sampling) are left out; images never are."),
    ] = 29
    frame_interval: Annotated[int, Field(ge=1, description="Take every n-th frame.")] = 1
    train_fps: Annotated[
        float, Field(gt=0, le=1000, description="Frames a second of a clip, with auto_interval.")
    ] = 24
    auto_interval: Annotated[
        bool,
        Field(description="Take frames so that a clip runs at train_fps, whatever the video's own rate is."),
    ] = True
    speed_factor: Annotated[
        float,
        Field(
            le=1000, description="Play videos this much faster, as far as enough frames are left; at least 1."
        ),
    ] = 1.0
    drop_short_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of videos shorter than num_frames that is left out.")
    ] = 1.0
    max_height: Annotated[int, Field(ge=1, le=16384, description="Pixels.")] = 480
    max_width: Annotated[int, Field(ge=1, le=16384, description="Pixels.")] = 640
    force_resolution: Annotated[bool, Field(description="Every clip is max_height × max_width.")] = True
    max_hxw: Annotated[
        int | None,
        Field(
            ge=1,
            description="Largest area in pixels without force_resolution; default: max_height × max_width.",
        ),
    ] = None
    min_hxw: Annotated[
        int | None, Field(ge=1, description="Smallest area in pixels; default: a quarter of max_hxw.")
    ] = None
    hw_stride: Annotated[
        int, Field(ge=1, description="Sides are multiples of this, when force_resolution is false.")
    ] = 32
    hw_aspect_thr: Annotated[
        float,
        Field(
            ge=0,
            description="Factor by which a video's ratio may differ from the wanted one (from 1 "
            "without force_resolution); 0: 1.5.",
        ),
    ] = 1.5
    truncate_t_by_sp: Annotated[
        bool,
        NoEffect("sequences are not split over ranks", quiet_for=(True, False)),
        Field(description="Cut clips to a length that divides among the ranks of one sequence."),
    ] = True
    vae_scale_factor: Annotated[
        tuple[PositiveInt, PositiveInt, PositiveInt],
        Field(
            description="Of the autoencoder, in time, height, width: clips shorter than num_frames "
            "are cut to 1 + n × time."
        ),
    ] = (4, 8, 8)
    train_sp_batch_size: Annotated[
        int,
        NoEffect("sequences are not split over ranks", quiet_for=(1,)),
        Field(description="Samples that the ranks of one sequence share."),
    ] = 1
    seed: Annotated[
        int | None, NoEffect("the command line decides: --seed"), Field(description="Of random choices.")
    ] = None
    cfg: Annotated[
        float,
        Field(ge=0, le=1, description="Probability of an empty caption, for classifier-free guidance."),
    ] = 0.1
    train_pipeline: Annotated[
        TrainPipeline | None,
        Field(description="Transforms; default: resize, to [-1, 1], crop to the centre."),
    ] = None

    @model_validator(mode="after")
    def _frames(self) -> Self:
        if self.speed_factor < 1:
            raise invalid(
                "speed_factor",
                f"must be at least 1, not {self.speed_factor:g}: videos are sped up, never slowed down; "
                "a higher train_fps (with auto_interval) slows the motion of a clip",
            )
        if 0 < self.hw_aspect_thr < 1:
            raise invalid(
                "hw_aspect_thr",
                f"must be at least 1, or 0 for 1.5, not {self.hw_aspect_thr:g}: no video is within such a factor",
            )
        if self.min_hxw is not None and self.max_hxw is not None and self.min_hxw > self.max_hxw:
            raise invalid("min_hxw", f"must be at most max_hxw ({self.max_hxw})")
        return self


class T2VDatasetConfig(SectionModel):
    """Videos and images with captions. Annotations are JSON, JSON Lines, CSV or Parquet with at least `path` and `cap`
    (a text or several).
    """

    dataset_type: Annotated[str, Field(description="Id of the dataset.")] = "t2v"
    basic_parameters: Annotated[BasicParameters, Field(description="Where the samples are.")]
    preprocess_parameters: Annotated[
        PreprocessParameters, Field(description="How a video becomes a clip.")
    ] = Field(default_factory=PreprocessParameters)
    use_text_processer: Annotated[
        bool,
        Only(True, reason="a model that is trained on captions needs their tokens"),
        Field(description="Turn captions into tokens."),
    ] = True
    enable_text_preprocessing: Annotated[bool, Field(description="Apply text_preprocess_methods.")] = True
    text_preprocess_methods: Annotated[
        TextMethods, Field(description="How captions are cleaned, in order.")
    ] = Field(default_factory=list)
    use_clean_caption: Annotated[
        bool,
        NoEffect("text_preprocess_methods alone say how captions are cleaned", quiet_for=(False,)),
        Field(
            description="Rewrite captions by rules for web text, where text_preprocess_methods are not given; that is an "
            "error here: clean the annotations instead."
        ),
    ] = False
    support_chinese: Annotated[
        bool,
        NoEffect("no characters are taken out of captions"),
        Field(description="Keep Chinese characters in captions."),
    ] = False
    tokenizer_config: Annotated[TokenizerConfig, Field(description="The tokenizer of the captions.")]
    vid_img_fusion_by_splicing: Annotated[
        bool, Only(False, reason=_SPLICING), Field(description="Append images to videos.")
    ] = False
    use_img_num: Annotated[
        int, Only(0, reason=_SPLICING), Field(description="Images that are appended to a video.")
    ] = 0
    use_img_from_vid: Annotated[
        bool,
        NoEffect(_SPLICING, quiet_for=(True, False)),
        Field(description="Take those images from the video itself."),
    ] = True
    max_bad_samples: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)],
        Field(
            description="How many samples may be unreadable, each reported and replaced, before the "
            "job stops: a number, or a share "
            "of the set (0.01: one in a hundred, at least one)."
        ),
    ] = 0.01
    clip_cache_bytes: Annotated[
        int,
        Field(ge=0, description="Host memory for decoded clips of one rank; small sets are decoded once."),
    ] = 256 * 2**20

    @model_validator(mode="after")
    def _cleaning(self) -> Self:
        if self.use_clean_caption and self.enable_text_preprocessing and not self.text_preprocess_methods:
            raise invalid(
                "use_clean_caption",
                "captions cannot be rewritten by rules for web text; write false and clean the annotations, "
                "or give text_preprocess_methods",
            )
        return self

    @property
    def validates(self) -> bool:
        """Whether there is a validation set, for `--eval-interval`."""
        return self.basic_parameters.val_data_path is not None or bool(self.basic_parameters.val_rate)

    def text_methods(self) -> tuple[str, ...]:
        """Return the names of the cleaning steps that are applied, in order."""
        if not self.enable_text_preprocessing:
            return ()
        return method_names(self.text_preprocess_methods)
