"""The pages about plugins are true: their files and commands are followed in a fresh folder, as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import read_document
from tests.e2e.conftest import ROOT, TINY
from tests.e2e.pages import Environment, Walk, blocks, follow, own_lines, titled

pytestmark = pytest.mark.timeout(600)

DOCS = ROOT / "docs"
WRITE, PORT, CONTRACT = (
    DOCS / f"{name}.md" for name in ("write-a-plugin", "port-a-predictor", "plugin-contract")
)


@dataclass(frozen=True)
class Followed:
    """A page that was followed: where, and what came of it."""

    folder: Path
    environment: Environment
    walk: Walk

    def run(self, command: str, code: int = 0) -> str:
        done = self.environment.run(command, self.folder)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def followed(page: Path, root: Path) -> Followed:
    folder = root / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")  # "in a clone of MM Zoo"
    environment = Environment.make(root / "venv")
    return Followed(folder, environment, follow(page, folder, environment))


# -- Write a plugin


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    return followed(WRITE, tmp_path_factory.mktemp("write"))


def test_a_newcomer_passes_the_kit_in_six_commands_and_sixty_lines(written: Followed) -> None:
    walk = written.walk
    before = [command for block in blocks(WRITE) for command in block.commands if "minihaar" not in command]
    assert before[-1].startswith("mm train")  # the sixth; the kit is passed before it
    assert len(before) <= 6
    assert own_lines(walk.written, "minidit") <= 60
    assert own_lines(walk.written, "mmzoo-plugin-minihaar") <= 60
    (passed,) = re.findall(r"(\d+) passed", walk.outputs["pytest mmzoo-plugin-minidit/tests"])
    assert int(passed) >= 60


def test_the_plugins_of_the_page_are_listed(written: Followed) -> None:
    entries = {entry["id"]: entry for entry in json.loads(written.run("mm list --format json"))}
    for name, group in {"minihaar": "mm_core.ae_models", "minidit": "mm_core.predictor_models"}.items():
        assert entries[name]["group"] == group
        assert entries[name]["distribution"] == f"mmzoo-plugin-{name}"
        assert entries[name]["status"] == "available"


def test_the_plugin_made_by_hand_works_without_a_config_class(written: Followed) -> None:
    text = titled(WRITE, "minihaar.json").replace('"level": 2', '"levels": 2')
    (written.folder / "good.json").write_text(text)
    assert "nothing to say" in written.run("mm check good.json")
    (written.folder / "bad.json").write_text(text.replace('"levels": 2', '"levels": "2"'))
    assert '"levels" is "2", expected a whole number' in written.run("mm check bad.json", 2)
    assert "minihaar" in written.run("mm doctor")


def minidit_model(folder: Path, **more: Any) -> Path:
    model = read_document(ROOT / TINY / "model.json").data
    model["predictor"] = {"model_id": "minidit", "init": "random", "hidden_size": 32}
    model["ae"] = {"model_id": "minihaar", "init": "random"}
    path = folder / "both.json"
    path.write_text(json.dumps(model | more))
    return path


def test_callback_task_and_hook_of_the_contract_page_take_part(written: Followed) -> None:
    """The two plugins in one job, with the contract page's callback and task as a third."""
    plugin = written.folder / "mmzoo-plugin-smallest"
    plugin.mkdir()
    for module in ("smallest_loss.py", "huber.py"):
        (plugin / module).write_text(titled(CONTRACT, module))
    (plugin / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "mmzoo-plugin-smallest"\nversion = "1"\n'
        '[project.entry-points."mm_core.callbacks"]\nsmallest_loss = "smallest_loss:SmallestLoss"\n'
        '[project.entry-points."mm_core.tasks"]\nhuber = "huber:HuberTask"\n'
        '[tool.setuptools]\npy-modules = ["huber", "smallest_loss"]\n'
    )
    written.run("pip install -e mmzoo-plugin-smallest")
    model = minidit_model(written.folder, callbacks=["smalest_loss"])
    wrong = written.run(f"mm check {model}", 2)
    assert (
        "no installed distribution offers the callback 'smalest_loss'. Did you mean 'smallest_loss'" in wrong
    )
    model = minidit_model(written.folder, callbacks=["smallest_loss"], task_id="huber")
    data = TINY / "data.json"
    written.run(
        f"mm train --mm-model {model} --mm-data {data} --num-workers 0 --lr 1e-3 --train-iters 2 --save runs/both"
    )
    run = written.folder / "runs/both"
    assert re.search(r"smallest loss \d+\.\d{4} at step [12]", (run / "logs/rank-00000.log").read_text())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)  # Huber's loss is below the absolute error, and below half the mean square
        assert 0 < record["loss"] < record["absolute_error"]
    (overwrite,) = json.loads((run / "config.json").read_text())["overwrites"]
    assert (overwrite["path"], overwrite["new"]) == ("predictor.ffn_dim", 128)


