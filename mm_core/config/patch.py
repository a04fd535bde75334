"""`patch` of a model file: MindSpeed-MM's switches for replaced functions."""

from typing import Annotated, TypeAlias

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel

_DIRECT = "weights are read straight from a Hugging Face folder or a checkpoint, each rank its own part"
_Load: TypeAlias = Annotated[bool, NoEffect(_DIRECT, quiet_for=(False,))]


class PatchConfig(SectionModel):
    """Nothing is patched here; each switch is honoured in another way, without effect, or refused."""

    clip_grad_async: Annotated[bool, NoEffect("clipping never waits for the device", quiet_for=(False,))] = (
        False
    )
    get_dist_model_load_from_pt: _Load = False
    bridge_patch: _Load = False
    infer_fa: Annotated[
        bool, NoEffect("the attention backend is chosen by the device", quiet_for=(False,))
    ] = False
    use_fsdp1: Annotated[bool, NoEffect("models are always sharded by FSDP2", quiet_for=(False,))] = False
    scale_grad: Annotated[
        bool,
        NoEffect("the loss is normalised once over the whole global batch", quiet_for=(False,)),
    ] = False
    ae_float32: Annotated[bool, Only(False, reason='write "dtype": "fp32" in the "ae" section instead')] = (
        False
    )
    adaptive_clip_grad_norm: Annotated[
        bool, Only(False, reason="adaptive clipping is not available yet; --clip-grad sets a fixed bound")
    ] = False
    muon_optimizer: Annotated[bool, Only(False, reason="the Muon optimizer is not available yet")] = False
    layerwise_disaggregated_training: Annotated[
        bool, Only(False, reason="layerwise disaggregated training is not available")
    ] = False
