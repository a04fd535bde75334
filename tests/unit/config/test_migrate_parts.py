"""Parts of `mm migrate`: people's own comments, the launcher, folders, odd names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mm_core.config.migrate import migrate
from mm_core.config.migrate.source_comments import source_comments

DATA = {"dataset_param": {"dataset_type": "t2v", "basic_parameters": {"data_path": "lists/data.txt"}}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_comments_of_json() -> None:
    Path("a.json").write_text(
        '// head\n/* two\n * lines */\n{"a": "// no", // yes\n  // of b\n\n "b": 1, "c": 2 /* both */ }'
    )
    found = source_comments("a.json")
    assert found.behind == {4: "yes", 7: "both"}
    assert found.above == {4: ["head", "two", "lines"], 6: ["of b"]}


def test_comments_of_yaml() -> None:
    Path("a.yaml").write_text(
        "# one\n# two\na: 'x # no'  # yes\nb: |\n  text # no\n  # no\nc: [1, # first\n  2]\nd: http://x#y  #z\n"
    )
    found = source_comments("a.yaml")
    assert found.behind == {3: "yes", 7: "first", 9: "z"}
    assert found.above == {3: ["one", "two"]}


def test_peoples_comments_stand_at_their_keys() -> None:
    Path("m.json").write_text('{\n // which data\n "dataset_param": {"dataset_type": "t2v"} // ours\n}')
    text = migrate(["m.json"]).text
    assert "data:" in text
    lines = text.splitlines()
    at = lines.index("  # which data")
    assert lines[at + 1].startswith("  dataset_param:")
    assert re.search(r'dataset_type: t2v +# m\.json:3; "ours"$', lines[at + 2])


@pytest.mark.parametrize(
    ("launcher", "ranks", "command"),
    [
        ("torchrun --nproc-per-node=4 --standalone", 4, "torchrun --nproc_per_node 4 -m"),
        ("python -m torch.distributed.launch --nproc_per_node 2 --nnodes 1", 2, "torchrun --nproc_per_node 2 --nnodes 1 -m"),
        ("accelerate launch --num_machines 1 --num_processes 8 --multi_npu", 8, "torchrun --nproc_per_node 8 --nnodes 1 -m"),
        ("torchrun --nproc_per_node $(nproc)", None, "torchrun --nproc_per_node $(nproc) -m"),
        ("torchrun --nproc_per_node 8 --nnodes $N", None, "torchrun --nproc_per_node 8 --nnodes $N -m"),
        ("python -u", None, None),
        ("torchrun --nproc_per_node 0", None, "torchrun --nproc_per_node 0 -m"),
    ],
)  # fmt: skip
def test_the_launcher_becomes_a_command_and_the_ranks_of_one_machine_a_flag(
    launcher: str, ranks: int | None, command: str | None
) -> None:
    Path("x.sh").write_text(f"{launcher} pretrain_sora.py --lr 1e-3\n")
    text = migrate(["x.sh"], output="my job.yaml").text
    assert yaml.safe_load(text)["gpt_args"].get("nproc_per_node") == ranks
    found = [line for line in text.splitlines() if "torchrun" in line and "-m mm_core" in line]
    assert bool(found) == (command is not None)
    if command is not None:
        assert f"{command} mm_core train 'my job.yaml'" in found[0]


def test_paths_of_a_script_that_changes_its_folder() -> None:
    Path("work/lists").mkdir(parents=True)
    Path("work/data.json").write_text(json.dumps(DATA))
    Path("x.sh").write_text(
        "cd work\npython pretrain_sora.py --mm-data data.json --load ../weights --save /abs --tensorboard-dir ~/t\n"
    )
    result = yaml.safe_load(migrate(["x.sh", "--lock-file", "here.lock"]).text)
    assert result["gpt_args"] == {
        "load": "weights",
        "save": "/abs",
        "tensorboard_dir": "~/t",
        "lock_file": "here.lock",
    }
    assert result["data"]["dataset_param"]["basic_parameters"]["data_path"] == "work/lists/data.txt"
    assert "# Train from the folder work (seen from here): " in migrate(["x.sh"]).text
    assert "Train from the folder" not in migrate(["work/data.json"]).text


def test_paths_from_a_folder_behind_a_link(folder: Path) -> None:
    (folder / "real/deep").mkdir(parents=True)
    os.symlink("real/deep", folder / "link")
    Path("data.json").write_text(json.dumps(DATA))
    result = yaml.safe_load(migrate(["data.json", "--dataset", "a,b/c"], output="link/job.yaml").text)
    path = result["data"]["dataset_param"]["basic_parameters"]["data_path"]
    assert os.path.realpath(os.path.join("link", path)) == str(folder / "lists/data.txt")


def test_odd_names_and_values_break_no_line(folder: Path) -> None:
    name = "odd\n- [31m\udcff.sh"
    Path(name).write_text(
        "export A='x\ny: \x1b[31m'\npython pretrain_sora.py --save $'a' --load 'b\n# c' --lr 1e400 --x '\x1b'\n"
    )
    result = migrate([name])
    assert "\x1b" not in result.text + result.difference
    result.text.encode("utf-8")
    result.difference.encode("utf-8")
    data = yaml.safe_load(result.text)
    assert data == {"gpt_args": {"save": "a", "load": "b\n# c", "lr": "1e400", "x": "\x1b"}}


def test_no_torch_is_imported() -> None:
    Path("x.sh").write_text("python pretrain_sora.py --lr 1e-3\n")
    code = "import sys; from mm_core.cli.main import main; assert main(['migrate', 'x.sh']) == 0"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("job.yaml").exists()
