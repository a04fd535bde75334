"""`--encode-ahead` beside keys of the model file that it cannot go with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import parse_train_flags, read_document
from mm_core.config.cross_checks import check_encode_ahead

NEEDED = ["--mm-model", "m", "--mm-data", "d", "--train-iters", "1", "--lr", "1e-4"]


@pytest.mark.parametrize(
    ("keys", "flags", "words"),
    [
        ({"encoder_offload_interval": 4}, ["--encode-ahead"], "encoder_offload_interval 4 is to keep them off the device"),
        ({"enable_encoder_dp": True}, ["--encode-ahead"], "those of enable_encoder_dp would get between them"),
        ({"encoder_offload_interval": 1, "enable_encoder_dp": False}, ["--encode-ahead"], None),
        ({"encoder_offload_interval": 4, "enable_encoder_dp": True}, [], None),
    ],
)  # fmt: skip
def test_what_moves_or_shares_the_encoders_does_not_go_with_it(
    tmp_path: Path, keys: dict[str, Any], flags: list[str], words: str | None
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(keys))
    model = read_document(tmp_path / "model.json")
    findings = list(check_encode_ahead(model, parse_train_flags([*NEEDED, *flags])))
    if words is None:
        assert not findings
        return
    (finding,) = findings
    assert (finding.level, finding.path) == ("error", "--encode-ahead")
    assert words in finding.message
