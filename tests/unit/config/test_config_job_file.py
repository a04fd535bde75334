"""Job files: MindSpeed-MM's combined YAML and job.yaml, read into flags and sections with their places."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_core.config import (
    ConfigError,
    MMConfig,
    check_file,
    check_training_job,
    get_args,
    load_training_job,
    parse_train_flags,
)
from mm_core.config.args import clear_args, set_args
from mm_core.config.explain import explain_files, explain_flags, matching
from mm_core.config.job_file import read_job_file

FLAGS: dict[str, Any] = {"lr": 1e-4, "train_iters": 10, "load": "weights/transformer"}


def job(files: Any, folder: str = "", **top: Any) -> str:
    """Write the job of `files` as one job.yaml in a folder; `top` replaces keys of the top level, None leaves one out."""
    content: dict[str, Any] = {
        "gpt_args": FLAGS,
        "model": files.model,
        "data": files.data,
        "tools": files.tools,
        "fsdp2": yaml.safe_load(files.fsdp2),
    } | top
    text = yaml.safe_dump(
        {key: value for key, value in content.items() if value is not None}, sort_keys=False
    )
    (files.folder / folder).mkdir(exist_ok=True)
    (files.folder / folder / "job.yaml").write_text(text, encoding="utf-8")
    return f"{folder}/job.yaml" if folder else "job.yaml"


def place(files: Any, snippet: str) -> str:
    """Return `job.yaml:line:column` of the `^` in a text that stands in job.yaml once."""
    text = (files.folder / "job.yaml").read_text()
    plain = snippet.replace("^", "")
    assert text.count(plain) == 1, plain
    before = text[: text.index(plain) + snippet.index("^")]
    return f"job.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def errors(path: str, *words: str) -> list[str]:
    """Return what `mm check FILE`, or the job of a command line, has to say, notes left out."""
    if not words:
        return [str(finding) for finding in check_file(path) if finding.level != "note"]
    try:
        found = check_training_job(parse_train_flags([path, *words]))
    except ConfigError as error:
        found = error.findings
    return [str(finding) for finding in found if finding.level != "note"]


def test_a_whole_job_in_one_file(files: Any) -> None:
    flags = parse_train_flags([job(files)])
    assert flags.job_file == "job.yaml"
    assert sorted(flags.sections) == ["data", "fsdp2", "model", "tools"]
    assert flags.sections["model"].value(("predictor", "num_layers")) == 40
    assert str(flags.sections["model"].origin(("predictor", "num_layers"))) == place(files, "num_layers: ^40")
    assert (flags.lr, flags.train_iters, flags.load) == (1e-4, 10, "weights/transformer")
    assert str(flags.origin("lr")) == place(files, "lr: ^0.0001")
    assert str(flags.origin("seed")) == "default"
    assert errors("job.yaml") == []
    assert [str(f) for f in check_training_job(flags) if f.level == "error"] == []
    loaded = load_training_job(flags)
    assert loaded.model.predictor["num_layers"] == 40
    assert loaded.fsdp2.sharding_size == "auto"
    origins = loaded.resolved()["origins"]
    assert origins["model.predictor.num_layers"] == place(files, "num_layers: ^40")
    assert origins["flags.train_iters"] == place(files, "train_iters: ^10")
    assert origins["model.predictor.freq_dim"] == "default"


def test_the_same_job_as_files_has_the_same_values(files: Any) -> None:
    inside = load_training_job(parse_train_flags([job(files)])).resolved()["values"]
    apart = load_training_job(files.flags()).resolved()["values"]
    for name in ("mm_model", "mm_data", "mm_tool", "fsdp2_config_path"):
        assert inside["flags"].pop(name) is None
        assert apart["flags"].pop(name).startswith(("model", "data", "tools", "fsdp2"))
    assert inside == apart


def test_sections_may_be_paths(files: Any) -> None:
    path = job(files, model="model.json", data=None, tools="tools.json", fsdp2="fsdp2.yaml")
    flags = parse_train_flags([path, "--mm-data", "data.json"])
    assert (flags.mm_model, flags.mm_tool, flags.fsdp2_config_path) == (
        "model.json",
        "tools.json",
        "fsdp2.yaml",
    )
    assert str(flags.origin("mm_model")) == place(files, "model: ^model.json")
    assert dict(flags.sections) == {}
    assert [str(f) for f in check_training_job(flags) if f.level == "error"] == []
    assert errors(path) == []


def test_flags_of_the_command_line_win(files: Any) -> None:
    flags = parse_train_flags(["--seed", "3", job(files), "--lr", "2e-4"])
    assert (flags.lr, flags.seed, flags.train_iters) == (2e-4, 3, 10)
    assert str(flags.origin("lr")) == "--lr"
    assert flags.findings == ()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("weight_decay", '"weight_decay" is false, expected a number'),
        ("seed", '"seed" is false, expected a whole number'),
        ("lr_decay_style", '"lr_decay_style" is false, expected'),
    ],
)
def test_false_is_no_number_and_means_no_default(files: Any, name: str, told: str) -> None:
    """A run with the default would be another one than the 0 that somebody may have meant."""
    path = job(files, gpt_args={**FLAGS, name: False})
    (error,) = errors(path, "--nproc-per-node", "1")
    assert error.startswith(f"{place(files, f'{name}: ^false')} error: {told}")
    (error,) = errors(job(files), f"gpt_args.{name}=false")
    assert f"command line: gpt_args.{name}=false error: " in error
    assert "false, expected" in error


def test_false_leaves_out_what_has_no_default(files: Any) -> None:
    flags = parse_train_flags([job(files, gpt_args={**FLAGS, "save": False, "bf16": False})])
    assert (flags.save, flags.bf16) == (None, False)
    assert not {"save", "bf16"} & flags.model_fields_set


def test_bf16_is_where_a_null_of_the_sharding_section_comes_from(files: Any) -> None:
    path = job(files, gpt_args={**FLAGS, "bf16": True}, fsdp2={"param_dtype": None, "reduce_dtype": None})
    resolved = load_training_job(parse_train_flags([path])).resolved()
    for name, value in (("param_dtype", "bf16"), ("reduce_dtype", "fp32")):
        assert resolved["values"]["fsdp2"][name] == value
        assert resolved["origins"][f"fsdp2.{name}"] == place(files, "bf16: ^true")


def test_a_flag_that_holds_an_object_is_no_group(files: Any) -> None:
    job(files, gpt_args={"seed": {}, "training": {"lr": {"value": 1e-4}, "train_iters": 2}})
    said = errors("job.yaml")
    assert ['"gpt_args.seed" is {}, expected the value of a flag' in said[0], len(said)] == [True, 2]
    assert '"gpt_args.training.lr" is {"value": 0.0001}, expected the value of a flag' in said[1]


def test_how_values_of_gpt_args_are_read(files: Any) -> None:
    given = {
        **FLAGS, "lr": "1e-4", "bf16": True, "finetune": False, "save": None, "use-deter-comp": True,
        "group": {"seed": "7", "inner": {"micro_batch_size": 2}}, "clip_grad": 0,
    }  # fmt: skip
    flags = parse_train_flags([job(files, gpt_args=given)])
    assert (flags.lr, flags.bf16, flags.use_deter_comp, flags.seed) == (1e-4, True, True, 7)
    assert (flags.micro_batch_size, flags.clip_grad) == (2, 0)
    assert not {"finetune", "save"} & flags.model_fields_set
    assert flags.given["micro_batch_size"] == "gpt_args.group.inner.micro_batch_size"


def test_flags_is_another_name_of_gpt_args(files: Any) -> None:
    flags = parse_train_flags([job(files, gpt_args=None, flags=FLAGS)])
    assert (flags.lr, flags.given["lr"]) == (1e-4, "flags.lr")
    assert errors(job(files, flags={"seed": 1}))[0] == (
        f'{place(files, "^flags:")} error: "flags" and "gpt_args" are two names of one thing, first at '
        f"{place(files, '^gpt_args:')}. Keep one of them"
    )


def test_plugins_go_to_the_model(files: Any) -> None:
    job(files, plugins=["nosuch"])
    assert errors("job.yaml") == [
        f"{place(files, '- ^nosuch')} error: the distribution 'nosuch' is not installed"
    ]
    files.model["plugins"] = ["mmzoo-plugin-wan22"]
    found = errors(job(files, plugins=["mmzoo-plugin-wan22"]))
    assert len(found) == 1
    assert 'error: "plugins" is given twice: in the model section too, at job.yaml:' in found[0]
    assert errors(job(files, model=None, plugins=["x"], gpt_args=FLAGS))[0].endswith(
        '"plugins" is given, but the job has no model'
    )


MISTAKES = [
    ({"modle": {}}, "^modle", 'unknown key "modle" in the job file. Did you mean "model"?'),
    ({"tool": {}}, "^tool:", 'unknown key "tool" in the job file. Did you mean "tools"?'),
    ({"MM_TOOL_PTH": "x.json"}, "^MM_TOOL_PTH", 'unknown key "MM_TOOL_PTH" in the job file. Did you mean "MM_TOOL_PATH"?'),
    ({"gpt_args": {**FLAGS, "train_iter": 3}}, "^train_iter: 3", 'there is no flag "train_iter". Did you mean "train_iters"?'),
    ({"gpt_args": {**FLAGS, "seed": "x"}}, "seed: ^x", '"seed" is "x", expected a whole number'),
    ({"gpt_args": {**FLAGS, "train_iters": 0}}, "train_iters: ^0", '"train_iters" is 0: must be at least 1'),
    ({"gpt_args": {**FLAGS, "min_lr": 1}}, "min_lr: ^1", "min_lr: 1.0 is above --lr 0.0001"),
    ({"gpt_args": [1]}, "gpt_args:\n^- 1", '"gpt_args" is [1], expected an object of flags'),
    ({"model": 3}, "model: ^3", '"model" is 3, expected an object or the path of a file'),
    ({"tools": "nowhere.json"}, "tools: ^nowhere", 'mm_tool: "nowhere.json": there is no such file'),
]  # fmt: skip


@pytest.mark.parametrize(("top", "snippet", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_told_at_their_place(
    files: Any, top: dict[str, Any], snippet: str, message: str
) -> None:
    path = job(files, **top)
    with pytest.raises(ConfigError) as caught:
        load_training_job(parse_train_flags([path]))
    found = [str(finding) for finding in caught.value.findings if finding.level == "error"]
    wanted = f"{place(files, snippet)} error: {message}"
    assert [text for text in found if text.startswith(wanted)], found


def test_a_key_of_a_section_is_named_by_the_section(files: Any) -> None:
    files.model["predicter"] = files.model.pop("predictor")
    found = errors(job(files))
    assert (
        f'{place(files, "^predicter")} error: unknown key "predicter" in model. Did you mean "predictor"?'
        in found
    )
    files.model["predictor"] = files.model.pop("predicter")
    files.model["predictor"]["num_layer"] = 3
    assert errors(job(files)) == [
        f'{place(files, "^num_layer: 3")} error: unknown key "num_layer" in predictor (wandit). '
        'Did you mean "num_layers"?'
    ]


def test_a_wrong_flag_hides_nothing_of_the_sections(files: Any) -> None:
    files.model["predictor"]["num_layer"] = 3
    found = errors(job(files, gpt_args={**FLAGS, "train_iter": 3}))
    assert ["num_layer" in text or "train_iter" in text for text in found] == [True, True]


@pytest.mark.parametrize("second", ["gpt_args", "lora_args"])
def test_a_flag_given_twice(files: Any, second: str) -> None:
    top: dict[str, Any] = {"gpt_args": {**FLAGS, "more": {"lr": 3}}}
    if second == "lora_args":
        top = {"lora_args": {"lr": 3}}
    path = job(files, **top)
    assert errors(path) == [
        f'{place(files, "^lr: 3")} error: "lr" is given twice, first at {place(files, "^lr: 0.0001")}. '
        "Keep one of them"
    ]


def test_a_section_given_twice(files: Any) -> None:
    path = job(files)
    where = place(files, "model:\n  ^load_video")
    assert errors(path, "--mm-model", "model.json") == [
        f"--mm-model error: the model section is given twice: it is written at {where} too. Keep one of them"
    ]
    job(files, gpt_args={**FLAGS, "fsdp2_config_path": "fsdp2.yaml"})
    inline = place(files, "fsdp2:\n  ^sharding")
    assert errors(path) == [
        f"{place(files, '^fsdp2_config_path')} error: the fsdp2 section is given twice: it is written at "
        f"{inline} too. Keep one of them"
    ]
    job(files, tools="tools.json", MM_TOOL_PATH="tools.json")
    assert errors(path) == [
        f"{place(files, '^MM_TOOL_PATH')} error: the tools file is given twice: at "
        f"{place(files, '^tools: tools.json')} too, as tools. Keep one of them"
    ]


def test_two_job_files_and_other_files(files: Any) -> None:
    path = job(files)
    assert errors(path, path) == [
        "job.yaml error: a second job file: job.yaml is given already. Keep one of them"
    ]
    with pytest.raises(ConfigError, match=r"this is a model file by its keys.*Write --mm-model model.json"):
        parse_train_flags(["model.json"])
    with pytest.raises(ConfigError, match=r"this is an? inference file by its keys, expected a job file"):
        parse_train_flags(["inference.json"])
    with pytest.raises(ConfigError, match=r"jb.yaml: no such file. Did you mean job.yaml"):
        parse_train_flags(["jb.yaml"])
    flags = parse_train_flags(["--mm-model", path])
    assert [f.message for f in check_training_job(flags) if f.level == "error"] == [
        "this is a job file by its keys, expected a model file"
    ]


COMBINED = """\
WEIGHTS: &WEIGHTS weights/transformer
UNUSED: &UNUSED x
MM_TOOL_PATH: tools.json
gpt_args:
  lr: 1.0e-5
  train_iters: 3
  load: *WEIGHTS
  fsdp2_config_path: fsdp2.yaml
