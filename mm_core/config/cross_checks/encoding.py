"""What a job says of its encoders in its model file, against the flag that gives them a thread of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm_core.config.document import Document
from mm_core.config.findings import Finding

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags  # many classes, which a single file does not need


def check_encode_ahead(model: Document, flags: TrainFlags) -> Iterator[Finding]:
    """`--encode-ahead` beside keys that it cannot go with.

    Args:
        model: model.json.
    """
    if not flags.encode_ahead:
        return
    data = model.data if isinstance(model.data, dict) else {}
    interval, shared = data.get("encoder_offload_interval"), data.get("enable_encoder_dp")
    flag = flags.spelling("encode_ahead")
    if isinstance(interval, int) and interval > 1:
        text = (
            f"{flag} computes with the encoders beside the training, but encoder_offload_interval {interval} is to keep them "
            "off the device then"
        )
        yield flags.finding("encode_ahead", "conflict", text, "Leave one of them out")
    if shared is True:
        text = (
            f"{flag} encodes beside the training's own exchanges between ranks, and those of enable_encoder_dp would get "
            "between them"
        )
        yield flags.finding("encode_ahead", "conflict", text, "Leave one of them out")
