"""`--eval-interval` and `--eval-iters` against the dataset."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from mm_core.config import parse_train_flags
from mm_core.config.component import ComponentConfig
from mm_core.config.cross_checks import check_validation
from mm_core.config.dataset import BasicParameters, T2VDatasetConfig
from mm_registry.spec import EntrySpec

NEEDED = ["--lr", "1e-5", "--train-iters", "10", "--micro-batch-size", "1"]


class Silent(BaseModel):
    """A config class of somebody who never heard of validation."""


class Validating(Silent):
    validates: bool


def clips(**basic: Any) -> T2VDatasetConfig:
    return T2VDatasetConfig.model_construct(basic_parameters=BasicParameters(data_path="a.json", **basic))


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        (
            clips(),
            ["--eval-interval", "10", "--eval-iters", "2"],
            ["--eval-interval", "--eval-iters"],
        ),
        (clips(), [], []),
        (clips(val_rate=0.1), ["--eval-interval", "10"], []),
        (clips(val_data_path="b.json"), ["--eval-interval", "10"], []),
        (Silent(), ["--eval-interval", "10"], []),
        (Validating(validates=True), ["--eval-iters", "10"], []),
        (Validating(validates=False), ["--eval-iters", "10"], ["--eval-iters"]),
        (None, ["--eval-iters", "10"], []),
    ],
)
def test_flags_that_find_nothing_to_validate_are_told(config, flags, said) -> None:
    spec = EntrySpec("some", "mm_core.datasets", "a:B", "a", "1", "")
    dataset = ComponentConfig("dataset", "some", spec, config=config)
    findings = list(check_validation(dataset, parse_train_flags([*NEEDED, *flags])))
    assert [(f.level, f.code, f.path) for f in findings] == [("note", "no-effect", flag) for flag in said]
    assert not list(check_validation(None, parse_train_flags([*NEEDED, *flags])))
    assert all(
        f.message == f"{f.path} has no effect here: the dataset has no validation set" for f in findings
    )
