"""The tokenizer must fit the text encoder and the predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding
from mm_core.config.origin import KeyPath


def check_text(
    components: Mapping[str, ComponentConfig],
    model: Document,
    tokens: int | None,
    tokenizer: Document,
    path: KeyPath,
) -> Iterator[Finding]:
    """The tokenizer must not make more tokens than the predictor reads, and there is one tokenizer.

    Args:
        tokens: `model_max_length` of the tokenizer, None if it is not known here.
        tokenizer, path: where that stands.
    """
    predictor = components.get("predictor")
    room = predictor.fields.get("text_len") if predictor is not None else None
    if predictor is not None and isinstance(room, int) and tokens is not None and tokens > room:
        text = f"model_max_length is {tokens}, but {predictor.label} reads {room} tokens (text_len)"
        mend = f"Write {room}, or raise text_len"
        yield Finding.at(tokenizer.origin(path), "error", "text-length", text, path=path, suggestion=mend)
    if "text_encoder.1" in components:
        place = components["text_encoder.1"].path
        text = "the captions are tokenised once, for one text encoder"
        mend = "Keep one section"
        yield Finding.at(model.key_origin(place), "error", "text-encoders", text, path=place, suggestion=mend)
