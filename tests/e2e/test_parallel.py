"""`mm train` with ranks that share one model, and what `mm check` and it refuse."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Job, losses, train

RING = ("--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo")
STAGES = ("--pipeline-model-parallel-size", "2")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [RING, STAGES], ids=["sequences", "stages"])
def test_two_ranks_that_share_a_model_lose_what_one_does(flags, tmp_path, alone):
    result = train(
        Job(), tmp_path / "run", "--nproc-per-node", "2", *flags, batch=(1, 4), OMP_NUM_THREADS="1"
    )
    assert result.code == 0, result.err
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


REFUSED = [
    (("--context-parallel-size", "3"), "3 ranks cannot share the 4 heads of predictor (wandit) equally"),
    (
        (*STAGES, "--nproc-per-node", "3"),
        "2 ranks work on the same samples, which does not divide the 3 ranks of the job",
    ),
    ((*STAGES, "--save", "run", "--save-hf"), "a folder holds a whole model, and with"),
    (("--virtual-pipeline-model-parallel-size", "2"), "2 parts of each pipeline stage need"),
    ((*RING[:3], "hybrid_cp_algo"), "rings of Ulysses groups are not available yet"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_what_does_not_go_together_is_refused_without_torch(flags, message, capsys):
    from mm_core.cli.main import main

    job = Job()
    files = ["--mm-model", str(job.model), "--mm-data", str(job.data), "--fsdp2-config-path", str(job.fsdp2)]
    assert main(["check", *files, *flags]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_what_only_the_model_tells_is_refused_before_ranks_start(tmp_path):
    for flags, message in (
        (("--tensor-model-parallel-size", "2"), "whose class carries no tp_plan"),
        (("--expert-model-parallel-size", "2"), "expert_parallel_size: 2 has nothing to distribute"),
    ):
        result = train(Job(), tmp_path / "run", "--nproc-per-node", "2", *flags)
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "run").exists()
