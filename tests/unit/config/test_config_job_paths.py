"""From where the relative paths of a job file are meant."""

from __future__ import annotations

from typing import Any

import yaml

from mm_core.config import check_file, check_training_job, parse_train_flags
from mm_core.config.job_file import read_job_file

FLAGS: dict[str, Any] = {"lr": 1e-4, "train_iters": 10, "load": "weights/transformer"}


def job(files: Any, folder: str = "", **top: Any) -> str:
    """Write the job of `files` as one job.yaml in a folder; `top` replaces keys of the top level, None leaves one out."""
    content: dict[str, Any] = {
        "gpt_args": FLAGS,
        "model": files.model,
        "data": files.data,
        "tools": files.tools,
        "fsdp2": yaml.safe_load(files.fsdp2),
    } | top
    text = yaml.safe_dump(
        {key: value for key, value in content.items() if value is not None}, sort_keys=False
    )
    (files.folder / folder).mkdir(exist_ok=True)
    (files.folder / folder / "job.yaml").write_text(text, encoding="utf-8")
    return f"{folder}/job.yaml" if folder else "job.yaml"


COMBINED = """\
MM_TOOL_PATH: tools.json
gpt_args: {lr: 1.0e-5, train_iters: 3, load: weights/transformer, fsdp2_config_path: fsdp2.yaml}
"""


def combined(files: Any, folder: str = "") -> str:
    (files.folder / folder).mkdir(exist_ok=True)
    text = COMBINED + yaml.safe_dump({"model": files.model, "data": files.data}, sort_keys=False)
    path = files.folder / folder / "combined.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path.relative_to(files.folder))


def test_paths_of_a_combined_yaml_are_seen_from_the_working_directory(files: Any) -> None:
    flags = parse_train_flags([combined(files, "jobs")])
    assert flags.load == "weights/transformer"
    assert [str(f) for f in check_training_job(flags) if f.level == "error"] == []
    (files.folder / "jobs" / "weights" / "vae").mkdir(parents=True)
    notes = [str(f) for f in parse_train_flags(["jobs/combined.yaml"]).findings]
    assert any(
        text.endswith(
            'model.ae.from_pretrained is "weights/vae", looked for in the working directory; the folder of '
            "jobs/combined.yaml holds it too"
        )
        for text in notes
    ), notes


def test_paths_of_a_job_file_are_seen_from_its_folder(files: Any) -> None:
    (files.folder / "jobs").mkdir()
    for name in ("weights", "data.txt"):
        (files.folder / name).rename(files.folder / "jobs" / name)
    flags = parse_train_flags([job(files, "jobs", tools="t.json")])
    assert flags.load == "jobs/weights/transformer"
    assert flags.mm_tool == "jobs/t.json"
    assert flags.sections["model"].value(("ae", "from_pretrained")) == "jobs/weights/vae"
    assert flags.sections["data"].value(("dataset_param", "basic_parameters", "data_path")) == "jobs/data.txt"
    (files.folder / "jobs" / "t.json").write_text("{}")
    assert [str(f) for f in check_training_job(flags) if f.level == "error"] == []
    # What the command line says is seen from the working directory.
    again = parse_train_flags(["jobs/job.yaml", "--load", "weights", "model.ae.from_pretrained=vae"])
    assert again.load == "weights"
    found = [f.message for f in check_training_job(again) if f.code == "missing-path"]
    assert any('ae.from_pretrained is "vae": there is no such folder' in text for text in found), found


def test_the_choice_between_two_places_is_said(files: Any) -> None:
    path = job(files, "jobs", gpt_args={**FLAGS, "save": "/absolute"})
    (files.folder / "jobs" / "weights" / "vae").mkdir(parents=True)
    flags = parse_train_flags([path])
    said = {f.path: f.message for f in flags.findings if f.code == "path-choice"}
    assert said["model.ae.from_pretrained"] == (
        'model.ae.from_pretrained is "weights/vae", looked for in the folder of jobs/job.yaml; the working directory '
        "holds it too"
    )
    assert said["gpt_args.load"].endswith(
        "looked for in the folder of jobs/job.yaml, which does not hold it; the working directory does"
    )
    assert flags.save == "/absolute"
    assert {f.level for f in flags.findings} == {"note"}


def test_a_file_by_itself_may_be_for_elsewhere(files: Any) -> None:
    path = job(files, "jobs", gpt_args={**FLAGS, "load": "no/run"}, tools="no/tools.json")
    found = {(f.level, f.code) for f in check_file(path)}
    assert ("note", "missing-path") in found
    assert "error" not in {level for level, _ in found}
    assert [f.level for f in check_training_job(parse_train_flags([path])) if f.code == "missing-path"].count(
        "error"
    ) >= 4


def test_lists_of_paths(files: Any) -> None:
    data = {"dataset_param": {"dataset": "a.json, b.json", "attr": {"images": "images"}}, "x": ["a.json"]}
    read = read_job_file(job(files, "jobs", data=data))
    assert read.sections["data"].data["dataset_param"]["dataset"] == "jobs/a.json,jobs/b.json"
    assert read.sections["data"].data["x"] == ["a.json"]
