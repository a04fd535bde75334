"""A training job: good ones load, and everything wrong with bad ones is said at once, at its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_core import CALLBACK_MAPPINGS
from mm_core.config import ConfigError, load_training_job
from mm_core.config.file_check import check_file

Spoil = Callable[[Any], Any]  # changes the files of a job; see conftest


def test_a_classic_job_loads(files: Any) -> None:
    job = load_training_job(files.flags("--nproc-per-node", "2", "--global-batch-size", "4"))
    assert set(job.components) == {"diffusion", "predictor", "ae", "text_encoder", "dataset", "task"}
    predictor = job.components["predictor"]
    assert (predictor.spec.distribution, predictor.dtype, predictor.path) == (
        "mmzoo-plugin-wan22",
        "bf16",
        ("predictor",),
    )
    assert predictor.fields["num_layers"] == 40
    assert predictor.fields["pipeline_num_layers"] == [10, 10, 10, 10]
    assert not {"model_id", "dtype", "use_fused_rmsnorm"} & set(predictor.fields)
    assert job.components["ae"].from_pretrained == "weights/vae"
    assert job.components["dataset"].fields["preprocess_parameters"]["num_frames"] == 49
    assert (job.fsdp2.param_dtype, job.fsdp2.sharding_size, job.flags.global_batch_size) == (
        "bf16",
        "auto",
        4,
    )
    assert {finding.level for finding in job.findings} == {"note"}
    assert ("mmzoo-plugin-wan22", "0.1.0") in job.plugins


def test_resolved_has_every_value_with_its_origin(files: Any) -> None:
    resolved = json.loads(json.dumps(load_training_job(files.flags("--seed", "7")).resolved()))
    values, origins = resolved["values"], resolved["origins"]
    assert values["model"]["predictor"]["num_layers"] == 40
    assert values["model"]["diffusion"]["sigma_max"] == 1.0
    assert values["flags"]["seed"] == 7
    assert "node_rank" not in values["flags"], "it differs between machines"
    assert origins["flags.seed"] == "--seed"
    assert origins["model.diffusion.sigma_max"] == "default"
    line = (files.folder / "model.json").read_text().split("\n").index('        "num_layers": 40,') + 1
    assert origins["model.predictor.num_layers"] == f"model.json:{line}:23"
    assert origins["fsdp2.param_dtype"] == "fsdp2.yaml:4:14"


def clips(files: Any) -> dict[str, Any]:
    settings: dict[str, Any] = files.data["dataset_param"]["preprocess_parameters"]
    return settings


def transforms(files: Any) -> list[dict[str, Any]]:
    pipeline = files.data["dataset_param"]["preprocess_parameters"]["train_pipeline"]
    return pipeline["video"]


#: name, what is spoilt, where the finding stands (at ^ in the file), what it says
BAD: list[tuple[str, Spoil, str, str]] = [
    ("id", lambda f: f.model["predictor"].update(model_id="wandti"),
     '"model_id": ^"wandti"',
     "no installed distribution offers the predictor 'wandti'. Did you mean 'wandit' "
     "(mmzoo-plugin-wan22 0.1.0)?"),
    ("other role", lambda f: f.model["ae"].update(model_id="wandit"),
     '"model_id": ^"wandit",\n        "from_pretrained"',
     "no installed distribution offers the ae 'wandit'. 'wandit' is a predictor, not an ae: it "
     "comes from mmzoo-plugin-wan22 0.1.0 and goes under predictor.model_id"),
    ("no id", lambda f: f.model["diffusion"].pop("model_id"),
     '^"diffusion": {',
     'diffusion needs "model_id". Add "model_id"; `mm list` shows the ids'),
    ("key", lambda f: f.model["predictor"].update(hiden_size=1),
     '^"hiden_size"',
     'unknown key "hiden_size" in predictor (wandit). Did you mean "hidden_size"?'),
    ("top key", lambda f: f.model.update(text_encodr={}),
     '^"text_encodr"',
     'unknown key "text_encodr" in model.json. Did you mean "text_encoder"?'),
    ("type", lambda f: f.model["predictor"].update(num_layers="40"),
     '"num_layers": ^"40"',
     '"num_layers" is "40", expected a whole number. Remove the quotes: 40'),
    ("nested", lambda f: f.model["ae"]["tiling_param"].update(tile_sample_min_hight=1),
     '^"tile_sample_min_hight"',
     'unknown key "tile_sample_min_hight" in tiling_param of ae (wan_video_vae). '
     'Did you mean "tile_sample_min_height"?'),
    ("section", lambda f: f.model.pop("text_encoder"),
     '^{\n    "load_video',
     'model.json needs "text_encoder". Add "text_encoder"'),
    ("consumed key", lambda f: f.model["ae"].update(dtype="bf61"),
     '"dtype": ^"bf61"',
     '"dtype" is "bf61", expected "bf16", "fp16", "fp32" or "fp64". Did you mean "bf16"?'),
    ("features", lambda f: f.model.update(load_video_features=True),
     '"load_video_features": ^true',
     "load_video_features is true, but the samples of data_path are videos and captions. Make features with "
     '`mm extract-features`, name their index.json as data_path and write "data_storage_mode": "sorafeatured"'),
    ("patch", lambda f: f.model["patch"].update(bridge=True),
     '^"bridge":',
     'unknown key "bridge" in patch of model.json. Did you mean "bridge_patch"?'),
    ("muon", lambda f: f.model["patch"].update(muon_optimizer=True),
     '"muon_optimizer": ^true',
     '"muon_optimizer" is true: the Muon optimizer is not available yet; this version '
     "cannot run it. Available: false"),
    ("no weights", lambda f: f.model["ae"].pop("from_pretrained"),
     '^"ae": {',
     'ae (wan_video_vae) has no weights. Give "from_pretrained" (a folder), or "init": "random" '
     "to start from random ones"),
    ("folder", lambda f: f.model["ae"].update(from_pretrained="weights/vea"),
     '^"weights/vea"',
     'ae.from_pretrained is "weights/vea": there is no such folder (seen from the working '
     "directory). Did you mean weights/vae?"),
    ("data path", lambda f: f.data["dataset_param"]["basic_parameters"].update(data_path="dat.txt"),
     '^"dat.txt"',
     'dataset_param.basic_parameters.data_path is "dat.txt": there is no such file (seen from the '
     "working directory). Did you mean data.txt?"),
    ("sampler", lambda f: f.data["dataloader_param"].update(sampler_type="VariableVideoBatchSampler"),
     '^"VariableVideoBatchSampler"',
     '"sampler_type" is "VariableVideoBatchSampler": only "stateful_distributed_sampler" or "SequentialSampler" or '
     '"BaseRandomBatchSampler" or "LengthGroupedSampler" is accepted: samples are always dealt by one global sampler, and '
     "group_data groups clips of several sizes"),
    ("transform", lambda f: transforms(f)[0].update(trans_type="Resize"),
     '"video": [\n                    {\n                        "trans_type": ^"',
     '"video[0]": "trans_type" must be one of "ResizeVideo", "ToTensorVideo", '
     '"norm_fun", "CenterCropResizeVideo". Did you mean "ResizeVideo"?'),
    ("dataset", lambda f: f.data["dataset_param"].update(dataset_type="i2v"),
     '^"i2v"',
     "no installed distribution offers the dataset 'i2v'. Did you mean 't2v' (mmzoo-core 0.1.0)?"),
    ("callback", lambda f: f.model.update(callbacks=["wandit"]),
     '"callbacks": [\n        ^"wandit"',
     "no installed distribution offers the callback 'wandit'. 'wandit' is a predictor, not a callback: it "
     "comes from mmzoo-plugin-wan22 0.1.0 and goes under predictor.model_id"),
    ("slower", lambda f: f.data["dataset_param"]["preprocess_parameters"].update(speed_factor=0.5),
     '"speed_factor": ^0.5',
     '"speed_factor": must be at least 1, not 0.5: videos are sped up, never slowed down; '
     "a higher train_fps (with auto_interval) slows the motion of a clip"),
    ("cleaning", lambda f: f.data["dataset_param"].update(text_preprocess_methods=[{"method": "lowre"}]),
     '"method": ^"lowre"',
     '"method" is "lowre", expected "basic_clean", "whitespace_clean", "lower" or "lowercase". '
     'Did you mean "lower"?'),
    ("dynamic", lambda f: f.tools["profile"].update(enable=True, profile_type="dynamic"),
     '^"dynamic"',
     '"profile_type" is "dynamic": dynamic profiling is not available yet; this version cannot run it. '
     'Available: "static"'),
    ("memory", lambda f: f.tools["memory_profile"].update(enable=True),
     '"memory_profile": {\n        "enable": ^true',
     '"enable" is true: memory snapshots are not available yet; this version cannot run it. Available: false'),
    ("window", lambda f: f.tools["profile"]["static_param"].update(end_step=10),
     '"end_step": ^10',
     '"end_step": must be greater than start_step (10)'),
    ("yaml key", lambda f: setattr(f, "fsdp2", f.fsdp2 + "sub_module_to_wrap: []\n"),
     '^sub_module_to_wrap',
     'unknown key "sub_module_to_wrap" in fsdp2.yaml. Did you mean "sub_modules_to_wrap"?'),
    ("yaml type", lambda f: setattr(f, "fsdp2", 'sharding_size: "8"\n'),
     '^"8"',
     '"sharding_size" is "8", expected a whole number or "auto". Remove the quotes: 8'),
    ("experts", lambda f: setattr(f, "fsdp2", "expert_parallel_size: 0\n"),
     'expert_parallel_size: ^0',
     '"expert_parallel_size" is 0: must be at least 1'),
    ("text_dim", lambda f: (f.folder / "weights/text_encoder/config.json").write_text('{"d_model": 64}'),
     '"predictor": ^{',
     "text_dim is 4096, but text_encoder (UMT5) has embeddings of 64. Write 64"),
    ("latents", lambda f: f.model["ae"].update(z_dim=48),
     '"out_dim": ^16',
     "out_dim is 16, but ae (wan_video_vae) has 48 latent channels. Write 48"),
    ("latents of a plugin without weights",
     lambda f: (f.model.update(ae={"model_id": "haar_video", "temporal_levels": 0}),
                f.model["predictor"].update(in_dim=48, out_dim=48)),
     '"out_dim": ^48',
     "out_dim is 48, but ae (haar_video) has 12 latent channels. Write 12"),
    ("latents of the folder", lambda f: (f.folder / "weights/vae/config.json").write_text('{"z_dim": 48}'),
     '"out_dim": ^16',
     "out_dim is 16, but ae (wan_video_vae) has 48 latent channels. Write 48"),
    ("default latents", lambda f: (f.model["ae"].pop("from_pretrained"), f.model["ae"].update(init="random"),
                                   f.model["predictor"].update(in_dim=48, out_dim=48)),
     '"out_dim": ^48',
     "out_dim is 48, but ae (wan_video_vae) has 16 latent channels. Write 16"),
    ("frames", lambda f: (clips(f).update(num_frames=50),
                          (f.folder / "weights/vae/config.json").write_text('{"z_dim": 16}')),
     '"num_frames": ^50',
     "num_frames is 50, which ae (wan_video_vae) cannot encode: frames must be 4k + 1; nearest are 49 and 53"),
    ("width", lambda f: (clips(f).update(max_width=840),
                         (f.folder / "weights/vae/config.json").write_text('{"patch_size": 2}')),
     '"max_width": ^840',
     "max_width is 840, which ae (wan_video_vae) cannot encode: width must be a multiple of 16; "
     "nearest are 832 and 848"),
    ("stride", lambda f: (clips(f).update(force_resolution=False, hw_stride=4, num_frames=8),
                          f.model.update(ae={"model_id": "haar_video", "temporal_levels": 3,
                                             "spatial_levels": 3, "latents_mean": None}),
                          f.model["predictor"].update(in_dim=1536, out_dim=1536)),
     '"hw_stride": ^4',
     "hw_stride is 4, which ae (haar_video) cannot encode: height must be a multiple of 8; choose 8 or 16"),
    ("absurd", lambda f: f.model["predictor"].update(num_layers=10**9),
     '"num_layers": ^1000000000',
     '"num_layers" is 1000000000: must be at most 1000'),
    ("absurd clip", lambda f: clips(f).update(num_frames=10**9),
     '"num_frames": ^1000000000',
     '"num_frames" is 1000000000: must be at most 100000'),
    ("absurd rate", lambda f: clips(f).update(train_fps=1001),
     '"train_fps": ^1001',
     '"train_fps" is 1001: must be at most 1000.0'),
    ("absurd grid", lambda f: f.model["diffusion"].update(num_train_timesteps=100001),
     '"num_train_timesteps": ^100001',
     '"num_train_timesteps" is 100001: must be at most 100000'),
    ("absurd vocabulary",
     lambda f: (f.model["text_encoder"].pop("from_pretrained"),
                f.model["text_encoder"].update(init="random", config={"vocab_size": 2**25})),
     '"vocab_size": ^33554432',
     '"vocab_size" is 33554432: must be at most 16777216'),
    ("fp16", lambda f: setattr(f, "fsdp2", "param_dtype: float16\n"),
     "param_dtype: ^float16",
     '"param_dtype" is "float16": only "bf16" or "fp32" or "fp64" is accepted: fp16 needs loss scaling, '
     "which is not available; use bf16"),
    ("pattern", lambda f: setattr(f, "fsdp2", "recompute_modules:\n  - predictor.head\n  - predictor.{3-1}\n"),
     "  - ^predictor.{3-1}",
     '"recompute_modules[1]" is "predictor.{3-1}": the range 3-1 runs backwards; write {1-3}'),
    ("file for a folder", lambda f: f.model["ae"].update(from_pretrained="data.txt"),
     '"from_pretrained": ^"data.txt"',
     'ae.from_pretrained is "data.txt": this is a file, not a folder'),
    ("folder for a file",
     lambda f: f.data["dataset_param"]["basic_parameters"].update(data_path="weights"),
     '"data_path": ^"weights"',
     'dataset_param.basic_parameters.data_path is "weights": this is a folder, not a file'),
    ("too long a path", lambda f: f.model["ae"].update(from_pretrained="x" * 300),
     '"from_pretrained": ^"xxx',
     f'ae.from_pretrained is "{"x" * 99}…", which cannot be looked at: File name too long'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "snippet", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_golden_messages(files: Any, spoil: Spoil, snippet: str, message: str) -> None:
    spoil(files)
    assert files.check() == [f"{files.find(snippet)} error: {message}"]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("data.txt", '"data.txt" is a file, not a folder'),
        ("x" * 300, "cannot be looked at: File name too long"),
        ("~nobody-of-this-name/run", "there is no such folder"),
    ],
)
def test_load_must_name_a_folder(files: Any, load: str, message: str) -> None:
    (found,) = files.check("--load", load)
    assert found.startswith("--load error: ")
    assert message in found


def test_findings_of_all_files_come_at_once(files: Any) -> None:
    files.model["predictor"].update(num_layers="40", model_type=3)
    files.data["dataset_param"]["tokenizer_config"]["hub"] = "hf"
    files.tools["profil"] = {}
    files.fsdp2 = "param_dtype: bf61\n"
    files.write()
    text = (files.folder / "data.json").read_text().replace('"num_frames": 49,', '"num_frames": 49')
    (files.folder / "data.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags())
    lines = str(caught.value).split("\n")
    assert lines[0] == "5 errors in the configuration:"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        files.find('"model_type": ^3'),
        files.find('"num_layers": ^"40"'),
        files.find('"num_frames": 49^\n'),
        files.find('^"profil"'),
        "fsdp2.yaml:1:14",
    ]
    assert "missing ',' between this value and the next key \"max_height\"" in lines[3]


def test_callbacks_are_resolved_and_not_imported(files: Any) -> None:
    files.model["callbacks"] = ["first", "second", "first"]
    files.write()
    with CALLBACK_MAPPINGS.temporary() as callbacks:
        callbacks.register("first", object())
        callbacks.register("second", object())
        job = load_training_job(files.flags())
        assert not [f for f in check_file("model.json") if f.level == "error"]
    assert [spec.id for spec in job.callbacks] == ["first", "second", "first"]
    assert "callback" not in {component.role for component in job.components.values()}
    assert job.resolved()["values"]["model"]["callbacks"] == ["first", "second", "first"]
    (found,) = [f for f in check_file("model.json") if "'second'" in f.message]
    assert (found.code, found.path) == ("unknown-id", "callbacks[1]")
    files.model["callbacks"] = "first"
    files.write()
    assert load_errors(files) == [
        files.find('"callbacks": ^"first"') + ': "callbacks" is "first", expected a list. Write ["first"]'
    ]


def load_errors(files: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags())
    return str(caught.value).split("\n")


def test_flags_and_files_must_fit(files: Any) -> None:
    files.fsdp2 = "sharding_size: 3\n"
    found = files.check("--nproc-per-node", "2", "--global-batch-size", "3", "--load", "weights/tranformer")
    assert found == [
        '--load error: "weights/tranformer": there is no such folder. Did you mean weights/transformer?',
        "--global-batch-size error: 3 is no multiple of --micro-batch-size 1 × 2 ranks = 2. Use 2 or 4",
        "fsdp2.yaml:1:16 error: sharding_size is 3, which does not divide the 2 ranks of the job. "
        'Write "auto" for all '
        "ranks, or a divisor",
    ]


def test_a_predictor_never_starts_from_random_weights_by_accident(files: Any) -> None:
    flags = files.flags().model_copy(update={"load": None})
    with pytest.raises(ConfigError, match=r"predictor \(wandit\) has no weights. Give --load"):
        load_training_job(flags)
    files.model["predictor"]["init"] = "random"
    files.write()
    assert load_training_job(flags).components["predictor"].init == "random"


def test_a_wrong_or_missing_file_is_one_error(files: Any) -> None:
    assert files.check("--mm-model", "data.json") == [
        "data.json error: this is a data file by its keys, expected a model file. --mm-model takes "
        "the file with the "
        "sections diffusion, predictor, ae and text_encoder"
    ]
    assert files.check("--mm-data", "dta.json") == ["dta.json error: no such file. Did you mean data.json?"]
    flags = files.flags().model_copy(update={"mm_data": None})
    with pytest.raises(ConfigError, match="--mm-data: it is required: the data file of the job"):
        load_training_job(flags)


def test_bf16_fills_the_sharding_file_and_may_not_contradict_it(files: Any) -> None:
    files.fsdp2 = "sharding_size: auto\n"
    files.write()
    job = load_training_job(files.flags("--bf16"))
    assert (job.fsdp2.param_dtype, job.fsdp2.reduce_dtype) == ("bf16", "fp32")
    assert job.resolved()["origins"]["fsdp2.param_dtype"] == "--bf16"
    files.fsdp2 = "param_dtype: fp32\n"
    assert files.check("--bf16") == [
        'fsdp2.yaml:1:14 error: param_dtype is "fp32", but --bf16 is given. Keep one of them'
    ]


def test_several_text_encoders_are_checked_each_and_refused_for_one_tokenizer(files: Any) -> None:
    second = {**files.model["text_encoder"], "model_id": "CLIP", "dtyp": "bf16"}
    files.model["text_encoder"] = [files.model["text_encoder"], second]
    files.write()
    assert files.check() == [
        files.find('^"dtyp"') + ' error: unknown key "dtyp" in text_encoder[1] (CLIP). Did you mean "dtype"?'
    ]
    del second["dtyp"]
    files.write()
    (found,) = files.check()
    assert "error: the captions are tokenised once, for one text encoder. Keep one section" in found


def test_more_tokens_than_the_predictor_reads(files: Any) -> None:
    files.model["predictor"]["text_len"] = 16
    files.data["dataset_param"]["tokenizer_config"]["model_max_length"] = 32
    (found,) = files.check()
    assert found.startswith(files.find('"model_max_length": ^32'))
    assert "model_max_length is 32, but predictor (wandit) reads 16 tokens (text_len). Write 16" in found


def test_comments_schema_and_unknown_kinds_of_files(files: Any, tmp_path: Path) -> None:
    text = json.dumps({"$schema": "x", **files.model}, indent=1)
    (tmp_path / "model.json").write_text("// mine\n" + text.replace('"task"', '/* t2v */ "task"'))
    assert load_training_job(files.flags()).model.task == "t2v"
    (tmp_path / "model.json").write_text('{"model_id": "qwen3_vl", "init_from_hf_path": "x"}')
    with pytest.raises(ConfigError, match=r'needs "image_encoder"'):  # a file of another kind, by its keys
        load_training_job(files.flags())


def test_model_id_is_no_key_of_a_dataset(files: Any) -> None:
    files.data["dataset_param"]["model_id"] = "nonsense"
    files.write()
    (finding,) = (text for text in files.check() if "model_id" in text)
    assert 'unknown key "model_id" in dataset_param (t2v)' in finding
