"""The job file that `mm migrate` makes says what its sources say, in one place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_core.config import ConfigError, parse_train_flags
from mm_core.config.assemble import Assembly
from mm_core.config.document import read_document
from mm_core.config.job import TrainingDraft, draft_training_job
from mm_core.config.migrate import Migration, migrate
from mm_core.config.migrate.yaml_text import YamlText, scalar
from mm_core.config.paths import PATH_KEYS
from mm_core.config.resolved import component_values, plain
from mm_core.config.yaml_reader import parse_yaml
from mm_registry import default_manager

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CORPUS = ROOT / "tests" / "corpus"
LORA = ["--lr", "1e-4", "--train-iters", "10"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout as MindSpeed-MM's users have it, as the working directory."""
    shutil.copytree(CORPUS, tmp_path / "examples", copy_function=shutil.copyfile)
    for script in (HERE / "scripts").glob("*.sh"):
        shutil.copyfile(script, tmp_path / script.name)
    tools = tmp_path / "mindspeed_mm" / "tools"
    tools.mkdir(parents=True)
    shutil.copyfile(CORPUS / "tools.json", tools / "tools.json")
    for source in (CORPUS / "qwen3vl_yaml").glob("*.yaml"):
        shutil.copyfile(source, tmp_path / "examples" / "qwen3vl" / source.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draft(argv: list[str]) -> TrainingDraft:
    assembly = Assembly(default_manager())
    return draft_training_job(parse_train_flags(argv), assembly, to_run=False)


def resolved(argv: list[str]) -> dict[str, Any]:
    """Everything that a job comes to, with paths as they are meant: sections, components, flags."""
    job = draft(argv)
    flags = plain(job.flags)
    for name in ("mm_model", "mm_data", "mm_tool", "fsdp2_config_path"):
        del flags[name]
    found = {name: document.data for name, document in job.documents.items()}
    found |= {name: component_values(component) for name, component in job.components.items()}
    found |= {"flags": flags, "sections": plain([job.model, job.data, job.tools, job.fsdp2])}
    values: dict[str, Any] = _meant(json.loads(json.dumps(found)), "")
    return values


def _meant(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return {name: _meant(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [_meant(item, key) for item in node]
    if isinstance(node, str) and key in PATH_KEYS and "://" not in node:
        return os.path.realpath(node)
    return node


def written(argv: list[str], output: str = "job.yaml", **options: Any) -> Migration:
    result = migrate(argv, output=output, **options)
    result.write()
    assert read_document(output).data == yaml.safe_load(result.text), "another reader of YAML reads the same"
    return result


WAN = "examples/wan2.2/"
JOBS = {
    "t2v 5B": [WAN + "5B/t2v/pretrain_model.json", WAN + "5B/t2v/data.json", WAN + "5B/fsdp2_config.yaml"],
    "ti2v 5B": [WAN + "5B/ti2v/pretrain_model.json", WAN + "5B/ti2v/data.json", WAN + "5B/fsdp2_config.yaml"],
    "t2v A14B": [WAN + "A14B/t2v/pretrain_model_low.json", WAN + "A14B/t2v/data.json", "mindspeed_mm/tools/tools.json"],
    "i2v A14B": [WAN + "A14B/i2v/pretrain_model_high.json", WAN + "A14B/i2v/data.json", WAN + "A14B/fsdp2_config.yaml"],
    "qwen": ["examples/qwen3vl/model_8B.json", "examples/qwen3vl/data_8B.json", "examples/qwen3vl/fsdp2_config.yaml"],
}  # fmt: skip
FLAGS = {"model": "--mm-model", "pretrain_model": "--mm-model", "data": "--mm-data", "tools": "--mm-tool"}


def named(files: list[str]) -> list[str]:
    """The files behind their flags."""
    words = []
    for file in files:
        stem = Path(file).stem
        flag = (
            "--fsdp2-config-path"
            if "fsdp2" in stem
            else next(v for k, v in FLAGS.items() if stem.startswith(k))
        )
        words += [flag, file]
    return words


@pytest.mark.parametrize("folder", ["", "jobs/deep"])
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("how", ["files", "flags", "no-inline"])
def test_files_come_to_the_same(project: Path, name: str, folder: str, how: str) -> None:
    if folder:
        Path(folder).mkdir(parents=True)
    output = os.path.join(folder, "job.yaml")
    flags = named(JOBS[name])
    written([*(JOBS[name] if how == "files" else flags), *LORA], output, inline=how != "no-inline")
    assert resolved([output]) == resolved([*flags, *LORA])


def test_a_classic_script_comes_to_the_same(project: Path) -> None:
    script = (
        Path("pretrain_t2v.sh")
        .read_text()
        .replace("torchrun $DISTRIBUTED_ARGS pretrain_sora.py", "printf '%s\\n'")
    )
    original = [
        word
        for part in re.findall(r'^[A-Z]+_ARGS="\n(.*?)^"', script, re.S | re.M)[1:]
        for word in part.split()
    ]
    values = dict(re.findall(r"""^(\w+)=["']?([^"'\s]+)["']?(?:\s*#.*)?$""", script, re.M)) | {"GBS": "16"}
    expected = [
        re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], word) for word in original if word != "\\"
    ]
    written(["pretrain_t2v.sh"])
    assert resolved(["job.yaml"]) == resolved(
        [*expected, "--distributed-backend", "nccl", "--nproc_per_node", "8"]
    )


def test_a_combined_yaml_comes_to_the_same(project: Path) -> None:
    source = "examples/qwen3vl/qwen3vl_full_sft_8B.yaml"
    Path("jobs").mkdir()
    written([source], "jobs/job.yaml")
    assert resolved(["jobs/job.yaml"]) == resolved([source])
    text = Path("jobs/job.yaml").read_text()
    assert "HF_MODEL_LOAD_PATH" not in yaml.safe_load(text)
    assert "默认8卡配置" in text, "people's own comments are kept"
    other = migrate(["finetune_yaml.sh"])
    assert yaml.safe_load(other.text)["gpt_args"]["distributed_backend"] == "nccl"
    assert [finding.code for finding in other.findings] == ["not-followed", "flags-count"]
    line = "#     torchrun --nproc_per_node 16 --nnodes 2 --node_rank $1 --master_addr $MASTER_ADDR --master_port 29502"
    assert f"{line} -m mm_core train job.yaml\n" in other.text
    assert "nproc_per_node" not in yaml.safe_load(other.text)["gpt_args"]


def test_every_value_tells_where_it_was(project: Path) -> None:
    result = written(["pretrain_t2v.sh"])
    lines = result.text.splitlines()
    for line in lines:
        if ": " in line and not line.startswith("#") and not re.match(r"\w+:", line):
            assert re.search(
                r"  # (pretrain_t2v\.sh|pretrain_model\.json|data\.json|tools\.json|fsdp2_config\.yaml):\d+",
                line,
            ) or ("# has no effect here" in line), line
    where = {line.split("#")[0].strip(): line.partition("# ")[2] for line in lines}
    assert where["lr: 1.0e-05"] == "pretrain_t2v.sh:48"
    assert where["global_batch_size: 16"] == "pretrain_t2v.sh:46; value from line 23"
    assert where["in_dim: 48"] == "pretrain_model.json:18"
    assert where["eval_iters: 10"] == "pretrain_t2v.sh:84"
    assert where["nproc_per_node: 8"].startswith("pretrain_t2v.sh:92; the launcher's argument")
    assert "#     export HCCL_CONNECT_TIMEOUT=1200 " in result.text
    assert "hf_verysecret" not in result.text + result.difference
    assert "export HF_TOKEN=***" in result.text


def test_the_difference_tells_what_is_not_as_it_was(project: Path) -> None:
    Path("sub").mkdir()
    result = migrate(["pretrain_t2v.sh", "--seed", "1", "--seed", "2"], output="sub/job.yaml")
    lines = result.difference.splitlines()
    assert lines[1] == "+++ job.yaml"
    at = next(index for index, line in enumerate(lines) if "--load" in line)
    assert re.fullmatch(r"-pretrain_t2v\.sh:85 +--load \./ckpt/Wan2\.2-TI2V-5B", lines[at])
    found = re.fullmatch(r"\+job\.yaml:(\d+) +load: \.\./ckpt/Wan2\.2-TI2V-5B", lines[at + 1])
    assert found is not None
    assert result.text.splitlines()[int(found[1]) - 1].startswith("  load: ../ckpt/Wan2.2-TI2V-5B ")
    assert "-command line  --seed 1" in lines
    assert lines[-1] == (
        "162 values as they were, 10 paths rewritten, 4 files became sections, 1 value taken from the launcher, "
        "1 flag given more than once, 12 have no effect here"
    )


def test_an_old_spelling_is_rewritten_in_its_place(project: Path) -> None:
    model = json.loads(Path("examples/qwen3vl/model_8B.json").read_text())
    vision = model["image_encoder"]["vision_encoder"]
    vision.pop("synchronize_per_layer", None)
    Path("model.json").write_text(json.dumps(model | {"image_encoder": model["image_encoder"] | {
        "vision_encoder": {"synchronize": True} | vision}}, indent=1))  # fmt: skip
    result = migrate(["model.json"])
    assert re.search(r"synchronize_per_layer: true +# model\.json:\d+; was synchronize", result.text)
    assert not re.search(r"^ +synchronize:", result.text, re.M)
    assert "1 legacy spelling rewritten" in result.difference
    assert re.search(
        r"-model\.json:\d+ +synchronize: true\n\+job\.yaml:\d+ +synchronize_per_layer: true\n",
        result.difference,
    )
    assert "legacy-key" not in {finding.code for finding in result.check()}


def test_what_is_wrong_stays_and_is_marked(project: Path) -> None:
    result = migrate([*JOBS["i2v A14B"], "--no-such-flag", "1", "--ckpt-format", "torch", *LORA])
    lines = result.text.splitlines()
    typo = next(line for line in lines if "i2v_vae_encod_tiling" in line)
    assert 'ERROR: unknown key "i2v_vae_encod_tiling"' in typo
    assert "ERROR: there is no flag" in next(line for line in lines if line.startswith("  no_such_flag: 1"))
    assert "ERROR: " in next(line for line in lines if line.startswith("  ckpt_format: torch "))
    errors = [finding for finding in result.check() if finding.level == "error"]
    assert {lines[(finding.line or 0) - 1].split(":")[0].strip() for finding in errors} == {
        "i2v_vae_encod_tiling", "no_such_flag", "ckpt_format"
    }  # fmt: skip


def test_secrets_are_left_out_and_said(project: Path) -> None:
    data = {
        "dataset_param": {"dataset_type": "t2v", "api_token": "hush-1", "basic_parameters": {
            "data_path": "https://me:hush-2@host/x"}}, "password": {"deep": "hush-3"}}  # fmt: skip
    Path("data.json").write_text(json.dumps(data))
    result = migrate(["data.json", "--hub-token", "hush-4"])
    assert "hush" not in result.text + result.difference + str(result.findings)
    assert "api_token" not in yaml.safe_load(result.text)["data"]["dataset_param"]
    assert "#     data.dataset_param.api_token (data.json:1:" in result.text
    assert [finding.path for finding in result.findings] == [
        "gpt_args.hub_token", "data.dataset_param.api_token", "data.dataset_param.basic_parameters.data_path", "data.password"
    ]  # fmt: skip


def test_nothing_is_overwritten_and_nothing_is_left_behind(project: Path) -> None:
    result = migrate(LORA)
    Path("job.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"^job\.yaml: it exists, and is not overwritten\. "):
        result.write()
    assert Path("job.yaml").read_text() == "mine"
    Path("job.yaml").unlink()
    Path("job.yaml").symlink_to("elsewhere.yaml")
    with pytest.raises(ConfigError, match="not overwritten"):
        result.write()
    assert not Path("elsewhere.yaml").exists()
    assert not [name for name in os.listdir() if name.startswith(".tmp-")]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "mm migrate: nothing to migrate: name a launch script, files or flags"),
        (["A=1", *LORA], 'command line: "A=…" sets a variable of a launch script, and none is given'),
        (["pretrain_t2v.sh", "arrays.sh"], "arrays.sh: a second launch script: pretrain_t2v.sh is given already"),
        (["none.json"], "none.json: no such file"),
        ([*JOBS["qwen"][:1], *JOBS["t2v 5B"][:1]], "a second model file: examples/qwen3vl/model_8B.json is given already"),
        (["examples/wan2.2/5B/t2v/inference_model.json"], "this is an inference file, which is no part of a training job"),
        (["--mm-model", JOBS["t2v 5B"][1]], "this is a data file by its keys, expected a model file"),
        (["pretrain_t2v.sh", "--mm-tool", "x.json"], "x.json: no such file"),
        (["--mm-model"], "--mm-model: --mm-model has no value"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(project: Path, argv: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        migrate(argv)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_who_names_it(project: Path) -> None:
    shutil.rmtree("mindspeed_mm")
    with pytest.raises(ConfigError) as caught:
        migrate(["pretrain_t2v.sh"])
    assert str(caught.value) == (
        "./mindspeed_mm/tools/tools.json: no such file, which pretrain_t2v.sh:77 names. "
        "Run `mm migrate` from the folder in which training starts, or give the file with its flag"
    )
    assert "tools" not in yaml.safe_load(migrate(["pretrain_t2v.sh"], inline=False).text)


def test_the_folder_must_exist(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no/job\.yaml: there is no folder no$"):
        migrate(LORA, output="no/job.yaml")


def test_plugins_and_a_job_file_of_ours(project: Path) -> None:
    Path("old").mkdir()
    Path("old/job.yaml").write_text(
        "plugins: [mmzoo-plugin-wan22]\nflags: {lr: 1e-3, save: runs}\nmodel: m.json\n"
    )
    shutil.copyfile(JOBS["t2v 5B"][0], "old/m.json")
    result = migrate(["old/job.yaml", "--lr", "2e-3"])
    data = yaml.safe_load(result.text)
    assert list(data) == ["plugins", "gpt_args", "model"]
    assert data["gpt_args"] == {"lr": 2e-3, "save": "old/runs"}
    assert data["plugins"] == ["mmzoo-plugin-wan22"]


AWKWARD = ["", " ", "yes", "No", "null", "~", "1", "1e-5", "0x1f", "1:30", "2001-01-01", ".5", ".inf", "a: b", "a #b", "#a",
           "- a", "[a]", "{*}", "*a", "&a", "!a", "%a", "@a", "`a`", "'", '"', "a\nb", "\t", "é", "\u2028", "\x85", "\x7f", "😀",
           "\ufeff", "a\\b", "=", "<<", "a,b", "?", "-", "a b", "...", "---", "/x", "./x", "../x y", "x" * 300]  # fmt: skip


@pytest.mark.parametrize(
    "value", [*AWKWARD, 1e-5, 1e300, -0.0, 5e-324, 2**70, True, None, [], {}, [1, [2]], [{}], [[]], 0.1]
)
def test_any_value_is_read_as_it_was(value: Any) -> None:
    data = {
        "key": value,
        "list": [value, value],
        "deep": [{"a": value, "b": [value] * 40}, [[value]]],
        str(value)[:9] or "k": 1,
    }
    text = YamlText(data, lambda path: "x # y: z", lambda path: ["above"])
    joined = "\n".join(text.lines) + "\n"
    assert yaml.safe_load(joined) == data
    assert parse_yaml(joined, "x.yaml").data == data
    for line, path in text.places.items():
        assert parse_yaml(joined, "x.yaml").key_origin(path).line == line


def test_scalars_are_short() -> None:
    assert [scalar(value) for value in (1e-5, 0.5, 1e22, True, None, "a b", "bf16")] == [
        "1.0e-05", "0.5", "1.0e+22", "true", "null", "a b", "bf16"
    ]  # fmt: skip
