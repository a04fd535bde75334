"""A sharded module becomes a Hugging Face folder, and ranks that fail at it fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from mm_core.weights import load_hf_folder, save_hf_folder
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import SIZES, TinyWan, sharded, whole_tensors

pytestmark = pytest.mark.timeout(120)


class Prefix:
    """Upstream's names stand below `model.`."""

    def to_module(self, key: str) -> str:
        return key.removeprefix("model.")

    def to_folder(self, key: str) -> str:
        return f"model.{key}"

    def config_to_folder(self, fields: Any) -> Any:
        return dict(fields)

    def config_problems(self, config: Any, fields: Any) -> list[str]:
        return []


def stored(folder: Path) -> dict[str, Any]:
    return {k: v.numpy() for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["one-file", "several"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_folder_holds_the_whole_tensors_and_loads_anywhere(
    tmp_path: Path, world: int, limit: int
) -> None:
    folder = tmp_path / "w"

    def save() -> dict[str, Any]:
        model = sharded(seed=5)
        save_hf_folder(model.predictor, folder, Prefix(), dict(SIZES), max_file_bytes=limit)
        return {name: tensor.numpy() for name, tensor in whole_tensors(model).items()}

    whole = run_ranks(save, world)[0]
    found = stored(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1 or limit > 100_000
    assert found.keys() == {f"model.{name}" for name in whole}
    assert all((found[f"model.{name}"] == value).all() for name, value in whole.items())
    assert [path.name for path in tmp_path.iterdir()] == ["w"]

    plain = TinyWan(**SIZES)
    load_hf_folder(plain, folder, Prefix())
    assert all((value.numpy() == whole[name]).all() for name, value in plain.state_dict().items())

    def load() -> bool:
        model = sharded(seed=6)
        load_hf_folder(model.predictor, folder, Prefix())
        return all((tensor.numpy() == whole[name]).all() for name, tensor in whole_tensors(model).items())

    assert run_ranks(load, 2) == [True, True]


def test_ranks_fail_together(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "here").write_text("already")

    class Odd(Prefix):
        def to_folder(self, key: str) -> str:
            return "one" if dist.get_rank() == 1 else super().to_folder(key)

    def attempt(name: str, adapter: Any) -> str:
        try:
            save_hf_folder(sharded().predictor, tmp_path / name, adapter)
        except UserError as error:
            return str(error)
        return "written"

    messages = run_ranks(attempt, 2, "w", Prefix())
    assert messages[0] == messages[1]
    assert "exists already" in messages[0]
    messages = run_ranks(attempt, 2, "x", Odd())
    assert messages[0] == messages[1]
    assert "one name" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
