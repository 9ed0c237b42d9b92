"""Rates of GPUs for plans. This project measured those of attention on an H100.

Without a published attainable rate, a share of the datasheet rate is assumed, equal for all GPUs.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan.experiments.lighthouse.runtime.read_files import is_a, read_toml

BANDWIDTH_SHARE = 0.9
"""Share of the datasheet's memory bandwidth that a copy kernel reaches. Assumption. For the H200 it
gives 4.3 TB/s."""

MATMUL_SHARE = 0.7
"""Share of the datasheet's dense bf16 rate that matrix products of a layer reach. Assumption."""

LINK_SHARE = 0.8
"""Share of the datasheet's link bandwidth in one direction. Assumption. 380 of 450 GB/s were
reported for an H100 (NVIDIA/nccl issue 1264)."""

ATTENTION_SHARE, ATTENTION_BACKWARD_SHARE = 0.7, 0.6
"""Shares of the datasheet's rate in attention forward and backward. Assumption. FlashAttention-2
reports up to 73 % and 63 % on an A100 (arXiv 2307.08691)."""

GPUS_PER_NODE = 8
"""Number of GPUs that NVLink connects. Assumption: as in HGX and DGX machines."""


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU, bf16, in bytes, FLOP/s and bytes/s."""

    name: str

    memory: int
    """Total memory that torch reports, rounded to whole GiB."""

    peak_flops: float
    """Datasheet rate of dense products with fp32 accumulation."""

    attention_flops: float
    """Rate of causal attention forward at long lengths. Half of the square is counted."""

    attention_backward_flops: float
    """Rate of causal attention backward. 2.5 times the forward FLOPs are counted."""

    datasheet_bandwidth: float
    """Memory bandwidth."""

    datasheet_nvlink: float
    """Bandwidth to GPUs of the same machine in one direction, by NVLink, or else by PCIe."""

    datasheet_network: float
    """Bandwidth to other nodes in one direction, per GPU."""

    source: str
    """Source of the attention and network rates."""

    logged_peak_flops: float | None = None
    """Peak rate that torchtitan uses for MFU, if not `peak_flops`. torchtitan treats unknown GPUs
    as an A100."""

    @property
    def matmul_flops(self) -> float:
        return MATMUL_SHARE * self.peak_flops

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH_SHARE * self.datasheet_bandwidth

    @property
    def nvlink(self) -> float:
        return LINK_SHARE * self.datasheet_nvlink

    @property
    def network(self) -> float:
        return LINK_SHARE * self.datasheet_network


def without_published_attention(name: str, peak_flops: float, **fields) -> Gpu:
    """A GPU whose attention rates are the assumed shares of its peak rate."""
    return Gpu(
        name=name,
        peak_flops=peak_flops,
        attention_flops=ATTENTION_SHARE * peak_flops,
        attention_backward_flops=ATTENTION_BACKWARD_SHARE * peak_flops,
        source=f"attention: {ATTENTION_SHARE:.0%} and {ATTENTION_BACKWARD_SHARE:.0%} of the peak, "
        "assumed",
        **fields,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="B200",
            memory=178 * 2**30,
            peak_flops=2.25e15,
            attention_flops=1.355e15,
            attention_backward_flops=1.048e15,
            datasheet_bandwidth=8e12,
            datasheet_nvlink=900e9,
            datasheet_network=50e9,
            source="attention: cuDNN through PyTorch at 131,072 tokens, published by NVIDIA "
            "(cudnn-frontend, benchmark/sdpa_benchmark_training/artifacts); network: 400 Gb/s for "
            "each GPU, assumed",
        ),
        Gpu(
            name="H200",
            memory=139 * 2**30,
            peak_flops=989e12,
            attention_flops=607e12,
            attention_backward_flops=565e12,
            datasheet_bandwidth=4.8e12,
            datasheet_nvlink=450e9,
            datasheet_network=50e9,
            source="attention: as measured on an H100; NVIDIA publishes 619 and 528 TFLOP/s at "
            "32,768 tokens (cudnn-frontend, benchmark/attention_training/results/llama3.1/h200); "
            "network: 400 Gb/s for each GPU, assumed",
        ),
        Gpu(
            name="H100",
            memory=79 * 2**30,
            peak_flops=989e12,
            attention_flops=607e12,
            attention_backward_flops=565e12,
            datasheet_bandwidth=3.35e12,
            datasheet_nvlink=450e9,
            datasheet_network=50e9,
            source="SXM; attention: measured with cuDNN at 98,304 tokens "
            "(benchmarks/2026-11-27-h100.md); network: 400 Gb/s for each GPU, assumed",
        ),
        # NVIDIA A100 datasheet, SXM, 80 GB: NVLink 600 GB/s both ways together.
        without_published_attention(
            "A100",
            312e12,
            memory=79 * 2**30,
            datasheet_bandwidth=2.039e12,
            datasheet_nvlink=300e9,
            datasheet_network=25e9,
        ),
        # NVIDIA L40S datasheet: no NVLink, PCIe 4.0 x16 64 GB/s both ways together.
        without_published_attention(
            "L40S",
            362e12,
            memory=44 * 2**30,
            datasheet_bandwidth=864e9,
            datasheet_nvlink=32e9,
            datasheet_network=25e9,
            logged_peak_flops=312e12,
        ),
        # NVIDIA Ada GPU architecture whitepaper, bf16 with fp32 accumulation: half of the rate with
        # fp16 accumulation. PCIe 4.0 x16.
        without_published_attention(
            "RTX4090",
            165.2e12,
            memory=23 * 2**30,
            datasheet_bandwidth=1.008e12,
            datasheet_nvlink=32e9,
            datasheet_network=25e9,
            logged_peak_flops=312e12,
        ),
        # NVIDIA RTX Blackwell GPU architecture whitepaper, likewise. PCIe 5.0 x16.
        without_published_attention(
            "RTX5090",
            209.5e12,
            memory=31 * 2**30,
            datasheet_bandwidth=1.792e12,
            datasheet_nvlink=64e9,
            datasheet_network=25e9,
            logged_peak_flops=312e12,
        ),
    )
}
"""GPUs by name."""

_REQUIRED = {"name", "memory_gib", "peak_tflops", "bandwidth_gb_s"}
_OPTIONAL = {"attention_tflops", "attention_backward_tflops", "link_gb_s", "network_gb_s"}


def read_gpu(path: str | Path) -> Gpu:
    """A GPU that a TOML file describes.

        name = "RTX 6000 Ada"
        memory_gib = 47
        peak_tflops = 364.2                 # bf16, dense, fp32 accumulation
        bandwidth_gb_s = 960                # of the memory
        attention_tflops = 250              # optional: causal attention forward
        attention_backward_tflops = 215     # optional: backward
        link_gb_s = 32                      # optional: to other GPUs of the machine, one way
        network_gb_s = 25                   # optional: to other machines, one way

    Raises:
        ValueError: the file cannot be read, or a field is missing, unknown or not positive.
    """
    try:
        given = read_toml(path)
    except ValueError as error:
        raise ValueError(
            f"--gpu must be one of {', '.join(GPUS)}, cpu or a TOML file, got {error}; correct it"
        ) from None
    missing, unknown = _REQUIRED - given.keys(), given.keys() - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ValueError(
            f"--gpu {path} must set {', '.join(sorted(_REQUIRED))} and may set "
            f"{', '.join(sorted(_OPTIONAL))}, got {', '.join(sorted(given)) or 'nothing'}; "
            f"{'add ' + ', '.join(sorted(missing)) if missing else ''}"
            f"{' and ' if missing and unknown else ''}"
            f"{'remove ' + ', '.join(sorted(unknown)) if unknown else ''}"
        )
    for name, value in given.items():
        if name != "name" and not (is_a(value, float) and 0 < value < math.inf):
            raise ValueError(
                f"--gpu {path}: {name} must be a number above 0, got {value!r}; correct it"
            )
    gpu = without_published_attention(
        str(given["name"]),
        1e12 * given["peak_tflops"],
        memory=int(given["memory_gib"] * 2**30),
        datasheet_bandwidth=1e9 * given["bandwidth_gb_s"],
        datasheet_nvlink=1e9 * given.get("link_gb_s", 32),
        datasheet_network=1e9 * given.get("network_gb_s", 25),
    )
    rates = {"attention_tflops": "attention_flops"}
    rates |= {"attention_backward_tflops": "attention_backward_flops"}
    published = {field: 1e12 * given[name] for name, field in rates.items() if name in given}
    return replace(gpu, source=f"file {path}", **published)
