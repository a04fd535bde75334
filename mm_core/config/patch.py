"""`patch` of a model file: MindSpeed-MM's switches for replaced functions."""

from typing import Annotated

from pydantic import Field

from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import SectionModel

_DIRECT = "weights are read straight from a Hugging Face folder or a checkpoint, each rank its own part"


class PatchConfig(SectionModel):
    """Nothing is patched here; each switch is honoured in another way, without effect, or refused."""

    clip_grad_async: Annotated[
        bool,
        Field(
            description="Clip gradients without waiting for the device: a step's numbers are read one step later, and a "
            "step whose loss is not finite is skipped on the device."
        ),
    ] = False
    get_dist_model_load_from_pt: Annotated[
        bool,
        NoEffect(_DIRECT, quiet_for=(False,)),
        Field(description="Load whole files of weights before the model is sharded."),
    ] = False
    bridge_patch: Annotated[
        bool,
        NoEffect(_DIRECT, quiet_for=(False,)),
        Field(description="Load Hugging Face weights while the model is sharded."),
    ] = False
    infer_fa: Annotated[
        bool,
        NoEffect("the attention backend is chosen by the device", quiet_for=(False,)),
        Field(description="Use Ascend's fused attention in inference."),
    ] = False
    use_fsdp1: Annotated[
        bool,
        NoEffect("models are always sharded by FSDP2", quiet_for=(False,)),
        Field(description="Shard by FSDP's first version."),
    ] = False
    scale_grad: Annotated[
        bool,
        NoEffect("the loss is normalised once over the whole global batch", quiet_for=(False,)),
        Field(description="Scale gradients by the number of data-parallel ranks."),
    ] = False
    ae_float32: Annotated[
        bool,
        Only(False, reason='write "dtype": "fp32" in the "ae" section instead'),
        Field(description="Run the autoencoder in fp32."),
    ] = False
    adaptive_clip_grad_norm: Annotated[
        bool,
        NotYet(False, reason="gradients are clipped by the fixed bound of --clip-grad only"),
        Field(description="Clip gradients by a bound that follows their recent norms."),
    ] = False
    muon_optimizer: Annotated[
        bool,
        NotYet(False, reason="the Muon optimizer is not available yet"),
        Field(description="Train with the Muon optimizer."),
    ] = False
    layerwise_disaggregated_training: Annotated[
        bool,
        Only(False, reason="layerwise disaggregated training is not available"),
        Field(description="Split the layers of one model between kinds of machines."),
    ] = False
