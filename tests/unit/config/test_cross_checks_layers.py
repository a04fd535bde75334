"""Layers and heads against what they are divided by; samples against ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_core.config import TrainFlags, cross_checks
from mm_core.config.component import ComponentConfig
from mm_core.config.cross_checks.layers import check_schedule
from mm_core.config.document import Document, read_document
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.config.tools import ToolsConfig
from mm_registry.spec import EntrySpec

SPEC = EntrySpec("dit", "mm_core.predictor_models", "x:X", "x", "1", "")
MODEL = """\
{{
  "predictor": {{
    "num_layers": 40,
    "pipeline_num_layers": {layers}
  }}
}}
"""


def predictor(**fields: Any) -> dict[str, ComponentConfig]:
    return {"predictor": ComponentConfig("predictor", "dit", SPEC, fields=fields, path=("predictor",))}


def model(tmp_path: Path, layers: str) -> Document:
    (tmp_path / "model.json").write_text(MODEL.format(layers=layers))
    return read_document(tmp_path / "model.json")


def flags(**values: Any) -> TrainFlags:
    """Flags that the command line does not let through yet: model parallelism is refused there."""
    return TrainFlags.model_construct(_fields_set=set(values), **values)


def layers(tmp_path: Path, text: str, **values: Any) -> list[str]:
    document = model(tmp_path, text)
    found = cross_checks.check_layers(predictor(num_layers=40), document, flags(**values))
    return [str(finding).removeprefix(f"{tmp_path}/") for finding in found]


@pytest.mark.parametrize("text", ["[10, 10, 10, 10]", "[40]", "[13, 27]", "[[20], [20]]", "null", '"ten"'])
def test_a_list_that_adds_up_needs_no_stages(tmp_path: Path, text: str) -> None:
    assert layers(tmp_path, text) == []


ALONE = [
    ("[10, 10, 10]", "model.json:4:28 warning: pipeline_num_layers adds up to 30, but num_layers is 40; it does nothing "
     "with one pipeline stage. Write entries that add up to 40"),
    ("[[20, 10], [20]]", "model.json:4:28 warning: pipeline_num_layers adds up to 50, but num_layers is 40; it does "
     "nothing with one pipeline stage. Write entries that add up to 40"),
    ("[20, 20, 0]", "model.json:4:37 warning: pipeline_num_layers has the entry 0, but every stage needs a layer; it does "
     "nothing with one pipeline stage"),
    ("[[20, 20], [-1]]", "model.json:4:40 warning: pipeline_num_layers has the entry -1, but every stage needs a layer; it "
     "does nothing with one pipeline stage"),
    ("[20, [20]]", "model.json:4:28 warning: pipeline_num_layers is [20, [20]]: numbers and lists are mixed; it does "
     "nothing with one pipeline stage. Write one number for each stage, or one list of those for each virtual stage"),
    ("[true, 39]", "model.json:4:29 warning: pipeline_num_layers has the entry true, but every stage needs a layer; it "
     "does nothing with one pipeline stage"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ALONE)
def test_a_mistake_is_a_warning_with_one_stage(tmp_path: Path, text: str, expected: str) -> None:
    assert layers(tmp_path, text) == [expected]


STAGES = [
    ("[10, 10, 10, 10]", 4, 1, []),
    ("[[5, 5, 5, 5], [5, 5, 5, 5]]", 4, 2, []),
    ("[10, 10, 10]", 4, 1, [
        "model.json:4:28 error: pipeline_num_layers adds up to 30, but num_layers is 40. Write entries that add up to 40",
        "model.json:4:28 error: pipeline_num_layers has 3 entries ([10, 10, 10]), but --pipeline-model-parallel-size is "
        "4. Write one number for each stage"]),
    ("[40]", 2, 1, [
        "model.json:4:28 error: pipeline_num_layers has 1 entry ([40]), but --pipeline-model-parallel-size is 2. Write "
        "one number for each stage"]),
    ("[10, 10, 10, 10]", 4, 2, [
        "model.json:4:28 error: pipeline_num_layers is one list, but --virtual-pipeline-model-parallel-size 2 needs 2 "
        "of them"]),
    ("[[20, 20]]", 2, 2, [
        "model.json:4:28 error: pipeline_num_layers has 1 list, but --virtual-pipeline-model-parallel-size is 2"]),
    ("[[10, 10], [20]]", 2, 2, [
        "model.json:4:39 error: pipeline_num_layers has 1 entry ([20]), but --pipeline-model-parallel-size is 2. Write "
        "one number for each stage"]),
    ("[40, 0]", 2, 1, [
        "model.json:4:33 error: pipeline_num_layers has the entry 0, but every stage needs a layer"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "stages", "virtual", "expected"), STAGES)
def test_several_stages_need_an_entry_each(
    tmp_path: Path, text: str, stages: int, virtual: int, expected: list[str]
) -> None:
    found = layers(
        tmp_path, text, pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual
    )
    assert found == expected


def test_without_a_checked_section_nothing_is_added_up(tmp_path: Path) -> None:
    assert list(cross_checks.check_layers({}, model(tmp_path, "[1, 2]"))) == []


RING = "or use --context-parallel-algo megatron_cp_algo, a ring that deals out no heads"
HEADS = [
    (2, 2, None, []),
    (3, 1, None, ["--tensor-model-parallel-size error: 3 ranks cannot share the 40 heads of predictor (dit) equally. "
                  "Their number must divide 40: 1, 2, 4, 5"]),
    (2, 8, "ulysses_cp_algo",
     ["--context-parallel-size error: --tensor-model-parallel-size 2 × 8 = 16 ranks cannot share the 40 heads of "
      f"predictor (dit) equally. Their number must divide 40: 1, 2, 4, 5, 8, 10, 20; {RING}"]),
    (1, 3, None, ["--context-parallel-size error: 3 ranks cannot share the 40 heads of predictor (dit) equally. Their "
                  f"number must divide 40: 1, 2, 4, 5; {RING}"]),
    (1, 3, "megatron_cp_algo", []),
]  # fmt: skip


@pytest.mark.parametrize(("tensor", "context", "algorithm", "expected"), HEADS)
def test_heads_are_dealt_to_ranks(
    tmp_path: Path, tensor: int, context: int, algorithm: str | None, expected: list[str]
) -> None:
    values = flags(
        tensor_model_parallel_size=tensor, context_parallel_size=context, context_parallel_algo=algorithm
    )
    found = cross_checks.check_layers(predictor(num_heads=40, num_layers=40), model(tmp_path, "[40]"), values)
    assert [str(finding) for finding in found] == expected


def ranks(count: int, **values: Any) -> list[str]:
    values = {"micro_batch_size": 1, "mm_tool": None, **values}
    document = Document.from_data({})
    found = cross_checks.check_ranks(flags(**values), Fsdp2Config(), document, ToolsConfig(), count)
    return [str(finding) for finding in found]


def test_samples_are_dealt_to_data_parallel_ranks() -> None:
    assert ranks(8, tensor_model_parallel_size=2, context_parallel_size=2, global_batch_size=2) == []
    assert ranks(8, tensor_model_parallel_size=2, global_batch_size=6) == [
        "--global-batch-size error: 6 is no multiple of --micro-batch-size 1 × 4 data-parallel groups of ranks = 4. "
        "Use 4 or 8"
    ]


def test_model_parallel_ranks_divide_the_ranks() -> None:
    assert ranks(6, tensor_model_parallel_size=4, global_batch_size=6) == [
        "--tensor-model-parallel-size error: 4 ranks work on the same samples, which does not divide the 6 ranks of the "
        "job. Use a multiple of 4 ranks"
    ]
    assert ranks(6, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, global_batch_size=6) == [
        "--tensor-model-parallel-size error: 2 × --pipeline-model-parallel-size 2 = 4 ranks work on the same samples, "
        "which does not divide the 6 ranks of the job. Use a multiple of 4 ranks"
    ]


def test_without_a_list_each_stage_still_needs_a_layer(tmp_path: Path) -> None:
    assert layers(tmp_path, "null", pipeline_model_parallel_size=8) == []
    assert layers(tmp_path, "null", pipeline_model_parallel_size=41) == [
        "--pipeline-model-parallel-size error: 41 stages cannot be made of the 40 layers of predictor (dit). Use 40 stages "
        "at most"
    ]


def schedule(micro_batches: int, **sizes: int) -> list[str]:
    made = ParallelSizes(**sizes)  # type: ignore[arg-type]
    given = flags(pipeline_model_parallel_size=made.pp, virtual_pipeline_model_parallel_size=made.vpp)
    return [f"{finding.level} {finding}" for finding in check_schedule(given, made, micro_batches)]


def test_micro_batches_must_fit_interleaved_stages_and_should_keep_stages_busy() -> None:
    assert schedule(1, pp=1) == schedule(2, pp=2) == schedule(4, pp=2, vpp=2) == []
    assert schedule(2, pp=4) == [
        "warning --pipeline-model-parallel-size warning: 2 micro batches a step cannot keep 4 pipeline stages busy: each "
        "waits 60% of the time. Raise --global-batch-size, or lower --micro-batch-size"
    ]
    assert schedule(5, pp=2, vpp=2) == [
        "error --virtual-pipeline-model-parallel-size error: interleaved stages take micro batches in equal rounds of about "
        "2, one for each pipeline stage, which 5 micro batches a step do not make. Choose --global-batch-size so that there "
        "are 4 or 6"
    ]
