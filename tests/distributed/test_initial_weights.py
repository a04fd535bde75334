"""First values from the meta device, and Hugging Face folders, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, apply_plan, build_device_mesh, build_plan
from mm_core.weights import load_hf_folder, materialize
from mm_core.weights.tensors import state_tensors
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.tiny import SIZES, Composite, TinyWan, sharded, whole_tensors

pytestmark = pytest.mark.timeout(120)


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_same_seed_gives_the_same_whole_tensors(world):
    def build(seed: int, **fsdp2: Any) -> dict[str, Any]:
        return _arrays(whole_tensors(sharded(seed, **fsdp2)))

    one = run_ranks(build, 1, 0)[0]
    assert all(_same(result, one) for result in run_ranks(build, world, 0))
    assert _same(run_ranks(build, world, 0, sharding_size=1)[0], one)
    assert not _same(run_ranks(build, 1, 1)[0], one)


def test_values_are_distributed_as_upstreams_and_differ_between_blocks():
    torch.manual_seed(0)
    upstream = TinyWan(**SIZES).state_dict()
    ours = run_ranks(lambda: _arrays(whole_tensors(sharded())), 2)[0]
    assert ours.keys() == upstream.keys()
    for name, value in upstream.items():
        assert ours[name].shape == tuple(value.shape)
        assert ours[name].std() == pytest.approx(value.std().item(), rel=0.25, abs=1e-6), name
    first, second = (ours[f"blocks.{i}.attn1.to_q.weight"] for i in (0, 1))
    assert (first != second).any()


def test_rope_tables_are_those_of_a_normal_build():
    reference = TinyWan(**SIZES)

    def tables() -> dict[str, Any]:
        return _arrays(dict(sharded().predictor.named_buffers()))

    built = run_ranks(tables, 2)[1]
    assert _same(built, _arrays(dict(reference.named_buffers())))


def test_a_shard_and_one_module_is_all_that_a_rank_allocates():
    sizes: list[int] = []

    class Watched(nn.Linear):
        def reset_parameters(self) -> None:
            sizes.append(sum(p.numel() for p in self.parameters()))
            super().reset_parameters()

    def run() -> tuple[int, int]:
        with torch.device("meta"):
            model = nn.Sequential(*(Watched(8, 8) for _ in range(4)))
        sizes.clear()
        config = Fsdp2Config()
        apply_plan(
            model, build_plan(model, ShardingPolicy(units=("{*}",)), config, ""), build_device_mesh(config)
        )
        materialize(model, "cpu", 0)
        return max(sizes), sum(p.to_local().numel() for p in model.parameters())

    assert run_ranks(run, 2) == [(72, 144), (72, 144)]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers writes it, in several shards."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(3)
    TinyWan(**SIZES).save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def _load(folder: Path, **fsdp2: Any) -> tuple[dict[str, Any], dict[str, str]]:
    model = Composite()
    model.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(model.predictor, "cpu", 0, random_init=False)
    load_hf_folder(model.predictor, folder)
    return _arrays(whole_tensors(model)), {n: str(t.dtype) for n, t in state_tensors(model.predictor).items()}


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_model_loads_what_from_pretrained_loads(world, hf_folder):
    class Upstream(TinyWan):
        _keep_in_fp32_modules = None  # with it, diffusers' loader asks for the accelerate package

    reference = _arrays(Upstream.from_pretrained(hf_folder).state_dict())
    for values, _ in run_ranks(_load, world, hf_folder, recompute_modules=("predictor.blocks.{*}",)):
        assert _same(values, reference)


def test_a_bf16_file_becomes_fp32_weights(hf_folder, tmp_path):
    whole = {k: v for file in hf_folder.glob("*.safetensors") for k, v in load_file(file).items()}
    save_file({k: v.bfloat16() for k, v in whole.items()}, tmp_path / "model.safetensors")
    values, dtypes = run_ranks(_load, 2, tmp_path)[0]
    assert set(dtypes.values()) == {"torch.float32"}
    assert _same(values, {k: v.bfloat16().float().numpy() for k, v in whole.items()})


def test_ranks_raise_together_when_one_cannot_read(hf_folder):
    def run() -> str:
        import torch.distributed as dist

        from mm_registry.errors import UserError

        model = sharded()
        folder = hf_folder if dist.get_rank() == 0 else hf_folder / "absent"
        try:
            load_hf_folder(model.predictor, folder)
        except UserError as error:
            return str(error)
        return "loaded"

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1]
    assert "no such folder of weights" in messages[0]


def test_an_uninitialised_load_is_an_error_not_garbage(hf_folder):
    def run() -> None:
        model = Composite()
        model.fully_shard(None, None)
        load_hf_folder(model.predictor, hf_folder)

    with pytest.raises(RankError, match=r"call materialize\(\) first"):
        run_ranks(run, 2)


def test_each_rank_reads_only_its_rows(hf_folder):
    index = json.loads(next(hf_folder.glob("*.index.json")).read_text())
    total = index["metadata"]["total_size"]

    def run() -> int:
        import logging

        lines: list[str] = []

        class Lines(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(record.getMessage())

        handler = Lines()
        logger = logging.getLogger("mm_core.weights.hf_folder")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        model = sharded()
        load_hf_folder(model.predictor, hf_folder)
        return int(float(lines[0].split()[1]) * 1e6)  # "read 0.3 MB of …"

    read = run_ranks(run, 2)
    assert sum(read) == pytest.approx(total, rel=0.1)
    assert max(read) < 0.6 * total


def test_tied_weights_are_one_tensor_in_a_sharded_model():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    def run() -> tuple[list[Any], bool, int]:
        with torch.device("meta"):
            model = Tied()
        config = Fsdp2Config()
        apply_plan(model, build_plan(model, ShardingPolicy(), config, ""), build_device_mesh(config))
        materialize(model, "cpu", 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = [t.detach() for t in model.state_dict().values()]
        values = [getattr(t, "full_tensor", lambda t=t: t)() for t in whole]
        return values[0].tolist(), torch.equal(values[0], values[1]), len(list(model.parameters()))

    one, two = run_ranks(run, 1)[0], run_ranks(run, 2)[0]
    assert one[1:] == two[1:] == (True, 1)
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(two[0]))
