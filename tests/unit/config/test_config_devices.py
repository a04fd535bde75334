"""The spellings of `--distributed-backend`, and which devices a process may see."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mm_core.config.devices import communication, read_backend, torch_npu_failure, visible_devices
from mm_registry.errors import UserError

FULL = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


@pytest.mark.parametrize("device", FULL)
@pytest.mark.parametrize("text", [
    None, "nccl", "hccl", "NCCL", "cpu:gloo,npu:hccl,cuda:nccl", " cuda:nccl , npu:hccl,cpu:gloo", "npu:nccl,cuda:hccl,cpu:gloo",
])  # fmt: skip
def test_every_spelling_of_both_makers_means_the_devices_own(text: str | None, device: str) -> None:
    assert communication(text, device)[0] == FULL[device]


@pytest.mark.parametrize(("text", "device"), [
    ("npu:hccl", "npu"), ("npu:hccl,cpu:gloo", "npu"), ("cpu:gloo,npu:hccl", "npu"), ("hccl", "npu"),
    ("cuda:nccl", "cuda"), ("cuda:nccl,cpu:gloo", "cuda"), ("nccl", "cuda"), ("gloo", "cpu"), ("cpu:gloo", "cpu"),
])  # fmt: skip
def test_what_fits_the_device_is_taken_without_a_word(text: str, device: str) -> None:
    assert communication(text, device) == (FULL[device], "")


@pytest.mark.parametrize(("text", "device", "said"), [
    ("nccl", "npu", "hccl is used on this npu device"), ("hccl", "cuda", "nccl is used on this cuda device"),
    ("nccl", "cpu", "computes on the CPU and uses gloo"), ("gloo", "cuda", "nccl is faster"),
])  # fmt: skip
def test_what_does_not_fit_is_mapped_and_said(text: str, device: str, said: str) -> None:
    assert said in communication(text, device)[1]


def test_gloo_between_gpus_is_possible() -> None:
    assert communication("gloo", "cuda")[0] == communication("cuda:gloo", "cuda")[0] == "cpu:gloo,cuda:gloo"


@pytest.mark.parametrize(("text", "device", "message"), [
    ("ncll", "cuda", r'"ncll" is no backend that training can use \(did you mean "nccl"\?\); use nccl, hccl or gloo'),
    ("lccl", "npu", '"lccl" is no backend'), ("mpi", "cpu", '"mpi" is no backend'), ("", "cpu", '"" is no backend'),
    ("npu:", "npu", '"" is no backend'), ("npu:hccl,", "npu", '"" is no backend'),
    ("gpu:nccl", "cuda", '"gpu" is no type of device.*or pairs of device and backend such as cpu:gloo,npu:hccl'),
    ("cpu:hccl,npu:hccl", "npu", "through gloo alone; write cpu:gloo"),
    ("npu:hccl,npu:gloo", "npu", "says twice what npu uses"), ("hccl,cpu:gloo", "npu", '"hccl" needs its device too'),
    ("npu:hccl", "cuda", 'nothing for the cuda device of this process; use "cpu:gloo,cuda:nccl" or leave the flag out'),
    ("npu:hccl", "cpu", "nothing for the cpu device"), ("cpu:gloo", "npu", "nothing for the npu device"),
    ("gloo", "npu", "gloo moves no tensors of NPUs"),
])  # fmt: skip
def test_what_means_nothing_is_refused_by_name(text: str, device: str, message: str) -> None:
    with pytest.raises(UserError, match=f'^--distributed-backend "{text}".*{message}'):
        communication(text, device)


def test_a_spelling_is_read_without_a_device() -> None:
    assert read_backend("npu:hccl,cpu:gloo") == {"npu": "hccl", "cpu": "gloo"}
    assert read_backend("nccl") == {"": "nccl"}


@pytest.mark.parametrize(("value", "seen"), [
    (None, None), ("", []), ("0,2", ["0", "2"]), (" 1 , 3", ["1", "3"]), ("0,-1,2", ["0"]), ("-1", []),
    ("GPU-8f,GPU-9a", ["GPU-8f", "GPU-9a"]),
])  # fmt: skip
def test_visible_devices(value: str | None, seen: list[str] | None) -> None:
    for device, variable in (("cuda", "CUDA_VISIBLE_DEVICES"), ("npu", "ASCEND_RT_VISIBLE_DEVICES")):
        assert visible_devices(device, {} if value is None else {variable: value}) == seen
    assert visible_devices("cpu", {"CUDA_VISIBLE_DEVICES": "0"}) is None


def test_a_failed_import_of_torch_npu_becomes_a_sentence_whoever_imported_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text("raise OSError('libhccl.so: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)

    def imported() -> None:
        try:
            importlib.import_module("torch_npu")
        except OSError as error:
            raise RuntimeError("Failed to load the backend extension: torch_npu.") from error

    with pytest.raises(RuntimeError) as caught:
        imported()
    sentence = torch_npu_failure(caught.value)
    assert sentence is not None
    assert "(OSError: libhccl.so: cannot open shared object file): install the CANN" in sentence
    assert torch_npu_failure(RuntimeError("NPU out of memory")) is None
