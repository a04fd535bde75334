"""The devices that a plan is made for: their numbers, each with its source, and files with the numbers of others.

This module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from mm_core.config.document import read_document
from mm_core.config.findings import ConfigError, closest
from mm_core.config.section import SectionModel, check_section
from mm_registry.errors import UserError

_GIB = 1024**3
_T, _G = 1e12, 1e9

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Device(SectionModel):
    """One kind of accelerator, in machines of several. Bandwidths are bytes a second of one device, in one direction."""

    name: Annotated[str, Field(min_length=1, description="What the report calls it.")]
    memory_bytes: Annotated[int, Field(ge=1, description="Memory of one device, as its driver counts it.")]
    bf16_flops: Annotated[
        Positive, Field(description="FLOP/s of dense bf16 matrix products, without sparsity.")
    ]
    fp32_flops: Annotated[
        Positive, Field(description="FLOP/s of matrix products of fp32 tensors in full precision.")
    ]
    memory_bandwidth: Annotated[Positive, Field(description="Bytes a second between memory and cores.")]
    host_bandwidth: Annotated[Positive, Field(description="Bytes a second to or from host memory.")]
    node_size: Annotated[int, Field(ge=1, description="Devices of one machine.")]
    node_bandwidth: Annotated[
        Positive, Field(description="Bytes a second to all other devices of its machine together.")
    ]
    peer_bandwidth: Annotated[
        Positive | None,
        Field(
            description="Bytes a second to one other device of its machine; null: node_bandwidth (a switch)."
        ),
    ] = None
    network_bandwidth: Annotated[Positive, Field(description="Bytes a second to other machines.")]
    matmul_efficiency: Annotated[
        Fraction, Field(description="Part of the FLOP/s that large matrix products reach.")
    ]
    attention_efficiency: Annotated[
        Fraction, Field(description="Part of the FLOP/s that the attention kernel reaches at long sequences.")
    ]
    reserve: Annotated[
        Annotated[float, Field(ge=0, lt=1)],
        Field(
            description="Part of the memory that tensors do not get: the driver, buffers of communication, fragments."
        ),
    ] = 0.1
    bandwidth_efficiency: Annotated[
        Fraction, Field(description="Part of the bandwidths that transfers and collectives reach.")
    ] = 0.8
    sources: Annotated[Mapping[str, str], Field(description="Where the numbers come from, by field.")] = {}

    def flops(self, bytes_each: int) -> float:
        """FLOP/s of matrix products of elements of so many bytes; fp64 counts half of fp32."""
        return {1: self.bf16_flops, 2: self.bf16_flops, 4: self.fp32_flops}.get(
            bytes_each, self.fp32_flops / 2
        )

    def bandwidth(self, kind: str, ranks: int, stride: int = 1) -> float:
        """Bytes a second that each rank of a group sends in one kind of collective, before efficiency.

        Rings of several ranks of one machine use a network card each, so that a group of whole machines gets all of
        them (as NCCL's channels do); in an all-to-all each rank sends what leaves the machine through its own.

        Args:
            kind: as in `Collective.kind`.
            ranks: of the group.
            stride: distance of neighbours in ranks: 8 ranks that are 8 apart lie on 8 machines of 8 devices.
        """
        together = min(ranks, max(1, self.node_size // stride))  # ranks of the group on one machine
        peers = 1 if kind == "send" else together - 1
        inside = self.node_bandwidth
        if self.peer_bandwidth is not None:
            inside = min(inside, max(1, peers) * self.peer_bandwidth)
        if together == ranks:
            return inside
        if kind == "send":
            return self.network_bandwidth
        if kind == "all-to-all":
            return min(inside, self.network_bandwidth * (ranks - 1) / (ranks - together))
        outside = together * self.network_bandwidth
        return min(inside, outside) if together > 1 else outside


_NVIDIA = "NVIDIA's data sheet, dense values (half of those with sparsity)"
_MAMF = "780 of 989 TFLOP/s in a tuned matrix product on H100: https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405"
_FLASH = (
    "FlashAttention-2, head size 128: 370 of 989 TFLOP/s forward at 16k tokens on H100 (arXiv:2407.08608, figure 5); "
    "torch's flash kernel is that one"
)
_LINKS = "https://github.com/stas00/ml-engineering, network/README.md (one direction)"
_REACHED = "235 of 300 GB/s in nccl-tests all_reduce on 8 A100: https://github.com/stas00/ml-engineering, network/README.md"
_SMI = "memory.total of nvidia-smi"

_HOPPER: dict[str, Any] = {
    "bf16_flops": 989.4 * _T,
    "fp32_flops": 66.9 * _T,
    "host_bandwidth": 63 * _G,
    "node_size": 8,
    "node_bandwidth": 450 * _G,
    "network_bandwidth": 50 * _G,
    "matmul_efficiency": 0.79,
    "attention_efficiency": 0.37,
    "bandwidth_efficiency": 0.8,
}
_HOPPER_SOURCES = {
    "bf16_flops": f"https://www.nvidia.com/en-us/data-center/h100/, {_NVIDIA}",
    "fp32_flops": "https://www.nvidia.com/en-us/data-center/h100/, without TF32",
    "host_bandwidth": f"PCIe 5 × 16, {_LINKS}",
    "node_bandwidth": f"NVLink 4, {_LINKS}",
    "network_bandwidth": "one 400 Gb/s card for each device: MLCommons inference_results_v4.1, NVIDIA, "
    "systems/H200-SXM-141GBx8_TRT_MaxQ.json",
    "matmul_efficiency": _MAMF,
    "attention_efficiency": _FLASH,
    "bandwidth_efficiency": _REACHED,
}

_KNOWN: dict[str, dict[str, Any]] = {
    "h100": {
        **_HOPPER,
        "name": "NVIDIA H100 SXM 80 GB",
        "memory_bytes": 81559 * 1024**2,
        "memory_bandwidth": 3.35 * _T,
        "sources": {
            **_HOPPER_SOURCES,
            "memory_bytes": f"81559 MiB, {_SMI}",
            "memory_bandwidth": "https://www.nvidia.com/en-us/data-center/h100/",
        },
    },
    "h200": {
        **_HOPPER,
        "name": "NVIDIA H200 SXM 141 GB",
        "memory_bytes": 143771 * 1024**2,
        "memory_bandwidth": 4.8 * _T,
        "sources": {
            **_HOPPER_SOURCES,
            "memory_bytes": f"143771 MiB, {_SMI}",
            "memory_bandwidth": "https://www.nvidia.com/en-us/data-center/h200/",
        },
    },
    "a100": {
        "name": "NVIDIA A100 SXM 80 GB",
        "memory_bytes": 81920 * 1024**2,
        "bf16_flops": 312 * _T,
        "fp32_flops": 19.5 * _T,
        "memory_bandwidth": 2.039 * _T,
        "host_bandwidth": 31 * _G,
        "node_size": 8,
        "node_bandwidth": 300 * _G,
        "network_bandwidth": 25 * _G,
        "matmul_efficiency": 0.79,
        "attention_efficiency": 0.6,
        "bandwidth_efficiency": 0.8,
        "sources": {
            "memory_bytes": f"81920 MiB, {_SMI}",
            "bf16_flops": f"https://www.nvidia.com/en-us/data-center/a100/, {_NVIDIA}",
            "fp32_flops": "https://www.nvidia.com/en-us/data-center/a100/, without TF32",
            "memory_bandwidth": "https://www.nvidia.com/en-us/data-center/a100/",
            "host_bandwidth": f"PCIe 4 × 16, {_LINKS}",
            "node_bandwidth": f"NVLink 3, {_LINKS}",
            "network_bandwidth": "one 200 Gb/s card for each device, as in a DGX A100",
            "matmul_efficiency": f"taken over from H100: {_MAMF}",
            "attention_efficiency": "FlashAttention-2 reaches 50 to 73 % of the FLOP/s on A100 (arXiv:2307.08691)",
            "bandwidth_efficiency": _REACHED,
        },
    },
    "910b": {
        "name": "Huawei Ascend 910B2 64 GB",
        "memory_bytes": 64 * _GIB,
        "bf16_flops": 376 * _T,
        "fp32_flops": 9.2 * _T,
        "memory_bandwidth": 1.6 * _T,
        "host_bandwidth": 31 * _G,
        "node_size": 8,
        "node_bandwidth": 196 * _G,
        "peer_bandwidth": 28 * _G,
        "network_bandwidth": 25 * _G,
        "matmul_efficiency": 0.84,
        "attention_efficiency": 0.37,
        "bandwidth_efficiency": 0.8,
        "sources": {
            "memory_bytes": "https://ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu",
            "bf16_flops": "https://ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu; other variants have 280 to 400: a file of "
            "your own says which you have",
            "fp32_flops": "an assumption: fp32 runs on the vector unit; bf16 is what trains",
            "memory_bandwidth": "twice that of the 910B4 (arXiv:2505.15112), which has half the memory",
            "host_bandwidth": f"PCIe 4 × 16, {_LINKS}",
            "node_bandwidth": "HCCS 392 GB/s in both directions: https://arthurchiao.art/blog/gpu-data-sheets/",
            "peer_bandwidth": "one of seven HCCS links, 56 GB/s in both directions: "
            "https://arthurchiao.art/blog/gpu-data-sheets/",
            "network_bandwidth": "one 200 Gb/s RoCE port for each device; an assumption",
            "matmul_efficiency": "315 TFLOP/s at 4096 cubed: https://github.com/zzc0721/torch-performance-test-data/issues/109",
            "attention_efficiency": "an assumption, taken over from H100",
            "bandwidth_efficiency": f"an assumption, taken over from A100: {_REACHED}",
        },
    },
    "cpu": {
        "name": "two cores of an AMD EPYC server",
        "memory_bytes": 24 * _GIB,
        "bf16_flops": 0.14 * _T,
        "fp32_flops": 0.14 * _T,
        "memory_bandwidth": 19 * _G,
        "host_bandwidth": 19 * _G,
        "node_size": 2,
        "node_bandwidth": 1 * _G,
        "network_bandwidth": 1 * _G,
        "matmul_efficiency": 1.0,
        "attention_efficiency": 1.0,
        "sources": {
            "memory_bytes": "the machine of docs/benchmarks.md",
            "bf16_flops": "an assumption: as fp32",
            "fp32_flops": "69 GFLOP/s a core in products of 1024 × 1024 matrices, measured there",
            "memory_bandwidth": "a copy of 128 MB, measured there",
            "host_bandwidth": "the same memory",
            "node_bandwidth": "an assumption about gloo between processes of one machine",
            "network_bandwidth": "an assumption",
            "matmul_efficiency": "the FLOP/s are measured ones",
            "attention_efficiency": "69 GFLOP/s a core in torch's attention, measured there",
        },
    },
}

DEVICES = tuple(_KNOWN)
"""Names that `--device` knows."""


def find_device(name: str) -> Device:
    """The device of a name of `DEVICES`, or the numbers of a JSON or YAML file.

    Raises:
        UserError: there is no such name or file.
        ConfigError: the file is wrong; the finding points at the place.
    """
    known = _KNOWN.get(name.lower())
    if known is not None:
        return Device(**known)
    if not name.lower().endswith((".json", ".yaml", ".yml")) and not os.path.exists(name):
        near = closest(name.lower(), DEVICES)
        mend = f"; did you mean {near}?" if near else "."
        raise UserError(
            f"--device {name}: there is no such device{mend} The known ones are {', '.join(DEVICES)}; the numbers of "
            "another stand in a JSON or YAML file, which is named here."
        )
    checked = check_section(Device, read_document(name))
    if checked.section is None:
        raise ConfigError(checked.findings)
    return checked.section
