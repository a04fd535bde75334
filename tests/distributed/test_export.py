"""`--save-hf` in a run: weights go out as they came in, also after a resume; averages; adapters; another attempt at a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import distribute_tensor

from mm_core.config import load_training_job, parse_train_flags
from mm_core.config.findings import ConfigError
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.training.export import Exported, check_export, export, export_folder
from mm_core.weights import WeightsError, materialize
from mm_core.weights.peft_folder import save_peft_folder
from mm_core.weights.peft_names import adapter_names
from tests.distributed.harness import run_ranks
from tests.distributed.models import Composite
from tests.distributed.test_hf_round_trip import tensors_of
from tests.distributed.test_resume import trainer_of
from tests.distributed.tiny import POLICY, SIZES, TinyWan

pytestmark = pytest.mark.timeout(180)

WAN: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256, "num_layers": 4,
    "in_channels": 24, "out_channels": 24, "rope_max_seq_len": 64,
}  # fmt: skip


def test_a_run_writes_what_it_was_given_also_after_a_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = WanTransformer3DModel(**WAN).bfloat16()
    source.scale_shift_table.data = source.scale_shift_table.data.float()
    source.save_pretrained(tmp_path / "in", max_shard_size="1MB")
    before = tensors_of(tmp_path / "in")
    run = tmp_path / "run"
    flags = ("--save-hf", "--ema-decay", "0.5", "--no-async-save")

    def first() -> None:
        trainer = trainer_of(run, "--load", tmp_path / "in", *flags)
        trainer.export()  # of step 0
        trainer.save()

    def resumed() -> None:
        trainer = trainer_of(run, "--load", run, *flags)
        trainer.export()

    run_ranks(first, 2)
    folder = export_folder(run, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["predictor", "predictor-ema"]
    assert tensors_of(folder / "predictor") == tensors_of(folder / "predictor-ema") == before
    (folder / "predictor" / "older").touch()
    run_ranks(resumed, 1)
    assert tensors_of(folder / "predictor") == before
    assert not (folder / "predictor" / "older").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    again, info = WanTransformer3DModel.from_pretrained(folder / "predictor", output_loading_info=True)
    assert not info["missing_keys"]
    assert dict(again.config).items() >= WAN.items()


def test_what_is_whole_on_each_rank_is_written_once(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    run_ranks(
        lambda: export(tmp_path, 3, {"predictor": Exported(module, averages={"bias": torch.ones(2)})}), 2
    )
    folder = export_folder(tmp_path, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["predictor", "predictor-ema"]
    assert load_file(folder / "predictor-ema" / "diffusion_pytorch_model.safetensors")["bias"].tolist() == [
        1,
        1,
    ]


def test_it_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="needs --save: the folders are written into that of the run"):
        load_training_job(parse_train_flags(["--mm-model", "m", "--mm-data", "d", "--lr", "1", "--save-hf"]))


def test_a_failed_attempt_leaves_the_folder_before(tmp_path: Path) -> None:
    """One component is written, the other one cannot be: neither appears, and what was there stays."""

    good = Exported(nn.Linear(2, 2))
    final = export(tmp_path, 3, {"predictor": good})
    before = tensors_of(final / "predictor")
    bad = nn.Linear(2, 2)
    bad.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(WeightsError, match="a safetensors file cannot hold"):
        export(tmp_path, 3, {"predictor": Exported(nn.Linear(2, 2)), "other": Exported(bad)})
    assert tensors_of(final / "predictor") == before
    assert [path.name for path in final.parent.iterdir()] == [final.name]
    # Killed between the two renames: the one that was to be replaced is given back.
    final.rename(final.parent / f".tmp-replaced-{final.name}")
    export(tmp_path, 4, {"predictor": good})
    assert sorted(path.name for path in final.parent.iterdir()) == ["iter_0000003", "iter_0000004"]
    assert tensors_of(final / "predictor") == before


def test_a_place_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(WeightsError, match=r"iter_0000001 cannot be written \(File exists\)"):
        export(tmp_path, 1, {"predictor": Exported(nn.Linear(2, 2))})
    assert (tmp_path / "hf").read_text() == "a file"


def test_what_cannot_be_written_is_said_before_training() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(WeightsError, match=r"phases: a safetensors file cannot hold torch\.complex128"):
        check_export({"predictor": Exported(module)})


# -- PEFT adapters


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(3)
    # Another scale than the rank's, and random matrices: else the adapter would change nothing.
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
    )
    return model


def _prediction(model: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 4, 2, 8, 8, generator=g), torch.randn(1, 6, 32, generator=g)
    with torch.no_grad():
        output: torch.Tensor = model(video, torch.tensor([500.0]), text, return_dict=False)[0]
    return output


def test_a_trained_adapter_is_written_as_a_folder_of_peft(tmp_path: Path) -> None:
    """PEFT and diffusers load it into the bare model, and both compute what the trained one does."""
    from peft import PeftModel

    torch.manual_seed(0)
    bare = WanTransformer3DModel(**SIZES).eval()
    bare.save_pretrained(tmp_path / "base")
    trained = _with_lora(WanTransformer3DModel.from_pretrained(tmp_path / "base")).eval()
    expected = _prediction(trained)
    assert not torch.allclose(expected, _prediction(bare), atol=1e-3)
    state = trained.state_dict()

    def rank() -> None:
        with torch.device("meta"):
            model = Composite(_with_lora(TinyWan(**SIZES)), POLICY)
        model.fully_shard(None, Fsdp2Config())
        materialize(model.predictor, "cpu", 0, random_init=False)
        for name, tensor in model.predictor.state_dict(keep_vars=True).items():
            value = distribute_tensor(state[name], tensor.device_mesh, tensor.placements)
            tensor.data.to_local().copy_(value.to_local())
        export(tmp_path / "run", 7, {"predictor": Exported(model.predictor)})

    run_ranks(rank, 2)
    folder = export_folder(tmp_path / "run", 7) / "predictor"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 12
    by_peft = PeftModel.from_pretrained(WanTransformer3DModel.from_pretrained(tmp_path / "base"), folder)
    by_diffusers = WanTransformer3DModel.from_pretrained(tmp_path / "base")
    by_diffusers.load_lora_adapter(folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
    for model in (by_peft, by_diffusers):
        torch.testing.assert_close(_prediction(model.eval()), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_which_adapter(tmp_path: Path) -> None:
    model = WanTransformer3DModel(**SIZES)
    assert adapter_names(model) == []
    with pytest.raises(WeightsError, match="the module has no PEFT adapter"):
        save_peft_folder(model, tmp_path / "a")
    _with_lora(model)
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), adapter_name="second")
    with pytest.raises(
        WeightsError, match="adapter None: the module has 'default', 'second'; name one of them"
    ):
        save_peft_folder(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    export(tmp_path, 1, {"predictor": Exported(model)})
    folders = sorted(path.name for path in export_folder(tmp_path, 1).iterdir())
    assert folders == ["predictor-default", "predictor-second"]
    stored = load_file(export_folder(tmp_path, 1) / "predictor-second" / "adapter_model.safetensors")
    assert all(".to_v.lora_" in key and "second" not in key for key in stored)