"""


def combined(files: Any, folder: str = "") -> str:
    (files.folder / folder).mkdir(exist_ok=True)
    text = COMBINED + yaml.safe_dump({"model": files.model, "data": files.data}, sort_keys=False)
    path = files.folder / folder / "combined.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path.relative_to(files.folder))


def test_a_combined_yaml_of_mindspeed(files: Any) -> None:
    flags = parse_train_flags([combined(files)])
    assert (flags.mm_tool, flags.load, flags.fsdp2_config_path) == (
        "tools.json",
        "weights/transformer",
        "fsdp2.yaml",
    )
    assert [str(finding) for finding in flags.findings] == [
        'combined.yaml:2:1 note: nothing refers to "UNUSED"'
    ]
    assert [str(f) for f in check_training_job(flags) if f.level == "error"] == []
    assert errors("combined.yaml") == []
    config = MMConfig({"model": "combined.yaml", "data": "combined.yaml"})
    assert config.model.predictor.num_layers == 40
    assert config.data.dataset_param.dataset_type == "t2v"


def test_sections_are_checked_as_what_they_must_be(files: Any) -> None:
    path = job(files, model=files.data)
    assert errors(path)[0].endswith("error: model: this is a data file by its keys, expected a model file")


@pytest.mark.parametrize("name", ["job.json", "job.yml"])
def test_other_extensions(files: Any, name: str) -> None:
    content = {"gpt_args": FLAGS, "model": files.model, "data": files.data}
    (files.folder / name).write_text(json.dumps(content), encoding="utf-8")
    flags = parse_train_flags([name])
    assert flags.sections["model"].path == name
    assert errors(name) == []


def test_duplicate_keys(files: Any, write: Callable[[str, str], str]) -> None:
    write("twice.yaml", "gpt_args: {lr: 1}\nmodel: {}\ngpt_args: {lr: 2}\n")
    with pytest.raises(ConfigError, match=r'twice.yaml:3:1: duplicate key "gpt_args", first given at line 1'):
        parse_train_flags(["twice.yaml"])


def test_what_is_missing_is_asked_for_in_the_job_file_too(files: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training_job(parse_train_flags([job(files, gpt_args=None, data=None)]))
    text = str(caught.value)
    assert "Add --lr X, or write it under gpt_args of job.yaml" in text
    assert 'Add --mm-data FILE, or "data" to job.yaml' in text


def test_get_args_of_a_job_file(files: Any) -> None:
    set_args(load_training_job(parse_train_flags([job(files), "model.predictor.num_layers=2"])))
    try:
        args = get_args()
        assert args.mm.model.predictor.num_layers == 2
        assert args.mm.data.dataset_param.dataset_type == "t2v"
        assert args.mm.tool.profile.enable is False
        assert (args.mm_model, args.mm_data, args.lr) == ("job.yaml", "job.yaml", 1e-4)
        assert MMConfig({"model": args.mm_model, "tool": args.mm_tool}).tool.profile.enable is False
    finally:
        clear_args()


def test_explaining_a_job_file(files: Any) -> None:
    path = job(files)
    alone = {item.field: str(item.origin) for item in explain_files([path])}
    assert alone["model.predictor.num_layers"] == place(files, "num_layers: ^40")
    assert alone["flags.lr"] == place(files, "lr: ^0.0001")
    assert alone["flags.seed"] == "default"
    changed = explain_flags(parse_train_flags([path, "flags.lr=3", "fsdp2.sharding_size=1"]))
    assert [(i.value, str(i.origin)) for i in matching("lr", changed)] == [(3.0, "command line: flags.lr=3")]
    assert [str(i.origin) for i in matching("sharding_size", changed)] == [
        "command line: fsdp2.sharding_size=1"
    ]
    with pytest.raises(ConfigError, match=r"cannot be explained together with job\.yaml"):
        explain_files([path, "model.json"])


def test_the_corpus_file_has_its_sections() -> None:
    path = Path(__file__).parents[2] / "corpus" / "qwen3vl_yaml" / "qwen3vl_full_sft_8B.yaml"
    read = read_job_file(str(path))
    assert read.classic
    assert sorted(read.sections) == ["data", "model"]
    assert read.flags["fsdp2_config_path"].value == "./examples/qwen3vl/fsdp2_config.yaml"
    assert read.flags["mm_tool"].value == "./mindspeed_mm/tools/tools.json"
    assert read.flags["no_load_optim"].value is True
    assert read.findings == []


@pytest.mark.parametrize("line", ["K{}: {}\n", "  k{}: {}\n"])
def test_many_keys_take_no_time_each_for_all_others(write: Callable[[str, str], str], line: str) -> None:
    keys = "".join(line.format(index, index) for index in range(3000))
    path = write("job.yaml", ("" if line[0] == "K" else "model:\n") + keys + "tools: {}\n")
    begin = time.process_time()
    assert len(check_file(path)) >= 3000
    assert time.process_time() - begin < 20
