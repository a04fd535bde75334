"""The pattern grammar: what matches, and what each mistake says."""

import contextlib
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.config.patterns import pattern_problem
from mm_core.sharding.patterns import ModulePaths, PatternError, apply_aliases, expand, split_pattern

PATHS = ModulePaths(
    [
        "",
        "patch_embedding",
        "blocks",
        *(f"blocks.{i}{part}" for i in range(12) for part in ("", ".attn1", ".attn2", ".ffn")),
        "towers",
        *(
            f"towers.{name}{part}"
            for name in ("text", "vision")
            for part in ("", ".layers", ".layers.0", ".layers.1")
        ),
        "layer_0",
        "layer_1",
        "proj_out",
    ]
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("proj_out", ["proj_out"]),
        ("blocks.{*}", [f"blocks.{i}" for i in range(12)]),
        ("blocks.{0-2,5, 10-11}", [f"blocks.{i}" for i in (0, 1, 2, 5, 10, 11)]),
        ("blocks.{3, 1,2-3}", [f"blocks.{i}" for i in (1, 2, 3)]),
        ("blocks.{ 4 - 5 }.attn1", ["blocks.4.attn1", "blocks.5.attn1"]),
        ("blocks.{0-1}.{attn1,ffn}", ["blocks.0.attn1", "blocks.0.ffn", "blocks.1.attn1", "blocks.1.ffn"]),
        (
            "towers.{vision,text}.layers.{*}",
            [f"towers.{t}.layers.{i}" for t in ("vision", "text") for i in (0, 1)],
        ),
        ("towers.{*}", ["towers.text", "towers.vision"]),
        ("layer_{0-1}", ["layer_0", "layer_1"]),
        ("layer_{*}", ["layer_0", "layer_1"]),
        ("blocks.0.attn{1-2}", ["blocks.0.attn1", "blocks.0.attn2"]),
    ],
)
def test_matches(pattern, expected):
    assert PATHS.match(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.{9-3}", "the range 9-3 runs backwards; write {3-9}"),
        ("blocks.{0–3}", "0–3 is no range; write {0-3}"),
        ("blocks.{0:3}", "0:3 is no range; write {0-3}"),
        ("blocks.{0..3}", "0..3 is no range; write {0-3}"),
        ("blocks.{0-}", "the range 0- lacks an end"),
        ("blocks.\x01", "an invisible character, U+0001"),
        ("blo\u200bcks.{*}", "an invisible character, U+200B"),
        ("blocks.{٠-٣}", 'has no "٠-٣"'),
        ("blocks.{0-12}", 'matches no module: "blocks" has no "12", only 0-11'),
        ("blocks.{*", "a { is not closed"),
        ("blocks.*}", "unbalanced braces"),
        ("blocks.{{*}}", "they do not nest"),
        ("blocks.{}", "an empty item in braces"),
        ("blocks.{1,,2}", "an empty item in braces"),
        ("blocks.{-1}", '"-1" in braces is neither'),
        ("blocks.{1.5}", '"1.5" in braces is neither'),
        ("blocks.[0-3]", "numbers stand in braces"),
        ("blocks.**.attn1", "** is not understood"),
        ("blocks..0", "empty name"),
        (".blocks", "empty name"),
        ("", "empty name"),
        ("proj_out.{*}", '"proj_out" has no submodules'),
        ("block.{*}", "Closest: blocks"),
        ("blocks.{*}.atn1", "Closest: blocks.0.attn1"),
        ("proj_ou", "Closest: proj_out"),
        ("towers.{text,visoin}", "Closest: towers.vision"),
        ("{0-99999999999}", "absurdly long"),
    ],
)
def test_mistakes_say_where_and_how_to_mend(pattern, message):
    with pytest.raises(PatternError) as caught:
        PATHS.match(pattern, where="recompute_modules")
    assert message in str(caught.value)
    assert "recompute_modules" in str(caught.value)


def test_messages_carry_the_prefix_that_users_write():
    with pytest.raises(PatternError) as caught:
        PATHS.match("blcks.{*}", where="sub_modules_to_wrap", prefix="predictor")
    text = str(caught.value)
    assert '"predictor.blcks.{*}" matches no module: "predictor" has no "blcks"' in text
    assert "Closest: predictor.blocks" in text


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", "proj_out"),
        ("blocks.{0-3}.self_attn", "blocks.{0-3}.attn1"),
        ("blocks.{*}.self_attn.q", "blocks.{*}.attn1.to_q"),
        ("blocks.7.self_attn.k", "blocks.7.attn1.k"),
        ("header", "header"),
        ("patch_embedding", "patch_embedding"),
    ],
)
def test_aliases(pattern, expected):
    aliases = {
        "head": "proj_out",
        "blocks.{*}.self_attn": "blocks.{*}.attn1",
        "blocks.{*}.self_attn.q": "blocks.{*}.attn1.to_q",
        "patch_embedding": "proj_out",  # a real module is never hidden by an alias
    }
    assert apply_aliases(pattern, aliases, PATHS) == expected


