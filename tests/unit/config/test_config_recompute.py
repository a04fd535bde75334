"""Recomputation and offload of activations: in flags, in the predictor's section, and in fsdp2.yaml, which decides."""

from __future__ import annotations

from typing import Any

import pytest

from mm_core.config import ConfigError, load_training_job
from mm_core.config.flags import TrainFlags
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.recompute import with_recompute_flags
from mm_core.models.factory import sharding_policy

BLOCKS = ("predictor.blocks.{*}",)


def filled(fsdp2: dict[str, Any], **flags: Any) -> tuple[dict[str, Any], list[str], Fsdp2Config]:
    """What the flags add to fsdp2.yaml, and what is said."""
    before = Fsdp2Config(**fsdp2)
    after, findings = with_recompute_flags(
        before, TrainFlags(**{f"recompute_{k}": v for k, v in flags.items()})
    )
    new = after.model_fields_set - before.model_fields_set
    return {name: getattr(after, name) for name in new}, [str(finding) for finding in findings], after


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {}),
        ({"granularity": "full"}, {"recompute_granularity": "full"}),
        ({"granularity": "selective"}, {"recompute_granularity": "selective"}),
        (
            {"granularity": "full", "method": "block", "num_layers": 2},
            {"recompute_granularity": "full", "recompute_num_layers": 2},
        ),
        (
            {"granularity": "full", "method": "uniform"},
            {"recompute_granularity": "full", "recompute_num_layers": None},
        ),
        (
            {"granularity": "full", "method": "uniform", "num_layers": 1},
            {"recompute_granularity": "full", "recompute_num_layers": None},
        ),
    ],
)
def test_flags_fill_what_the_file_leaves_open(flags: dict[str, Any], expected: dict[str, Any]) -> None:
    new, said, after = filled({"use_reentrant": False}, **flags)
    assert new == expected
    assert said == []
    assert {after.source(name) for name in new} <= {f"--{name.replace('_', '-')}" for name in new}


@pytest.mark.parametrize(
    ("fsdp2", "flags", "expected", "said"),
    [
        (
            {},
            {"granularity": "full", "method": "uniform", "num_layers": 4},
            {"recompute_granularity": "full", "recompute_num_layers": None},
            ["--recompute-num-layers note: 4 layers would be one checkpoint; here each is one"],
        ),
        (
            {"recompute_modules": BLOCKS},
            {"granularity": "full", "method": "block", "num_layers": 4},
            {"recompute_granularity": "full"},
            [
                "--recompute-method note: it has no effect: recompute_modules in fsdp2.yaml chooses what is recomputed",
                "--recompute-num-layers note: it has no effect: recompute_modules in fsdp2.yaml chooses what is "
                "recomputed",
            ],
        ),
        (
            {"recompute_modules": BLOCKS},
            {"granularity": "selective"},
            {"recompute_granularity": "selective"},
            [],
        ),
        (
            {"recompute_modules": ()},
            {"granularity": "full"},
            {"recompute_granularity": "full"},
            [
                "--recompute-granularity note: it has no effect: recompute_modules in fsdp2.yaml chooses what is "
                "recomputed, which is nothing"
            ],
        ),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 3},
            {"granularity": "full", "method": "block", "num_layers": 4},
            {},
            [
                "--recompute-granularity note: it has no effect: fsdp2.yaml decides, where recompute_granularity is "
                '"selective"',
                "--recompute-num-layers note: it has no effect: fsdp2.yaml decides, where recompute_num_layers is 3",
            ],
        ),
        ({"recompute_granularity": "full"}, {"granularity": "full"}, {}, []),
    ],
)
def test_the_file_decides_and_a_note_says_so(
    fsdp2: dict[str, Any], flags: dict[str, Any], expected: dict[str, Any], said: list[str]
) -> None:
    new, found, _ = filled(fsdp2, **flags)
    assert new == expected
    assert found == said


@pytest.mark.parametrize(
    ("fsdp2", "flags", "said"),
    [
        (
            {},
            {"method": "block", "num_layers": 2},
            '--recompute-method error: "block" chooses among layers that are recomputed in full: it needs granularity '
            '"full", which is missing. Add it, or take the method out',
        ),
        (
            {},
            {"granularity": "selective", "method": "uniform"},
            '--recompute-method error: "uniform" chooses among layers that are recomputed in full: it needs granularity '
            '"full", not "selective". Use "full", or take the method out',
        ),
        (
            {},
            {"granularity": "full", "num_layers": 2},
            '--recompute-num-layers error: 2 needs a method: "block" recomputes the first 2 layers, "uniform" all of '
            "them. Add one of the two, or take the number out",
        ),
        (
            {},
            {"granularity": "full", "method": "block"},
            '--recompute-method error: "block" recomputes the first layers, and no number of layers says how many. Add '
            'the number, or use "uniform"',
        ),
        (
            {"use_reentrant": True},
            {"granularity": "selective"},
            "--recompute-granularity error: selective recomputation cannot be done with use_reentrant: true of "
            "fsdp2.yaml. Take use_reentrant out, or use full",
        ),
    ],
)
def test_what_does_not_go_together_is_an_error(
    fsdp2: dict[str, Any], flags: dict[str, Any], said: str
) -> None:
    new, found, _ = filled(fsdp2, **flags)
    assert new == {}
    assert found == [said]


def test_a_job_takes_the_flags_and_says_where_they_came_from(files: Any) -> None:
    line = "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    job = load_training_job(files.flags(*line.split()))
    assert (job.fsdp2.recompute_granularity, job.fsdp2.recompute_num_layers) == ("full", 2)
    origins = job.resolved()["origins"]
    assert origins["fsdp2.recompute_granularity"] == "--recompute-granularity"
    assert origins["fsdp2.recompute_num_layers"] == "--recompute-num-layers"
    files.fsdp2 += "recompute_modules: ['predictor.blocks.{0-3}']\n"
    files.write()
    job = load_training_job(files.flags(*line.split()))
    assert job.fsdp2.recompute_num_layers is None
    noted = {finding.path for finding in job.findings if "recompute_modules" in finding.message}
    assert noted == {"--recompute-method", "--recompute-num-layers"}


def test_a_job_refuses_flags_that_do_not_go_together(files: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags("--recompute-method", "uniform"))
    assert "--recompute-method" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ((), None, None, ())),
        ({"recompute_granularity": "full"}, (("blocks.{*}",), "full", None, ())),
        ({"recompute_granularity": "selective"}, (("blocks.{*}",), "selective", None, ())),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            (("blocks.{*}",), "full", 3, ()),
        ),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
            (("blocks.{*}",), "full", None, ()),
        ),
        (
            {"attention_async_offload": True},
            ((), None, None, ("blocks.{*}.attn1", "blocks.{*}.attn2")),
        ),
    ],
)
def test_wandit_s_keys_reach_its_policy(files: Any, keys: dict[str, Any], expected: Any) -> None:
    files.model["predictor"].update(keys)
    files.write()
    policy = sharding_policy(load_training_job(files.flags()).components["predictor"])
    assert policy is not None
    assert expected == (
        policy.recompute,
        policy.recompute_granularity,
        policy.recompute_num_layers,
        policy.offload_activations,
    )
    assert policy.units == ("blocks.{*}",)
