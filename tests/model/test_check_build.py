"""`mm check --build`: models on the meta device, patterns, and folders of weights by their headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_core.cli import check as command
from mm_core.config import load_training_job, parse_train_flags
from mm_core.config.json_reader import parse_json
from mm_core.models.factory import build_component

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny"
DATA = TINY / "wan22-vae/data.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they are published: `transformer`, `vae` and `text_encoder`, of the tiny job's networks."""
    folder = tmp_path_factory.mktemp("published")
    files = ["--mm-model", str(TINY / "wan22-vae/model.json"), "--mm-data", str(DATA)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        job = load_training_job(parse_train_flags([*files, "--train-iters", "1", "--lr", "1"]))
    for role, name in (("ae", "vae"), ("text_encoder", "text_encoder")):
        build_component(job.components[role]).model.save_pretrained(folder / name)
    predictor = build_component(job.components["predictor"])
    (folder / "transformer").mkdir()
    state = {key: tensor.contiguous() for key, tensor in predictor.state_dict().items()}
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def job(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file whose components name copies of the published folders, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for folder in published.iterdir():
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name / file.name).write_bytes(file.read_bytes())
    model = parse_json((TINY / "wan22-vae/model.json").read_text(), "model.json").data
    assert isinstance(model, dict)
    for section, name in (("predictor", "transformer"), ("ae", "vae"), ("text_encoder", "text_encoder")):
        model[section]["from_pretrained"] = name
        del model[section]["init"]
    for key in ("base_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample"):
        del model["ae"][key]
    del model["text_encoder"]["config"]
    return write(tmp_path / "model.json", model)


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, indent=2))
    return path


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def run(*words: str | Path) -> tuple[int, list[str]]:
        code = command.run([*map(str, words), "--build"])
        return code, capsys.readouterr().out.splitlines()

    return run


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    write(path, data)


def weights(folder: str) -> Path:
    (file,) = Path(folder).glob("*.safetensors")
    return file


