"""`data.json`: the dataset and how batches are drawn from it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel, invalid

_ONE_SAMPLER = "samples are always dealt by one global sampler, and group_data groups clips of several sizes"
_FLAGS = "the command line decides"
#: Always draws at random, in MindSpeed-MM as here.
_RANDOM = "BaseRandomBatchSampler"


class CollateConfig(SectionModel):
    """`dataloader_param.collate_param`, of vision-language models."""

    model_name: Annotated[
        str | None,
        NoEffect("the dataset's own collation fits its samples"),
        Field(min_length=1, description="Family whose samples are stacked, such as `qwen3vl`."),
    ] = None
    ignore_pad_token_for_loss: Annotated[
        bool,
        Only(
            True,
            reason="padding that is learnt would let the loss depend on which samples share a micro batch",
        ),
        Field(description="Leave padding out of the loss."),
    ] = True


class DataloaderConfig(SectionModel):
    """`dataloader_param`.

    All ranks draw from one global order of samples that depends on the seed alone (and, where samples are grouped,
    on the size of a micro batch), so the same job gives the same batches on any number of ranks. Sizes and the number
    of workers are flags.
    """

    dataloader_mode: Annotated[
        Literal["sampler", "base", "variable"],
        Only("sampler", reason=_ONE_SAMPLER),
        Field(description="How the loader is made: with a sampler, plain, or for clips of several sizes."),
    ] = "sampler"
    sampler_type: Annotated[
        Literal[
            "stateful_distributed_sampler",
            "SequentialSampler",
            "BaseRandomBatchSampler",
            "LengthGroupedSampler",
            "VariableVideoBatchSampler",
        ],
        Only(
            "stateful_distributed_sampler",
            "SequentialSampler",
            _RANDOM,
            "LengthGroupedSampler",
            reason=_ONE_SAMPLER,
        ),
        Field(
            description="`SequentialSampler`: the dataset's order. `BaseRandomBatchSampler`: a new one each epoch. "
            "`stateful_distributed_sampler`: as `shuffle` says; `LengthGroupedSampler`: also, and ranks do clips of about one "
            "size at the same time."
        ),
    ] = "stateful_distributed_sampler"
    shuffle: Annotated[
        bool,
        Field(description="A new order each epoch, keyed by --seed. BaseRandomBatchSampler: true by itself."),
    ] = False
    drop_last: Annotated[
        bool,
        NoEffect("batches are always full: one goes on into the next epoch"),
        Field(description="Leave out the last batch of an epoch when it is not full."),
    ] = False
    pin_memory: Annotated[
        bool, Field(description="Page-locked host memory, for faster copies to a device.")
    ] = False
    prefetch_factor: Annotated[
        int | None, Field(ge=1, description="Batches that each worker prepares ahead.")
    ] = None
    persistent_workers: Annotated[
        bool | None,
        NoEffect(
            "workers always live as long as the job: there is no end of an epoch", quiet_for=(True, None)
        ),
        Field(description="Keep workers from one epoch to the next."),
    ] = None
    group_frame: Annotated[
        bool,
        Field(description="Micro batches of clips with as many frames; the others' sizes must be alike."),
    ] = False
    group_resolution: Annotated[
        bool,
        Field(description="Micro batches of clips of one height and width; their frames must be as many."),
    ] = False
    group_data: Annotated[
        bool,
        Field(
            description="Micro batches of clips of one shape (frames, height, width). What does not fill one stays out of "
            "the epoch, which is reported."
        ),
    ] = False
    initial_global_step_for_sampler: Annotated[
        int,
        Only(0, reason="the position in the data comes with the checkpoint (--load)"),
        Field(description="Step at which the order begins."),
    ] = 0
    data_sharding: Annotated[
        bool,
        NoEffect("each rank always reads its own samples only", quiet_for=(False,)),
        Field(description="Give each rank a part of the dataset for good."),
    ] = False
    priority_mode: Annotated[
        str | None,
        NoEffect("micro batches of all buckets are drawn alike", quiet_for=("data_bucketing_img", None)),
        Field(description="Which buckets come first."),
    ] = None
    collate_param: Annotated[
        CollateConfig | None, Field(description="How samples are stacked to a batch.")
    ] = None
    batch_size: Annotated[
        int | None,
        NoEffect(f"{_FLAGS}: --micro-batch-size"),
        Field(description="Samples of a micro batch of one rank."),
    ] = None
    num_workers: Annotated[
        int | None, NoEffect(f"{_FLAGS}: --num-workers"), Field(description="Processes that prepare batches.")
    ] = None
    seed: Annotated[
        int | None, NoEffect(f"{_FLAGS}: --seed"), Field(description="Of the order of samples.")
    ] = None

    def grouped_axes(self) -> tuple[str, ...]:
        """Return in which of frames, height and width the clips of a micro batch are alike by the order of samples."""
        frames = ("frames",) if self.group_data or self.group_frame else ()
        return frames + (("height", "width") if self.group_data or self.group_resolution else ())

    @model_validator(mode="before")
    @classmethod
    def _random_order(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sampler_type") == _RANDOM and "shuffle" not in data:
            return {**data, "shuffle": True}
        return data

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.shuffle and self.sampler_type == "SequentialSampler":
            raise invalid("shuffle", "a SequentialSampler does not shuffle; use stateful_distributed_sampler")
        if self.sampler_type == _RANDOM:
            if not self.shuffle:
                raise invalid(
                    "shuffle", f"a {_RANDOM} draws at random; use SequentialSampler to keep the order"
                )
            if "drop_last" in self.model_fields_set and not self.drop_last:
                raise invalid("drop_last", f"a {_RANDOM} always drops the last batch; set it to true")
        return self


class DataConfig(SectionModel):
    """The top level of `data.json`. `dataset_param` is checked by the config class of its `dataset_type`."""

    dataset_param: Annotated[dict[str, Any], Field(description="The dataset; `dataset_type` is its id.")]
    dataloader_param: Annotated[
        DataloaderConfig, Field(description="How batches are drawn from the dataset.")
    ] = Field(default_factory=DataloaderConfig)
