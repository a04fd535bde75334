"""Whether a network has an embedding for every id of a tokenizer."""

from __future__ import annotations

from mm_core.models.transformers_model import TransformersModel
from mm_registry.errors import UserError


def check_network_vocabulary(model: TransformersModel, tokenizer_size: int) -> None:
    """Refuse a tokenizer with ids that the network has no embedding for: they would be an error of an index, on a device one
    without a place.

    Args:
        tokenizer_size: number of ids.

    Raises:
        UserError: the network has fewer embeddings.
    """
    size = getattr(model.model.get_input_embeddings(), "num_embeddings", None)
    if isinstance(size, int) and size < tokenizer_size:
        raise UserError(
            f"the network of init_from_hf_path has {size} embeddings (vocab_size in its config.json), but the tokenizer of "
            f"preprocess_parameters.model_name_or_path has {tokenizer_size} ids; name the same folder in both"
        )
