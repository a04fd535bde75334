"""`tools.json`: profiling."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, NotYet
from mm_core.config.section import SectionModel, invalid

_ASCEND = "it belongs to Ascend's own profiler; torch.profiler writes a Chrome trace"


class StaticProfileConfig(SectionModel):
    """`profile.static_param`: the steps `start_step <= step < end_step`, counted from 1."""

    start_step: Annotated[int, Field(ge=1, description="First profiled step.")] = 10
    end_step: Annotated[int, Field(ge=2, description="First step that is not profiled any more.")] = 11
    save_path: Annotated[str, Field(min_length=1, description="Folder of the traces.")] = "./profile"
    with_cpu: Annotated[bool, Field(description="Record the host's activity.")] = True
    with_stack: Annotated[bool, Field(description="Record Python stacks.")] = False
    with_memory: Annotated[bool, Field(description="Record allocations.")] = False
    record_shapes: Annotated[bool, Field(description="Record the shapes of operators' inputs.")] = False
    level: Annotated[
        Literal["level0", "level1", "level2", "level_none"],
        NoEffect(_ASCEND, quiet_for=("level0",)),
        Field(description="How much of the device is recorded."),
    ] = "level0"
    data_simplification: Annotated[
        bool,
        NoEffect(_ASCEND, quiet_for=(False,)),
        Field(description="Delete raw data once it is analysed."),
    ] = False
    aic_metrics_type: Annotated[
        Literal["PipeUtilization", "ArithmeticUtilization"],
        NoEffect(_ASCEND, quiet_for=("PipeUtilization",)),
        Field(description="Counters of the AI cores."),
    ] = "PipeUtilization"
    analyse_flag: Annotated[
        bool, NoEffect(_ASCEND, quiet_for=(True,)), Field(description="Analyse the data when recording ends.")
    ] = True

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.end_step <= self.start_step:
            raise invalid("end_step", f"must be greater than start_step ({self.start_step})")
        return self


class DynamicProfileConfig(SectionModel):
    """`profile.dynamic_param`."""

    config_path: Annotated[
        str | None, Field(min_length=1, description="Folder of a file that says at run time what to profile.")
    ] = None


class ProfileConfig(SectionModel):
    """`profile`: `torch.profiler` on chosen ranks and steps."""

    enable: Annotated[
        bool, Field(description="Whether to profile; everything else is only checked if not.")
    ] = False
    profile_type: Annotated[
        Literal["static", "dynamic"],
        NotYet("static", reason="dynamic profiling is not available yet", unless=("enable", False)),
        Field(
            description="`static`: the steps of static_param. `dynamic`: as a file says while the job runs."
        ),
    ] = "static"
    ranks: Annotated[
        list[Annotated[int, Field(ge=-1)]], Field(min_length=1, description="Ranks to profile; -1 is all.")
    ] = Field(default_factory=lambda: [0])
    static_param: Annotated[
        StaticProfileConfig, Field(description="Which steps are profiled, and what is recorded.")
    ] = Field(default_factory=StaticProfileConfig)
    dynamic_param: Annotated[
        DynamicProfileConfig, Field(description="Where dynamic profiling is told what to do.")
    ] = Field(default_factory=DynamicProfileConfig)


class MemoryProfileConfig(SectionModel):
    """`memory_profile`: accepted while it is off."""

    enable: Annotated[
        bool,
        NotYet(False, reason="memory snapshots are not available yet"),
        Field(description="Whether to record allocations."),
    ] = False
    start_step: Annotated[
        int, Field(ge=0, description="First recorded step; 0 is the building of the job.")
    ] = 0
    end_step: Annotated[int, Field(ge=1, description="First step that is not recorded any more.")] = 2
    save_path: Annotated[str, Field(min_length=1, description="Folder of the snapshots.")] = (
        "./memory_snapshot"
    )
    dump_ranks: Annotated[
        list[Annotated[int, Field(ge=-1)]], Field(description="Ranks that write a snapshot; -1 is all.")
    ] = Field(default_factory=lambda: [0])
    stacks: Annotated[
        Literal["python", "all"], Field(description="Stacks of Python alone, or of C++ as well.")
    ] = "all"
    max_entries: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Most events that are kept; null: all.")
    ] = None
    mem_info: Annotated[bool, Field(description="Print used memory each step.")] = False

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.end_step <= self.start_step:
            raise invalid("end_step", f"must be greater than start_step ({self.start_step})")
        return self


class FeaturesConfig(SectionModel):
    """`sorafeature`: where `mm extract-features` writes, unless --output says it."""

    save_path: Annotated[str | None, Field(min_length=1, description="Folder of the features.")] = None
    extract_video_feature: Annotated[
        bool, Field(description="Store latents; MindSpeed-MM documents the key and reads it nowhere.")
    ] = True
    extract_text_feature: Annotated[
        bool, Field(description="Store embeddings; MindSpeed-MM documents the key and reads it nowhere.")
    ] = True


class ToolsConfig(SectionModel):
    """The top level of `tools.json`. Every key is optional, and so is the file."""

    profile: Annotated[ProfileConfig, Field(description="Profiling of chosen ranks and steps.")] = Field(
        default_factory=ProfileConfig
    )
    memory_profile: Annotated[MemoryProfileConfig, Field(description="Snapshots of allocations.")] = Field(
        default_factory=MemoryProfileConfig
    )
    sorafeature: Annotated[
        FeaturesConfig | None,
        NoEffect("`mm extract-features` alone reads it, for its --output"),
        Field(description="Where `mm extract-features` writes."),
    ] = None
