"""Where the toy plugin's sources are, and what its distribution declares."""

from __future__ import annotations

from pathlib import Path

DISTRIBUTION = "mmzoo-plugin-toy"
PACKAGE = "mm_plugin_toy"
SOURCES = Path(__file__).parent / "toy_package" / PACKAGE

ENTRY_POINTS = """\
[mm_core.predictor_models]
toy_dit = mm_plugin_toy.predictor:ToyDiT
[mm_core.ae_models]
toy_vae = mm_plugin_toy.autoencoder:ToyVAE
[mm_core.text_encoders]
toy_text = mm_plugin_toy.text_encoder:ToyText
[mm_core.diffusion_models]
toy_flow = mm_plugin_toy.scheduler:ToyFlow
[mm_core.transformers_models]
toy_net = mm_plugin_toy.network:ToyNet
[mm_core.i2v_processors]
toy_first = mm_plugin_toy.parts:ToyFirstFrame
[mm_core.datasets]
toy_clips = mm_plugin_toy.parts:ToyClips
[mm_core.tasks]
toy_task = mm_plugin_toy.parts:ToyTask
[mm_core.callbacks]
toy_callback = mm_plugin_toy.parts:ToyCallback
[mm_core.pipelines]
toy_pipeline = mm_plugin_toy.parts:ToyPipeline
[mm_core.configs]
predictor/toy_dit = mm_plugin_toy.config:ToyDiTConfig
ae/toy_vae = mm_plugin_toy.config:ToyVAEConfig
text_encoder/toy_text = mm_plugin_toy.config:ToyTextConfig
diffusion/toy_flow = mm_plugin_toy.config:ToyFlowConfig
transformers_model/toy_net = mm_plugin_toy.config:ToyNetSectionConfig
i2v_processor/toy_first = mm_plugin_toy.config:ToyFirstFrameConfig
dataset/toy_clips = mm_plugin_toy.config:ToyClipsConfig
pipeline/toy_pipeline = mm_plugin_toy.config:ToyPipelineConfig
[mm_core.sharding_policies]
predictor/toy_dit = mm_plugin_toy.policy:TOY_DIT
transformers_model/toy_net = mm_plugin_toy.network_policy:TOY_NET
[mm_core.weights]
predictor/toy_dit = mm_plugin_toy.weights:ADAPTER
[mm_core.hooks]
toy = mm_plugin_toy.hooks
[mm_core.examples]
predictor/toy_dit = mm_plugin_toy.examples:TOY_DIT
ae/toy_vae = mm_plugin_toy.examples:TOY_VAE
text_encoder/toy_text = mm_plugin_toy.examples:TOY_TEXT
diffusion/toy_flow = mm_plugin_toy.examples:TOY_FLOW
transformers_model/toy_net = mm_plugin_toy.examples:TOY_NET
i2v_processor/toy_first = mm_plugin_toy.examples:TOY_FIRST
dataset/toy_clips = mm_plugin_toy.examples:TOY_CLIPS
pipeline/toy_pipeline = mm_plugin_toy.examples:TOY_PIPELINE
"""
