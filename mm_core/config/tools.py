"""`tools.json`: profiling."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect
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
        Literal["level0", "level1", "level2", "level_none"], NoEffect(_ASCEND, quiet_for=("level0",))
    ] = "level0"
    data_simplification: Annotated[bool, NoEffect(_ASCEND, quiet_for=(False,))] = False
    aic_metrics_type: Annotated[
        Literal["PipeUtilization", "ArithmeticUtilization"], NoEffect(_ASCEND, quiet_for=("PipeUtilization",))
    ] = "PipeUtilization"
    analyse_flag: Annotated[bool, NoEffect(_ASCEND, quiet_for=(True,))] = True

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.end_step <= self.start_step:
            raise invalid("end_step", f"must be greater than start_step ({self.start_step})")
        return self


class DynamicProfileConfig(SectionModel):
    """`profile.dynamic_param`."""

    config_path: str | None = None


class ProfileConfig(SectionModel):
    """`profile`: `torch.profiler` on chosen ranks and steps."""

    enable: bool = False
    profile_type: Literal["static", "dynamic"] = "static"
    ranks: Annotated[
        list[Annotated[int, Field(ge=-1)]], Field(min_length=1, description="Ranks to profile; -1 is all.")
    ] = Field(default_factory=lambda: [0])
    static_param: StaticProfileConfig = Field(default_factory=StaticProfileConfig)
    dynamic_param: DynamicProfileConfig = Field(default_factory=DynamicProfileConfig)

    @model_validator(mode="after")
    def _static_only(self) -> Self:
        if self.enable and self.profile_type == "dynamic":
            raise invalid("profile_type", 'dynamic profiling is not available yet; use "static"')
        return self


class MemoryProfileConfig(SectionModel):
    """`memory_profile`: accepted while it is off."""

    enable: bool = False
    start_step: Annotated[int, Field(ge=0)] = 0
    end_step: Annotated[int, Field(ge=1)] = 2
    save_path: str = "./memory_snapshot"
    dump_ranks: list[Annotated[int, Field(ge=-1)]] = Field(default_factory=lambda: [0])
    stacks: Literal["python", "all"] = "all"
    max_entries: Annotated[int, Field(ge=1)] | None = None
    mem_info: bool = False

    @model_validator(mode="after")
    def _off(self) -> Self:
        if self.enable:
            raise invalid("enable", "memory snapshots are not available yet; set it to false")
        return self


class ToolsConfig(SectionModel):
    """The top level of `tools.json`. Every key is optional, and so is the file."""

    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    memory_profile: MemoryProfileConfig = Field(default_factory=MemoryProfileConfig)
    sorafeature: Annotated[dict[str, Any] | None, NoEffect("features are not extracted during training")] = (
        None
    )
