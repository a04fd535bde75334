"""Several ranks under torchrun that do not see the same plugins, or do not read the same files."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ENVIRONMENT, ROOT, Job, edited

pytestmark = pytest.mark.timeout(300)

WAN, HAAR = (f"{name} {version(name)}" for name in ("mmzoo-plugin-wan22", "mmzoo-plugin-haar"))


def torchrun(folder: Path, on_rank_1: str, *flags: str | Path) -> list[dict[str, Any]]:
    """Run `mm train` on two ranks, with `on_rank_1` done in the second one before it starts, and return how each
    ended: `code`, `out` and `modules`.
    """
    script = folder / "rank.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            rank = os.environ["RANK"]
            if rank == "1":
                {on_rank_1}
            os.execv(sys.executable, [sys.executable, "-c", {command!r}, *sys.argv[1:]])
            """
        ).format(
            on_rank_1=on_rank_1,
            # The exit code and the output of each rank are kept beside the script: torchrun's are of all together.
            command=(
                "import os, sys\n"
                f"place = {str(folder)!r} + '/' + os.environ['RANK']\n"
                "output = os.open(place + '.out', os.O_WRONLY | os.O_CREAT)\n"
                "os.dup2(output, 1); os.dup2(output, 2)\n"
                "leave = os._exit\n"
                "def note(code):\n"
                "    open(place + '.code', 'w').write(str(code))\n"
                "    open(place + '.modules', 'w').write(' '.join(sys.modules))\n"
                "    leave(code)\n"
                "os._exit = note\n"
                "from mm_core.cli.main import run\n"
                "try:\n    run()\n"
                "except SystemExit as end:\n    note(end.code)\n"
            ),
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "train",
         *Job().flags("--train-iters", "1", "--save", folder / "run", "--distributed-timeout-minutes", "1", *flags)],
        cwd=ROOT, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0, done.stderr
    ranks = []
    for rank in "01":
        files = {what: folder / f"{rank}.{what}" for what in ("code", "out", "modules")}
        assert files["code"].exists(), f"rank {rank} was ended by another: {files['out'].read_text()}"
        ranks.append({what: file.read_text() for what, file in files.items()})
    return ranks


def test_ranks_with_other_plugins_fail_before_anything_is_built(tmp_path: Path) -> None:
    ranks = torchrun(tmp_path, 'os.environ["MM_PLUGINS"] = "mmzoo-plugin-wan22"')
    for ended in ranks:
        assert ended["code"] == "2", ended["out"]
        assert "the ranks do not see the same plugins" in ended["out"]
        assert "rank 1 differs from rank 0: " in ended["out"]
        assert f"{HAAR} is missing on rank 1" in ended["out"]
        assert "Traceback" not in ended["out"]
        # Not one target of a plugin was imported, so nothing can have been built.
        assert not {"mm_plugin_wan22.predictor", "mm_plugin_wan22.config"} & set(ended["modules"].split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_where_the_jobs_plugin_is_missing_is_told_that_first(tmp_path: Path) -> None:
    """Not "no installed distribution offers wandit", which would be true as well."""
    ranks = torchrun(tmp_path, 'os.environ["MM_PLUGINS"] = "mmzoo-plugin-haar"')
    for ended in ranks:
        assert ended["code"] == "2"
        assert f"{WAN} is missing on rank 1" in ended["out"]
        assert "model.json" not in ended["out"]


@pytest.mark.slow
def test_another_version_of_a_plugin_on_one_rank(tmp_path: Path) -> None:
    """A second copy of the metadata, found first by rank 1."""
    info = tmp_path / "other" / "mmzoo_plugin_haar-0.0.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: mmzoo-plugin-haar\nVersion: 0.0.7\n")
    (info / "entry_points.txt").write_text(
        "[mm_core.ae_models]\nhaar_video = mm_plugin_haar.autoencoder:HaarVideoAutoencoder\n"
    )
    before = os.environ.get("PYTHONPATH", "")
    ranks = torchrun(tmp_path, f'os.environ["PYTHONPATH"] = {f"{info.parent}{os.pathsep}{before}"!r}')
    for ended in ranks:
        assert ended["code"] == "2"
        assert (
            f"mmzoo-plugin-haar is 0.0.7 on rank 1 and {version('mmzoo-plugin-haar')} on rank 0"
            in ended["out"]
        )


@pytest.mark.slow
def test_a_mistake_in_one_ranks_files_ends_all_with_its_words(tmp_path: Path) -> None:
    bad = edited(Job().model, tmp_path / "model.json", lambda text: text.replace('"wandit"', '"wandti"', 1))
    zero, one = torchrun(tmp_path, f'sys.argv += ["--mm-model", {str(bad)!r}]')
    assert (zero["code"], one["code"]) == ("2", "2")
    assert f"error (rank 1): {bad}" in one["out"]
    assert f"error: rank 1: {bad}" in zero["out"]
    assert "wandti" in zero["out"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_that_read_other_values(tmp_path: Path) -> None:
    ranks = torchrun(tmp_path, 'sys.argv += ["--weight-decay", "0.5"]')
    for ended in ranks:
        assert ended["code"] == "2"
        assert "ranks [1] read another configuration than rank 0" in ended["out"]
    assert "mm_plugin_wan22.predictor" in ranks[0]["modules"], (
        "by then, the first rank of the machine had built the model on the meta device"
    )
    assert not (tmp_path / "run").exists()
