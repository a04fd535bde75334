"""Environment variables: the table, their check, and that the core reads them in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_core.config.environment import (
    VARIABLES,
    check_environment,
    launched,
    read,
    set_variables,
    whole_number,
)
from mm_registry.errors import UserError

CORE = Path(__file__).resolve().parents[3] / "mm_core"

#: What MindSpeed-MM documents, what its scripts set, and what its code reads without a word.
MINDSPEED_MM = """
ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL TASK_QUEUE_ENABLE COMBINED_ENABLE CPU_AFFINITY_CONF HCCL_CONNECT_TIMEOUT
PYTORCH_NPU_ALLOC_CONF HCCL_EXEC_TIMEOUT ACLNN_CACHE_LIMIT TOKENIZERS_PARALLELISM MULTI_STREAM_MEMORY_REUSE NPU_ASD_ENABLE
ASCEND_LAUNCH_BLOCKING NPUS_PER_NODE
CUDA_DEVICE_MAX_CONNECTIONS NON_MEGATRON OMP_NUM_THREADS HCCL_WHITELIST_DISABLE HCCL_BUFFSIZE HCCL_DETERMINISTIC MS_NODE_TIMEOUT
ENABLE_GC_THRESHOLD OOTB_OPTIMIZER_PARSE_ARGS OOTB_OPTIMIZER_PARSE_MODEL OOTB_OPTIMIZER_PROFILING MM_FORCE_EP_BALANCE
HF_SAVE_WAIT_MODE TRITON_F32_DEFAULT IMAGE_PLACEHOLDER VIDEO_PLACEHOLDER AUDIO_PLACEHOLDER CLOSE_MATMUL_K_SHIFT
AE_SPATIAL_COMPRESSION PROFILE_TYPE PROFILE_START_STEP USE_TF LOCAL_RANK RANK WORLD_SIZE
"""
#: What its Wan2.2 and Qwen3-VL scripts export.
SCRIPT = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "TASK_QUEUE_ENABLE": "2",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "2",
    "ACLNN_CACHE_LIMIT": "100000",
    "TOKENIZERS_PARALLELISM": "false",
    "MULTI_STREAM_MEMORY_REUSE": "2",
    "NON_MEGATRON": "true",
    "NPUS_PER_NODE": "16",
}


def test_the_table_has_all_variables_of_mindspeed_mm_and_says_what_each_is_for() -> None:
    names = [variable.name for variable in VARIABLES]
    assert len(names) == len(set(names))
    assert set(MINDSPEED_MM.split()) - set(names) == set()
    for variable in VARIABLES:
        assert variable.meaning, variable.name
        assert not variable.meaning.endswith("."), variable.name
        if variable.default.isdigit():
            assert variable.problem(variable.default) == "", variable.name


def test_the_variables_of_a_classic_script_are_right() -> None:
    found = {(finding.path, finding.level) for finding in check_environment(SCRIPT)}
    assert found == {
        ("MULTI_STREAM_MEMORY_REUSE", "note"),
        ("NON_MEGATRON", "note"),
        ("NPUS_PER_NODE", "note"),
    }


GOLDEN = [
    ("HCCL_CONNECT_TIMEOUT", "10", 'warning: "10" is out of range: it must be from 120 to 7200. …120'),
    ("HCCL_CONNECT_TIMEOUT", "7201", 'warning: "7201" is out of range: it must be from 120 to 7200. …120'),
    ("HCCL_EXEC_TIMEOUT", "67", 'warning: "67" is out of range: it must be from 68 to 17340. …1800'),
    ("ACLNN_CACHE_LIMIT", "many", 'warning: "many" is no whole number, and must be from 1 to 10000000. …10000'),
    ("TASK_QUEUE_ENABLE", "3", 'warning: "3" is out of range: it must be from 0 to 2. …1'),
    ("COMBINED_ENABLE", "yes", 'warning: "yes" must be 0 or 1. …0'),
    ("CPU_AFFINITY_CONF", "3", 'warning: "3" must be 0, 1 or 2, then cores if wanted. …0'),
    ("PYTORCH_NPU_ALLOC_CONF", "expandable", 'warning: "expandable" must be settings such as expandable_segments:True'),
    ("OMP_NUM_THREADS", "0", 'warning: "0" must be a whole number from 1. …cores / ranks'),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "warning: with 1, FSDP2's communication waits behind the computation instead of running "
     "beside it. Set it to 2 or more, or unset it"),
    ("MM_DEVICE", "tpu", 'error: "tpu" must be cpu, cuda or npu'),
    ("WORLD_SIZE", "two", 'error: "two" is no whole number, and must be at least 1'),
    ("MASTER_PORT", "70000", 'error: "70000" is out of range: it must be from 0 to 65535'),
    ("MM_DEVICES", "cpu", "warning: nothing reads this variable. Did you mean MM_DEVICE?"),
    ("ENABLE_GC_THRESHOLD", "100", "note: has no effect here: MindSpeed-MM's garbage collection; Python's own stands"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"), GOLDEN, ids=[f"{name}={value}" for name, value, _ in GOLDEN]
)
def test_golden_messages(name: str, value: str, message: str) -> None:
    assert [str(finding) for finding in check_environment({name: value})] == [
        f"{name} {message.replace('…', 'Unset it for the default, ')}"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("HCCL_CONNECT_TIMEOUT", "120"), ("HCCL_CONNECT_TIMEOUT", "7200"), ("CPU_AFFINITY_CONF", "1,npu0:0-3"),
     ("OMP_NUM_THREADS", "4,2"), ("MM_DEVICE", "cpu"), ("CUDA_DEVICE_MAX_CONNECTIONS", "2"), ("MM_ARGS", "--mm-data x"),
     ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64"), ("RANK", "0"), ("MM_DEVICE", "")],
)  # fmt: skip
def test_right_values_are_not_spoken_of(name: str, value: str) -> None:
    assert check_environment({name: value}) == []


def test_reading() -> None:
    assert read("RANK", {}) is None
    assert read("RANK", {"RANK": "3"}) == "3"
    assert whole_number("RANK", 5, {}) == 5
    assert whole_number("RANK", 5, {"RANK": "3"}) == 3
    with pytest.raises(UserError, match='The environment variable RANK is "x", not a whole number'):
        whole_number("RANK", 0, {"RANK": "x"})
    assert launched({"RANK": "0", "WORLD_SIZE": "1"})
    assert not launched({"RANK": "0"})
    with pytest.raises(AssertionError, match="is missing in the table"):
        read("MM_UNKNOWN", {})


def test_secrets_are_hidden() -> None:
    environ = {"HF_TOKEN": "hf_abcdef", "HF_ENDPOINT": "https://me:pw@hub.example"}
    shown = {variable.name: variable.shown(value) for variable, value in set_variables(environ)}
    assert shown == {"HF_TOKEN": "***", "HF_ENDPOINT": "https://***@hub.example"}


_WRITES = {"update", "setdefault", "pop"}


def _reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read the environment; writing, and handing it whole to a child, is none."""
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            allowed.add(node.value)
        if isinstance(node, ast.Attribute) and node.attr in _WRITES:
            allowed.add(node.value)
        if isinstance(node, ast.Dict):  # {**os.environ, …}
            allowed |= {value for key, value in zip(node.keys, node.values, strict=True) if key is None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and node not in allowed:
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in ("environ", "environb", "getenv", "getenvb") and _is_of_os(node):
                yield node.lineno


def _is_of_os(node: ast.Attribute | ast.Name) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"


def test_the_core_reads_the_environment_in_one_place() -> None:
    found = []
    for path in sorted(CORE.rglob("*.py")):
        name = path.relative_to(CORE).as_posix()
        if name == "config/environment.py" or name.startswith("testing/"):
            continue
        text = path.read_text(encoding="utf-8")
        assert "from os import" not in text, name
        found += [f"{name}:{line}" for line in _reads(ast.parse(text))]
    assert found == [], "read variables by mm_core.config.environment, and add them to its table"


def test_that_search_finds_what_it_looks_for() -> None:
    lines = [
        "import os",
        'os.environ["A"] = "1"',
        'os.environ["A"]',
        'os.environ.get("A")',
        'os.getenv("A")',
        "x = {**os.environ}",
        '"A" in os.environ',
        'os.environ.update(A="1")',
        'del os.environ["A"]',
    ]
    assert sorted(_reads(ast.parse("\n".join(lines)))) == [3, 4, 5, 7]