def test_the_pattern_error_of_the_contract_page_is_what_is_said(written: Followed) -> None:
    (written.folder / "fsdp2.yaml").write_text("sub_modules_to_wrap:\n  - predictor.block.{*}\n")
    model = minidit_model(written.folder)
    said = written.run(
        f"mm train --mm-model {model} --mm-data {TINY / 'data.json'} --fsdp2-config-path fsdp2.yaml "
        "--lr 1e-3 --train-iters 1",
        2,
    )
    assert said.strip().splitlines()[-1] in CONTRACT.read_text(encoding="utf-8")


# -- Port a predictor


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    return followed(PORT, tmp_path_factory.mktemp("port"))


@pytest.mark.slow
def test_the_ported_predictor_passes_the_kit(ported: Followed) -> None:
    said = ported.walk.outputs["pytest mmzoo-plugin-short-dit/tests"]
    assert "failed" not in said
    assert "xfailed" not in said
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 60


REFERENCE = '''
"""Runs the class of the page as MindSpeed-MM would, and writes what it computes."""

import sys, types
import torch
from safetensors.torch import save_file

# Neither Megatron nor MindSpeed-MM can be installed here; the class uses no more of them than this.
for name in ("megatron", "megatron.training", "mindspeed_mm", "mindspeed_mm.models", "mindspeed_mm.models.common",
             "mindspeed_mm.models.common.module"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["megatron.training"].get_args = lambda: types.SimpleNamespace(recompute_granularity=None)


class MultiModalModule(torch.nn.Module):
    def __init__(self, config):
        super().__init__()


sys.modules["mindspeed_mm.models.common.module"].MultiModalModule = MultiModalModule
from short_dit import ShortDiT

torch.manual_seed(0)
model = ShortDiT(in_dim=4, out_dim=4, hidden_size=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
                 caption_channels=16, no_such_key=True)
inputs = {
    "latents": torch.randn(2, 4, 2, 4, 6), "timestep": torch.tensor([937.5, 12.0]),
    "prompt": torch.randn(2, 5, 16), "prompt_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
}
with torch.no_grad():
    output = model(inputs["latents"], inputs["timestep"], inputs["prompt"][:, None],
                   prompt_mask=inputs["prompt_mask"][:, None])
save_file({**inputs, "output": output.contiguous()}, sys.argv[1] + "/inputs_and_output.safetensors")
save_file(model.state_dict(), sys.argv[1] + "/weights.safetensors")
'''


