"""`data.json`: the dataset and how batches are drawn from it."""

from typing import Annotated, Any, Self, TypeAlias

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel, invalid

_BUCKETS = (
    "buckets of similar samples are not available yet; remove the key: every sample is resized to one size"
)
_Bucket: TypeAlias = Annotated[bool, Only(False, reason=_BUCKETS)]
_FLAGS = "the command line decides"


class DataloaderConfig(SectionModel):
    """`dataloader_param`.

    All ranks draw from one global order of samples that depends on the seed alone, so the same job gives
    the same batches on any number of ranks. Sizes and the number of workers are flags.
    """

    dataloader_mode: Annotated[
        str, Only("sampler", reason="samples are always dealt by one global sampler")
    ] = "sampler"
    sampler_type: Annotated[
        str,
        Only(
            "stateful_distributed_sampler",
            "SequentialSampler",
            reason="samplers that form buckets or balance lengths are not available yet; use "
            "stateful_distributed_sampler "
            "(with shuffle) or SequentialSampler",
        ),
    ] = "stateful_distributed_sampler"
    shuffle: Annotated[bool, Field(description="A new order each epoch, keyed by --seed.")] = False
    drop_last: Annotated[bool, NoEffect("batches are always full: one goes on into the next epoch")] = False
    pin_memory: Annotated[
        bool, Field(description="Page-locked host memory, for faster copies to a device.")
    ] = False
    prefetch_factor: Annotated[
        int | None, Field(ge=1, description="Batches that each worker prepares ahead.")
    ] = None
    persistent_workers: Annotated[
        bool, NoEffect("workers always live as long as the job: there is no end of an epoch")
    ] = False
    group_frame: _Bucket = False
    group_resolution: _Bucket = False
    group_data: _Bucket = False
    initial_global_step_for_sampler: Annotated[
        int, Only(0, reason="the position in the data comes with the checkpoint (--load)")
    ] = 0
    data_sharding: Annotated[
        bool, NoEffect("each rank always reads its own samples only", quiet_for=(False,))
    ] = False
    priority_mode: Annotated[str | None, NoEffect("it orders buckets, which are not used")] = None
    collate_param: Annotated[dict[str, Any] | None, NoEffect("the dataset brings its own collation")] = None
    batch_size: Annotated[int | None, NoEffect(f"{_FLAGS}: --micro-batch-size")] = None
    num_workers: Annotated[int | None, NoEffect(f"{_FLAGS}: --num-workers")] = None
    seed: Annotated[int | None, NoEffect(f"{_FLAGS}: --seed")] = None

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.shuffle and self.sampler_type == "SequentialSampler":
            raise invalid("shuffle", "a SequentialSampler does not shuffle; use stateful_distributed_sampler")
        return self


class DataConfig(SectionModel):
    """The top level of `data.json`. `dataset_param` is checked by the config class of its `dataset_type`."""

    dataset_param: Annotated[dict[str, Any], Field(description="The dataset; `dataset_type` is its id.")]
    dataloader_param: DataloaderConfig = Field(default_factory=DataloaderConfig)
