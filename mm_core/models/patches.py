"""How large a token of a predictor is."""

from __future__ import annotations

from typing import Any


def patch_size(predictor: Any) -> tuple[int, ...]:
    """Latent frames, rows and columns of one token: `patch_size` of the predictor's config, or its own, where
    that says three numbers; else a token for each position.
    """
    # The config first: diffusers' models warn when they are asked for what is in theirs.
    for holder in (getattr(predictor, "config", None), predictor):
        patch = getattr(holder, "patch_size", None)
        if isinstance(patch, list | tuple) and len(patch) == 3:
            return tuple(patch)
    return (1, 1, 1)