@pytest.mark.slow
def test_the_ported_predictor_computes_what_the_old_one_did(ported: Followed) -> None:
    reference = ported.folder / "mmzoo-plugin-short-dit/tests/reference"
    reference.mkdir()
    script = ported.folder / "before/reference.py"
    script.write_text(REFERENCE)
    done = subprocess.run(
        [sys.executable, script, reference], cwd=script.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(script.parent)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 passed" in ported.run("pytest mmzoo-plugin-short-dit/tests/test_parity.py")
    predictor = ported.folder / "mmzoo-plugin-short-dit/mm_plugin_short_dit/predictor.py"
    text = predictor.read_text()
    predictor.write_text(text.replace("* (1 + scale) + shift", "* (1 + scale)"))
    try:  # the comparison can fail
        assert "1 failed" in ported.run("pytest mmzoo-plugin-short-dit/tests/test_parity.py", 1)
    finally:
        predictor.write_text(text)


@pytest.mark.slow
def test_the_users_sharding_file_still_works(ported: Followed) -> None:
    """The old fsdp2.yaml, with its names of modules, trains the port on two ranks."""
    said = ported.run(
        f"mm train --mm-model short_dit.json --mm-data {TINY / 'data.json'} --fsdp2-config-path before/fsdp2.yaml "
        "--num-workers 0 --lr 1e-3 --train-iters 1 --nproc-per-node 2 --save runs/short"
    )
    assert "short_dit.json:7:9 warning" in said or "old spelling" in said
    config = json.loads((ported.folder / "runs/short/config.json").read_text())
    assert config["values"]["model"]["predictor"]["text_dim"] == 64
    (overwrite,) = config["overwrites"]
    assert (overwrite["path"], overwrite["new"]) == ("predictor.out_dim", 24)


# -- the contract page


@pytest.mark.parametrize(
    "block", [block for block in blocks(CONTRACT) if block.language == "python"], ids=lambda block: block.name
)
def test_the_code_of_the_contract_page_runs(block: Any, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(block.text)
    done = subprocess.run(
        [sys.executable, "code.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_contract_page_names_every_group_role_and_status() -> None:
    from mm_registry import GROUPS, ROLES, Status

    text = CONTRACT.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")}
    assert set(GROUPS) <= rows
    assert set(map(str, Status)) <= rows
    assert set(ROLES) - {"transformers_model"} <= rows


def test_the_facts_about_ids_on_the_contract_page_are_understood(tmp_path: Path) -> None:
    """The TOML of the page, as an installed distribution."""
    import tomllib

    from mm_registry import PluginManager, UnknownIdError

    (block,) = (b for b in blocks(CONTRACT) if "mm_core.aliases" in b.text and b.language == "toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    groups["mm_core.predictor_models"] = {"wandit": "module:Class"}
    info = tmp_path / "old-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in groups.items()
        )
    )
    manager = PluginManager([str(tmp_path)], environ={}, environment_file=None, project_folder=None)
    assert not manager.discover().diagnostics
    assert manager.resolve("mm_core.predictor_models", "wan_dit").id == "wandit"
    for id, said in {"wan_old": "0.3.2", "other_dit": "mmzoo-plugin-other"}.items():
        with pytest.raises(UnknownIdError, match=said):
            manager.resolve("mm_core.predictor_models", id)


def test_the_selection_of_the_contract_page_is_accepted(tmp_path: Path) -> None:
    from mm_registry.selection_files import read_layer

    (block,) = (b for b in blocks(CONTRACT) if "[plugins.prefer]" in b.text)
    path = tmp_path / "mmzoo.toml"
    path.write_text(block.text)
    layer = read_layer(path)
    assert layer.prefer == {"predictor/wandit": "mmzoo-plugin-wan22"}
    assert (layer.allow, layer.disable) == ({"mmzoo-plugin-wan22"}, {"mmzoo-plugin-haar"})


def test_the_trust_page_is_right_about_the_commands(tmp_path: Path) -> None:
    """Lock and verify as written there."""
    page = DOCS / "trust.md"
    environment = Environment.make(tmp_path / "venv")
    folder = tmp_path / "work"
    folder.mkdir()
    walk = follow(page, folder, environment)
    assert (folder / "mmzoo.lock").is_file()
    assert "as locked" in walk.outputs["mm plugin verify"]
