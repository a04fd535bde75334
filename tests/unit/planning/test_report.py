"""What a plan prints, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

from mm_core.config.parallel import ParallelSizes
from mm_core.planning.collectives import step_collectives
from mm_core.planning.model import Advice, PlanResult, RankBytes
from mm_core.planning.picture import draw_timeline
from mm_core.planning.report import plan_data, plan_text
from mm_core.planning.roofline import step_time
from tests.unit.planning.made import DEVICE, costs


def result(**changes: object) -> PlanResult:
    made = costs(notes=("every expert gets as many tokens as the others",))
    sizes = ParallelSizes()
    collectives = step_collectives(made, sizes, 4)
    given: dict[str, object] = {
        "costs": made,
        "world_size": 4,
        "sizes": {"dp": 4, "cp": 1, "tp": 1, "pp": 1, "ep": 1},
        "device": DEVICE.name,
        "device_bytes": DEVICE.memory_bytes,
        "collectives": collectives,
        "time": step_time(made, collectives, DEVICE, sizes),
        "fits": True,
    }
    return PlanResult(**{**given, **changes})  # type: ignore[arg-type]


def test_text() -> None:
    text = plan_text(result(), DEVICE)
    assert text.startswith(
        "4 ranks of test device (data 4): 96 trained parameters, 16 frozen, 1 micro batch of 32 tokens"
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "at the peak: backward of blocks.1" in " ".join(lines)
    assert "total 1.4 KiB 2.0 KiB" in lines
    assert any(line.startswith("blocks.0 ×2 Block 48 2k 4k 0 33%") for line in lines)
    assert any(line.startswith("all-gather fsdp 4 parameters, forward 3 336 B 1e-06 GB/s") for line in lines)
    assert "It fits: the peak is 2.0 KiB of 9.8 KiB, of which 10% are left" in text
    assert "note: every expert gets as many tokens as the others" in lines
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_that_does_not_fit() -> None:
    advice = (
        Advice("sharding_size: auto in the sharding file", 1500, 0.5, True, "each rank stores less"),
        Advice("offload_to_cpu: true in the sharding file", 1900, None, False),
    )
    text = plan_text(result(fits=False, advice=advice), DEVICE.model_copy(update={"memory_bytes": 2000}))
    assert "It does not fit: the peak is 2.0 KiB of 2.0 KiB" in text
    assert "200 B are missing" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "sharding_size: auto in the sharding file 1.5 KiB yes 500 ms each rank stores less" in lines
    assert any(line.startswith("offload_to_cpu: true in the sharding file 1.9 KiB no -") for line in lines)


def test_data() -> None:
    made = result()
    data = json.loads(json.dumps(plan_data(made, DEVICE)))
    assert data["parameters"] == 96
    assert data["peak_bytes"] == max(e["total"] for e in data["timeline"]) == 2000
    assert data["peak_moment"] == "backward of blocks.1"
    assert data["memory"]["steady"] == RankBytes(parameters=1000, optimizer=400).as_dict()
    assert data["flops"]["total"] == 6000
    assert data["time"]["total"] == made.time.total
    assert sum(one["bytes"] for one in data["collectives"]) == sum(one.bytes for one in made.collectives)


def test_picture(tmp_path: Path) -> None:
    picture = draw_timeline(result(), tmp_path / "memory.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
