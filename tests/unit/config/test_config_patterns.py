"""The syntax of module patterns, checked without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config.patterns import pattern_problem
from mm_core.sharding.patterns import PatternError, expand, split_pattern


@pytest.mark.parametrize(
    "pattern",
    ["predictor", "predictor.blocks.{*}", "predictor.blocks.{0-20, 25,30-40}.ffn", " ae.layer_{0-3} ",
     "predictor.{text,vision}.layers.{*}"],
)  # fmt: skip
def test_well_formed(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("predictor.blocks.{*", "a { is not closed"),
        ("predictor.blocks.*}", "each { needs one }"),
        ("predictor.{a{b}}", "they do not nest"),
        ("predictor..blocks", "an empty name"),
        ("predictor.", "an empty name"),
        (" ", "an empty name"),
        ("predictor.blocks.{20-0}", "the range 20-0 runs backwards; write {0-20}"),
        ("predictor.blocks.{0-9999999}", "absurdly long"),
        ("predictor.blocks.{1,,2}", "an empty item in braces"),
        ("predictor.blocks.{}", "an empty item in braces"),
        ("predictor.blocks.{-3}", '"-3" in braces'),
        ("{*}.blocks", "it begins with braces"),
    ],
)
def test_malformed(pattern: str, problem: str) -> None:
    assert problem in (pattern_problem(pattern) or "")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab0123{}*?,.- ", max_size=14).map("predictor.".__add__))
def test_it_refuses_what_the_resolver_refuses(pattern: str) -> None:
    try:
        for component in split_pattern(pattern):
            expand(component)
        refused = False
    except PatternError:
        refused = True
    assert (pattern_problem(pattern) is not None) == refused
