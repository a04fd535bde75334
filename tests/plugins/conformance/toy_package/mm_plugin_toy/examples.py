from mm_core.testing.example import Example

TOY_DIT = Example({"init": "random"}, latents=(4, 2, 4, 4), prompt=(5, 6))
TOY_VAE = Example({"init": "random"}, video=(3, 4, 4))
TOY_TEXT = Example({"init": "random"}, tokens=5)
TOY_FLOW = Example()
TOY_CLIPS = Example()
TOY_FIRST = Example({"frames": 2})
TOY_PIPELINE = Example({"input_size": [3, 4, 4]})
TOY_NET = Example(
    {"freeze_embedding": True},
    config={"model_type": "toy_net", "vocab_size": 32, "width": 12, "num_layers": 2},
)
