"""How ranks are dealt to kinds of parallelism, without torch."""

import pytest

from mm_core.config.document import Document
from mm_core.config.findings import ConfigError
from mm_core.config.flag_parsing import parse_train_flags
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes, Place, with_expert_flag
from mm_registry.errors import UserError

BASE = ("--lr", "1e-4", "--train-iters", "1")


def flags(*words: str):
    return parse_train_flags([*BASE, *words])


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        flags(*words)
    return str(caught.value)


def test_ranks_count_as_in_megatron():
    sizes = ParallelSizes(pp=2, cp=2, tp=2)
    places = [sizes.place(rank, 16) for rank in range(16)]
    assert places[0] == Place(0, 0, 0, 0)
    assert places[1] == Place(0, 0, 0, 1)
    assert places[2] == Place(0, 0, 1, 0)
    assert places[4] == Place(0, 1, 0, 0)
    assert places[8] == Place(1, 0, 0, 0)
    assert len(set(places)) == 16
    assert (sizes.together, sizes.data_parallel(16), sizes.sharing(16)) == (8, 2, 4)


def test_sizes_that_do_not_divide_are_all_named():
    with pytest.raises(UserError) as caught:
        ParallelSizes(pp=2, cp=2).data_parallel(6)
    assert str(caught.value) == (
        "6 ranks cannot be dealt to groups of pipeline 2 × context 2 × tensor 1 = 4 that work on the same samples; use a "
        "multiple of 4 ranks."
    )


def test_sizes_of_flags_and_files():
    given = flags(
        "--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2", "--context-parallel-size", "4",
        "--context-parallel-algo", "megatron_cp_algo", "--tensor-model-parallel-size", "8",
    )  # fmt: skip
    sizes = ParallelSizes.of(given, Fsdp2Config(expert_parallel_size=2), [[1, 2], [3, 4]])
    assert sizes == ParallelSizes(2, 4, 8, 2, 2, "ring", ((1, 2), (3, 4)))
    assert str(sizes) == "pipeline 2 (2 parts each) × context 4 (ring) × tensor 8 × experts 2"
    assert ParallelSizes.of(flags(), None, [1, 2]) == ParallelSizes()  # without stages the list does nothing
    assert ParallelSizes.of(flags("--pipeline-model-parallel-size", "2"), None, [1, 2]).layers == ((1, 2),)


def test_rings_of_ulysses_groups_are_refused_by_name_where_they_would_be_used():
    flags("--context-parallel-algo", "hybrid_cp_algo")  # scripts give it with one rank too
    text = str(flags("--context-parallel-algo", "hybrid_cp_algo", "--context-parallel-size", "4").findings[0])
    assert text == (
        '--context-parallel-algo warning: "hybrid_cp_algo": rings of Ulysses groups are not available yet; this version '
        'cannot run it. Available: "ulysses_cp_algo", "megatron_cp_algo"'
    )


def test_an_algorithm_has_no_effect_for_one_rank_alone():
    assert "has no effect" in str(flags("--context-parallel-algo", "ulysses_cp_algo").findings[0])
    both = flags("--context-parallel-algo", "ulysses_cp_algo", "--context-parallel-size", "2")
    assert both.findings == ()


def test_parts_of_stages_need_stages():
    assert error_of("--virtual-pipeline-model-parallel-size", "2").endswith(
        "2 parts of each pipeline stage need --pipeline-model-parallel-size of 2 or more"
    )


EXPERTS = "--expert-model-parallel-size"


@pytest.mark.parametrize(
    ("written", "given", "size"),
    [
        ({}, "4", 4),
        ({"expert_parallel_size": None}, "4", 4),
        ({"expert_parallel_size": 4}, "4", 4),
        ({}, "1", None),
    ],
)
def test_a_flag_fills_what_the_sharding_file_leaves_open(written, given, size):
    document, findings = with_expert_flag(Document.from_data(written), flags(EXPERTS, given))
    assert findings == []
    assert document.data.get("expert_parallel_size") == size


def test_two_numbers_of_expert_parallel_ranks_are_an_error():
    _, (finding,) = with_expert_flag(Document.from_data({"expert_parallel_size": 2}), flags(EXPERTS, "4"))
    assert finding.level == "error"
    assert finding.message == "expert_parallel_size is 2, but --expert-model-parallel-size is 4"