@given(st.sets(st.integers(0, 300), min_size=1, max_size=20))
def test_numbers_come_out_sorted_and_once(numbers):
    text = ",".join(f"{n}-{n}" if n % 3 == 0 else str(n) for n in [*numbers, *numbers])
    assert expand("{" + text + "}") == [str(n) for n in sorted(numbers)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.attn1", [f"blocks.{i}.attn1" for i in range(12)]),
        ("blocks.{0-1}.attn*", ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]),
        ("blocks.?.ffn", [f"blocks.{i}.ffn" for i in range(10)]),
        ("blocks.1?.f*", ["blocks.10.ffn", "blocks.11.ffn"]),
        ("layer_*", ["layer_0", "layer_1"]),
        ("layer_?", ["layer_0", "layer_1"]),
        ("proj_out*", ["proj_out"]),
        ("towers.*.layers.*", [f"towers.{t}.layers.{i}" for t in ("text", "vision") for i in (0, 1)]),
    ],
)
def test_globs_that_can_be_read_in_one_way(pattern, expected):
    assert PATHS.match(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "within", "across", "better"),
    [
        ("blocks.*", "p.blocks.0, p.blocks.1, …", "p.blocks.0.attn1, p.blocks.0.attn2, …", "p.blocks.{*}"),
        ("*", "p.patch_embedding, p.blocks, …", "p.blocks.0, p.blocks.0.attn1, …", "p.{*}"),
        ("towers.*.{0-1}", "", "", ""),
        ("tow*", "p.towers", "p.towers.text, p.towers.text.layers, …", "p.tow{*}"),
    ],
)
def test_globs_that_can_be_read_in_two_ways_are_refused(pattern, within, across, better):
    with pytest.raises(PatternError) as caught:
        PATHS.match(pattern, where="recompute_modules", prefix="p")
    text = str(caught.value)
    if not within:  # read within one name it matches nothing
        assert 'has no "0", only layers' in text
        return
    assert f"within one name it means {within}, and across dots {across} as well. Write {better}" in text
    assert PATHS.match(better.removeprefix("p."))


CLASSES = ModulePaths(
    ["", "blocks", "blocks.0", "blocks.1", "head", "tail", "Lone"],
    {
        "": "model.Net",
        "blocks": "torch.nn.ModuleList",
        "blocks.0": "model.wan.Block",
        "blocks.1": "model.wan.Block",
        "head": "model.wan.Head",
        "tail": "other.Head",
        "Lone": "other.Tail",
    },
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.wan.Block", ["blocks.0", "blocks.1"]),
        ("Block", ["blocks.0", "blocks.1"]),
        ("other.Head", ["tail"]),
        ("model.wan.Head", ["head"]),
        ("Lone", ["Lone"]),
        ("Tail", ["Lone"]),
    ],
)
def test_the_name_of_a_class_stands_for_its_modules(pattern, expected):
    assert CLASSES.match(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("Head", "2 classes of this model have that name. Write one of model.wan.Head, other.Head."),
        ("Blok", "Closest: model.wan.Block"),
        ("wan.Block", "matches no module"),
        ("Bloc?", "matches no module"),
    ],
)
def test_names_of_classes_that_mean_nothing_or_too_much(pattern, message):
    with pytest.raises(PatternError, match=r"^recompute_modules: ") as caught:
        CLASSES.match(pattern, where="recompute_modules")
    assert message in str(caught.value)


def test_a_name_that_is_a_module_and_a_class_of_others_is_refused():
    paths = ModulePaths(["", "Block", "x"], {"Block": "m.Other", "x": "m.Block"})
    with pytest.raises(PatternError, match=r"ambiguous.*Write the class in full: m\.Block"):
        paths.match("Block")
    assert paths.match("m.Block") == ["x"]


@given(st.text(alphabet="ab.{}*-,01? B[", max_size=12))
def test_any_text_matches_modules_or_is_a_pattern_error(text):
    with contextlib.suppress(PatternError):
        found = PATHS.match(text)
        assert found
        assert all(path in PATHS for path in found)
        assert len(split_pattern(text)) == found[0].count(".") + 1


@given(st.text(alphabet="abX.{}*-,019? [", max_size=14))
def test_the_check_of_the_syntax_and_the_search_agree(text):
    """What the check of a file passes, the search takes for a pattern, which may match nothing; and the other way,
    except that a file's patterns begin with a name.
    """
    problem = pattern_problem(text)
    try:
        PATHS.match(text, where="here")
    except PatternError as error:
        malformed = not any(why in error.problem for why in ("matches no module", "is ambiguous"))
    else:
        malformed = False
    begins = problem is not None and problem.startswith("it begins with")
    assert malformed == (problem is not None and not begins)
    if malformed:
        assert problem is not None
        with pytest.raises(PatternError, match=re.escape(f"here: {problem}.")):
            split_pattern(text, "here")


def test_a_pattern_that_stands_for_absurdly_many_names_is_refused_at_once():
    assert "absurdly many" in str(pattern_problem("a{0-9999}{0-9999}{0-9999}"))


def test_policy_and_patterns_import_no_torch():
    code = "import sys, mm_core.sharding.policy, mm_core.sharding.patterns; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
