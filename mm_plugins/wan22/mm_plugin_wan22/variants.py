"""The types of Wan's transformer: what each is given beside the noised latents and the text. Torch-free."""

from __future__ import annotations

#: Types whose input has, beside the noised latents, a mask and as many latents of the given frames.
CONCATENATED = frozenset({"i2v", "flf2v", "wan2.2-i2v"})
#: Wan2.1's types with an image: they embed CLIP's features of it as well.
IMAGE_EMBEDDED = frozenset({"i2v", "flf2v"})
#: The type whose given first frame stands in place of the noised one, at timestep 0.
FIRST_FRAME = frozenset({"ti2v"})
MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v", "wan2.2-t2v", "wan2.2-i2v")

MASK_CHANNELS = 4
CLIP_TOKENS = 257
#: Upstream's attention takes this many tokens at the end of its context for the text, and the rest for the image.
TEXT_TOKENS_BESIDE_IMAGE = 512


def taken(model_type: str) -> dict[str, bool]:
    """Names of the conditions that a type takes -> whether it needs them."""
    if model_type in FIRST_FRAME:
        return {"first_frame_latents": False}
    needed = {"i2v_vae_feature": model_type in CONCATENATED, "clip_feature": model_type in IMAGE_EMBEDDED}
    return {name: True for name, wanted in needed.items() if wanted}