def restored(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def test_what_fits_is_said(job: Path, check: Any) -> None:
    code, lines = check("model.json")
    assert code == 0
    assert lines[:4] == [
        "predictor (wandit): 123 tensors, 963776 parameters, 4 units; fits transformer (123 tensors in 1 file, 3.9 MB)",
        "ae (wan_video_vae): 146 tensors, 220107 parameters; fits vae (146 tensors in 1 file, 880.4 kB)",
        "text_encoder (UMT5): 23 tensors, 126144 parameters; fits text_encoder (22 tensors in 1 file, 504.6 kB)",
        "predictor: whole sizes, since --nproc-per-node does not say how many ranks there are",
    ]
    assert any("predictor.blocks.0-3 ×4" in line for line in lines[4:]), "the table of units"
    assert lines[-1] == "nothing to say: no errors, warnings or notes"


def test_no_tensor_is_read(job: Path, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all tensors are spoilt, and nobody notices: only headers are looked at."""
    for name in ("transformer", "vae", "text_encoder"):
        file = weights(name)
        raw = file.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        file.write_bytes(raw[:start])
        with open(file, "r+b") as out:
            out.truncate(len(raw))  # a hole of zeros
    assert check("model.json")[0] == 0


SPOILT: list[tuple[str, Callable[[], object], str]] = [
    ("wrong shape", lambda: restored(weights("transformer"), lambda s: s.update({"blocks.1.ffn.net.2.bias": torch.ones(3)})),
     'model.json:30:24 error: transformer has 1 tensor of another shape than predictor (wandit): blocks.1.ffn.net.2.bias is '
     '[3], and [128] in the model'),
    ("missing and unexpected",
     lambda: restored(weights("transformer"), lambda s: s.update({"proj_outt.bias": s.pop("proj_out.bias")})),
     "model.json:30:24 error: transformer lacks 1 of the 123 tensors of predictor (wandit): proj_out.bias\n"
     "model.json:30:24 error: transformer has 1 tensor that predictor (wandit) has not: proj_outt.bias (closest missing: "
     "proj_out.bias)"),
    ("many missing",
     lambda: restored(weights("transformer"), lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.3")]),
     "model.json:30:24 error: transformer lacks 27 of the 123 tensors of predictor (wandit): blocks.3.attn1.norm_k.weight; "
     "blocks.3.attn1.norm_q.weight; blocks.3.attn1.to_k.bias; and 24 more"),
    ("ae", lambda: restored(weights("vae"), lambda s: s.pop("quant_conv.bias")),
     "model.json:39:24 error: vae lacks 1 of the 146 tensors of AutoencoderKLWan: quant_conv.bias"),
    ("text encoder",
     lambda: restored(weights("text_encoder"), lambda s: s.update({"encoder.final_layer_norm.weight": torch.ones(5)})),
     "model.json:44:24 error: text_encoder has 1 tensor of another shape than UMT5EncoderModel: "
     "encoder.final_layer_norm.weight is [5], and [64] in the model"),
    ("another network", lambda: edit(Path("model.json"), lambda m: m["ae"].update(num_res_blocks=3)),
     "wan_video_vae: the ae section contradicts its pretrained folder: num_res_blocks 3 (the folder has 1); remove these keys"),
    ("no config.json", lambda: Path("text_encoder/config.json").rename("gone.json"),
     "model.json:44:24 error: text_encoder: 'text_encoder' has no config.json"),
    ("missing shard", lambda: write(
        Path("transformer/model.safetensors.index.json"), {"weight_map": {"a": "part-1.safetensors"}}),
     "model.json:30:24 error: transformer/model.safetensors.index.json names 1 missing files: part-1.safetensors; the "
     "download is incomplete"),
    ("outside", lambda: write(
        Path("transformer/model.safetensors.index.json"), {"weight_map": {"a": "../model.safetensors"}}),
     "model.json:30:24 error: transformer/model.safetensors.index.json: '../model.safetensors' points outside the folder"),
    ("cut off", lambda: weights("vae").write_bytes(weights("vae").read_bytes()[:-100]),
     "model.json:39:24 error: vae/diffusion_pytorch_model.safetensors was cut off: 100 of its 880428 bytes of tensors are "
     "missing; fetch it again"),
    ("cut in the header", lambda: weights("vae").write_bytes(weights("vae").read_bytes()[:1000]),
     "vae/diffusion_pytorch_model.safetensors is no safetensors file, or was cut off: its header would have"),
    ("absurd length", lambda: weights("transformer").write_bytes(b"\xff" * 64),
     "model.json:30:24 error: transformer/diffusion_pytorch_model.safetensors is no safetensors file, or was cut off: its "
     "header would have 18446744073709551615 bytes, but only 56 follow"),
    ("git lfs", lambda: weights("transformer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
     "model.json:30:24 error: transformer/diffusion_pytorch_model.safetensors is no safetensors file, or was cut off"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "expected"), [case[1:] for case in SPOILT], ids=[case[0] for case in SPOILT]
)
def test_spoilt_weights(job: Path, check: Any, spoil: Callable[[], object], expected: str) -> None:
    spoil()
    code, lines = check("model.json")
    assert code == 2
    text = "\n".join(lines)
    assert expected in text
    assert text.count(" error: ") == expected.count("\n") + 1  # one cause is one finding


def test_a_missing_folder_is_the_ordinary_finding(job: Path, check: Any) -> None:
    edit(
        job, lambda m: (m["predictor"].update(from_pretrained="none"), m["ae"].update(from_pretrained="none"))
    )
    code, lines = check("model.json")
    assert code == 0
    assert [line for line in lines if "none" in line] == [
        "ae (wan_video_vae): not built, there is no folder none",
        'model.json:30:24 note: predictor.from_pretrained is "none": there is no such folder (seen from the working '
        "directory). Nothing in " + f"{Path.cwd()} has a similar name",
        'model.json:39:24 note: ae.from_pretrained is "none": there is no such folder (seen from the working directory). '
        f"Nothing in {Path.cwd()} has a similar name",
    ]


def test_fields_that_the_model_refuses(job: Path, check: Any) -> None:
    edit(job, lambda m: m["text_encoder"].update(config={"d_model": 64}))
    code, lines = check("model.json")
    assert code == 2
    assert any(
        "config describes a random network, but from_pretrained brings its own" in line for line in lines
    )


def test_patterns_of_a_sharding_file(job: Path, check: Any) -> None:
    Path("fsdp2.yaml").write_text("sub_modules_to_wrap:\n  - predictor.bloks.{*}\n")
    expected = 'fsdp2.yaml:2:5 error: sub_modules_to_wrap: "predictor.bloks.{*}" matches no module'
    for words in (
        ["model.json", "fsdp2.yaml"],
        ["--mm-model", "model.json", "--fsdp2-config-path", "fsdp2.yaml"],
    ):
        code, lines = check(*words)
        assert code == 2
        assert next(line for line in lines if " error: " in line).startswith(expected)
    Path("fsdp2.yaml").write_text("sub_modules_to_wrap:\n  - predictor.blocks.{0-1}\n")
    code, lines = check("model.json", "fsdp2.yaml")
    assert code == 0
    assert "963776 parameters, 2 units" in lines[0]


def test_the_weights_of_load(job: Path, check: Any) -> None:
    restored(weights("transformer"), lambda state: state.pop("proj_out.bias"))
    edit(job, lambda m: m["predictor"].pop("from_pretrained"))
    code, lines = check("--mm-model", "model.json", "--load", "transformer")
    assert code == 2
    (error,) = (line for line in lines if " error: " in line)
    assert (
        error == "--load error: transformer lacks 1 of the 123 tensors of predictor (wandit): proj_out.bias"
    )
    Path("run/checkpoints").mkdir(parents=True)
    code, lines = check("--mm-model", "model.json", "--load", "run")
    (error,) = (line for line in lines if " error: " in line)
    assert error.startswith("--load error: ")
    assert code == 2


def test_an_inference_file_with_two_experts(job: Path, check: Any) -> None:
    model = json.loads(job.read_text())
    sample = parse_json((TINY / "wan22-vae/inference_model.json").read_text(), "x").data
    assert isinstance(sample, dict)
    sample |= {key: model[key] for key in ("predictor", "ae", "text_encoder")}
    sample |= {"boundary_ratio": 0.875, "low_noise_predictor": "second", "prompt": "a cat"}
    sample["tokenizer"]["from_pretrained"] = str(ROOT / sample["tokenizer"]["from_pretrained"])
    Path("second").mkdir()
    (Path("second") / "model.safetensors").write_bytes(weights("transformer").read_bytes())
    restored(weights("second"), lambda state: state.pop("proj_out.bias"))
    write(Path("sample.json"), sample)
    code, lines = check("sample.json")
    assert code == 2
    assert lines[0].startswith("predictor (wandit): 123 tensors, 963776 parameters; fits transformer")
    assert lines[1].startswith(
        "low_noise_predictor (wandit): 123 tensors, 963776 parameters; does not fit second"
    )
    (error,) = (line for line in lines if " error: " in line)
    assert "second lacks 1 of the 123 tensors of low_noise_predictor (wandit): proj_out.bias" in error


def test_json_has_findings_only(job: Path, check: Any) -> None:
    restored(weights("transformer"), lambda state: state.pop("proj_out.bias"))
    code, lines = check("model.json", "--format", "json")
    data = json.loads("\n".join(lines))
    assert code == 2
    assert list(data) == ["findings", "sharding"]
    (finding,) = data["findings"]
    assert finding["level"] == "error"
    assert finding["code"] == "weights"
    assert (finding["file"], finding["line"], finding["column"]) == ("model.json", 30, 24)
    assert finding["path"] == "predictor.from_pretrained"


def test_a_section_with_an_error_is_not_built(job: Path, check: Any) -> None:
    edit(job, lambda m: m["predictor"].update(num_heads=7))
    code, lines = check("model.json")
    assert code == 2
    assert not any(line.startswith("predictor") for line in lines)
    assert sum(" error: " in line for line in lines) == 1


def test_a_job_file_with_an_override(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        f"model: {TINY / 'wan22-t2v/model.json'}",
        "fsdp2:",
        "  sub_modules_to_wrap: ['predictor.bloks.{*}']",
    ]
    Path("job.yaml").write_text("\n".join([*lines, "gpt_args: {lr: 1e-4}", ""]))
    for words in (["job.yaml"], ["job.yaml", "model.predictor.num_layers=2"]):
        code, told = check(*words)
        assert code == 2
        assert told[0].startswith(f"predictor (wandit): {123 if len(words) == 1 else 69} tensors")
        assert told[1] == "ae (haar_video): 0 tensors, 0 parameters"
        assert any(line.startswith("job.yaml:3:25 error: sub_modules_to_wrap") for line in told)


def test_what_has_nothing_to_build_is_said(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, lines = check(TINY / "wan22-t2v/data.json")
    assert code == 0
    assert lines[0] == f"{TINY / 'wan22-t2v/data.json'}: a data file has nothing to build"
