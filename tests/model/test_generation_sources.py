"""`generate` with images, with adapters, from a run of both experts, again from a video's record, and on several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN

from mm_core.cli.main import main
from mm_core.config import ConfigError, load_generation_job
from mm_core.config.lora import LoraConfig
from mm_core.generation import generate
from mm_core.generation.build import build_pipeline
from mm_core.generation.video import psnr, read_video
from mm_core.models.lora import add_lora
from mm_core.weights import materialize, save_checkpoint
from mm_core.weights.peft_folder import save_peft_folder
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError

CPU = torch.device("cpu")
STATE = {"step": 7, "consumed_samples": 7, "seed": 0}


@pytest.fixture
def write_file(tmp_path: Path, tokenizer_folder: Path) -> Any:
    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "pipeline_class": "WanPipeline",
            "prompt": ["a red ball", "two cats"],
            "save_path": str(tmp_path / "out"),
            "fps": 8,
            "pipeline_config": {"input_size": [5, 32, 48], "seed": 3},
            "predictor": {"model_id": "wandit", "init": "random", **TINY_WAN},
            "ae": {"model_id": "wan_video_vae", "init": "random", **TINY_VAE},
            "text_encoder": {"model_id": "UMT5", "init": "random", "config": TINY_T5},
            "tokenizer": {"from_pretrained": str(tokenizer_folder), "model_max_length": 16},
            "diffusion": {
                "model_id": "FlowMatchEulerDiscreteScheduler",
                "num_inference_steps": 2,
                "guidance_scale": 2.0,
            },
        }
        for key, value in changes.items():
            partial = isinstance(value, dict) and "model_id" not in value
            content[key] = {**content.get(key, {}), **value} if partial else value
        path = tmp_path / "inference_model.json"
        path.write_text(json.dumps(content))
        return path

    return write


def picture(path: Path, seed: int, size: tuple[int, int] = (32, 48)) -> str:
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    waves = [np.sin((x * a + y * b) / (5 + seed)) for a, b in ((1, 0), (0, 1), (1, 1))]
    Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).round().astype(np.uint8)).save(path)
    return str(path)


def weights(path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, str]]:
    job = load_generation_job(path, {"load": options.pop("load", None)})
    pipeline, sources = build_pipeline(job, device=CPU, seed=0, **options)
    assert not any(p.requires_grad for p in pipeline.model.parameters())
    experts = {name: getattr(pipeline.model, name) for name in ("predictor", "low_noise_predictor")}
    return {name: m.state_dict() for name, m in experts.items() if m is not None}, sources


@pytest.mark.timeout(60)
def test_images_of_a_file_or_of_the_command_line(write_file: Any, tmp_path: Path) -> None:
    first, second = (picture(tmp_path / f"{n}.png", n) for n in (1, 2))
    (tmp_path / "images.txt").write_text(f"{first}\n\n{second}\n")
    path = write_file(
        predictor={"model_type": "wan2.2-i2v", "in_dim": 36}, image=str(tmp_path / "images.txt"), task="i2v"
    )
    together = generate(load_generation_job(path), save_path=tmp_path / "a", batch_size=2)
    record = json.loads(together[1].with_suffix(".json").read_text())
    assert record["image"]["path"] == second
    assert record["last_image"] is None
    # One image serves all prompts; one prompt all images.
    one = load_generation_job(path, {"image": second})
    assert one.images.first == (second, second)
    alone = generate(one, save_path=tmp_path / "b")
    same = psnr(
        read_video(alone[1]), read_video(together[1])
    )  # not infinite: another batch, another rounding
    assert same > 45
    assert psnr(read_video(alone[0]), read_video(together[0])) < same - 5
    assert load_generation_job(path, {"prompt": "a red ball"}).prompts == ("a red ball",) * 2
    # The first frame's shape decides, in two sizes here: they are made one after the other.
    tall = picture(tmp_path / "tall.png", 1, (60, 30))
    path = write_file(predictor={"model_type": "ti2v"}, image=[first, tall], max_hxw=32 * 48)
    videos = generate(load_generation_job(path), save_path=tmp_path / "c", batch_size=2)
    assert [read_video(video).shape[1:3] for video in videos] == [(32, 48), (48, 16)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": "1.png"},
            '"image" is given, but predictor (wandit) of model_type t2v takes no first frame',
        ),
        ({"predictor": {"model_type": "wan2.2-i2v", "in_dim": 36}}, "needs a first frame. Add --image FILE"),
        (
            {"predictor": {"model_type": "ti2v"}, "image": "non.png"},
            'image is "non.png": there is no such file',
        ),
        ({"predictor": {"model_type": "ti2v"}, "image": ["1.png"] * 3}, "there are 2 prompts for 3 images"),
        ({"predictor": {"model_type": "ti2v"}, "task": "i2v"}, '"task" is "i2v", but no image is given'),
        (
            {"predictor": {"model_type": "ti2v"}, "last_image": "1.png"},
            '"last_image" is given without "image"',
        ),
        ({"predictor": {"model_type": "ti2v"}, "dual_image": ["1.png", "1.png"]}, "takes no last frame"),
        ({"predictor": {"model_type": "ti2v"}, "dual_image": ["1.png"]}, "not a first and a last frame"),
        (
            {"predictor": {"model_type": "ti2v"}, "image": "list.txt"},
            'list.txt, which image names, has "no.png"',
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(
    write_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "1.png", 1)
    (tmp_path / "list.txt").write_text("1.png\nno.png\n")
    with pytest.raises(ConfigError) as caught:
        load_generation_job(write_file(**changes))
    assert message in str(caught.value)


def test_pairs_of_images(write_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in (1, 2, 3):
        picture(tmp_path / f"{n}.png", n)
    (tmp_path / "pairs.txt").write_text("1.png, 2.png\n2.png,3.png\n")
    kind = {"model_type": "wan2.2-i2v", "in_dim": 36}
    for pairs, expected in (
        (["1.png", "2.png"], (("1.png", "1.png"), ("2.png", "2.png"))),
        ([["1.png", "2.png"], ["2.png", "3.png"]], (("1.png", "2.png"), ("2.png", "3.png"))),
        ("pairs.txt", (("1.png", "2.png"), ("2.png", "3.png"))),
    ):
        images = load_generation_job(write_file(predictor=kind, dual_image=pairs)).images
        assert (images.first, images.last) == expected


def test_a_run_of_both_experts_or_two_runs(write_file: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    high, low = WanDiT(**TINY_WAN), WanDiT(**TINY_WAN)
    save_checkpoint(tmp_path / "both", 7, {"predictor": high, "low_noise_predictor": low}, None, STATE)
    save_checkpoint(tmp_path / "low", 7, {"predictor": low}, None, STATE)
    high.save_pretrained(tmp_path / "high")
    section = {"model_id": "wandit", **TINY_WAN}
    path = write_file(predictor=section, low_noise_predictor=section, boundary_ratio=0.8)
    for load in (str(tmp_path / "both"), [str(tmp_path / "high"), str(tmp_path / "low")]):
        state, _ = weights(path, load=load)
        for name, module in (("predictor", high), ("low_noise_predictor", low)):
            assert all(torch.equal(value, state[name][key]) for key, value in module.state_dict().items())
    with pytest.raises(UserError, match="low_noise_predictor: no weights"):
        weights(path, load=str(tmp_path / "low"))
    with pytest.raises(ConfigError, match="there is no such folder or file"):
        weights(path, load=[str(tmp_path / "high"), str(tmp_path / "lwo")])
    path = write_file(predictor=section)
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k[:3] not in ("low", "bou")})
    )
    with pytest.raises(UserError, match="trained with both experts, and the inference file has one"):
        weights(path, load=str(tmp_path / "both"))
    with pytest.raises(UserError, match="--lora-load names 2 places"):
        weights(path, load=str(tmp_path / "high"), lora=("a", "b"))


def test_adapters_are_merged_from_a_folder_and_from_a_run(write_file: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    base = WanDiT(**TINY_WAN)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=("attn1.to_q", "ffn.net.2"), rank=4, alpha=8.0)
    adapted = WanDiT(**TINY_WAN)
    adapted.load_state_dict(base.state_dict())
    add_lora(adapted, config, name="predictor")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_peft_folder(adapted, tmp_path / "adapter")
    section = {"model_id": "wandit", "from_pretrained": str(tmp_path / "base"), **TINY_WAN}
    told = {**config.as_json(), "component": "predictor", "base": {"path": str(tmp_path / "base")}}
    state = {**STATE, "lora": told, "config": {"values": {"model": {"predictor": section}}}}
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    save_checkpoint(tmp_path / "run", 7, {"predictor": adapted}, None, state)
    layer = adapted.get_submodule("blocks.0.attn1.to_q")
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = base.blocks[0].attn1.to_q.weight + delta
    path = write_file(predictor=section)
    for options in (
        {"lora": [str(tmp_path / "adapter")]},
        {"lora": [str(tmp_path / "run")]},
        {"load": str(tmp_path / "run")},
    ):
        found, sources = weights(path, **options)
        assert (found["predictor"]["blocks.0.attn1.to_q.weight"] - expected).abs().max() < 1e-6
        assert torch.equal(found["predictor"]["blocks.0.attn1.to_k.weight"], base.blocks[0].attn1.to_k.weight)
        assert ("predictor lora" in sources) == ("lora" in options)
    # Under an adapter of random weights lie those that its run drew.
    told["base"] = None
    save_checkpoint(tmp_path / "drawn", 7, {"predictor": adapted}, None, {**state, "seed": 5})
    del section["from_pretrained"]
    with pytest.raises(UserError, match="holds an adapter of random weights"):
        weights(write_file(predictor=section), load=str(tmp_path / "drawn"))
    found, _ = weights(write_file(predictor={**section, "init": "random"}), load=str(tmp_path / "drawn"))
    with torch.device("meta"):
        drawn = WanDiT(**TINY_WAN)
    materialize(drawn, "cpu", 5)
    difference = found["predictor"]["blocks.0.attn1.to_q.weight"] - drawn.blocks[0].attn1.to_q.weight
    assert (difference - delta).abs().max() < 1e-6


@pytest.mark.timeout(60)
def test_a_record_makes_the_same_video_again(
    write_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [picture(tmp_path / f"{n}.png", n) for n in (1, 2)]
    path = write_file(predictor={"model_type": "ti2v"}, image=images)
    line = ["--mm-model", str(path), "--seed", "5", "--num-inference-steps", "1", "--guidance-scale", "1.5"]
    assert main(["generate", *line]) == 0
    video = Path(capsys.readouterr().out.splitlines()[1])
    assert main(["generate", "--repeat", str(video.with_suffix(".json"))]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again.parent == video.parent
    assert again != video
    assert again.read_bytes() == video.read_bytes()
    old, new = (json.loads(each.with_suffix(".json").read_text()) for each in (video, again))
    assert {k for k in old if old[k] != new[k]} <= {"video", "config", "inference_file"}
    assert main(["generate", "--repeat", str(video.with_suffix(".json")), "--seed", "0"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() != video.read_bytes()
    picture(tmp_path / "2.png", 3)
    assert main(["generate", "--repeat", str(video.with_suffix(".json"))]) == 2
    assert "has changed since" in capsys.readouterr().err
    assert main(["generate", "--repeat", str(path)]) == 2
    assert "is no record of a video" in capsys.readouterr().err
