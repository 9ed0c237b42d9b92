"""Rates of GPUs that a plan computes with. None of them was measured by this project.

Where a source has no attainable rate, a share of the datasheet's is assumed, the same for all.
"""

from dataclasses import dataclass

BANDWIDTH_SHARE = 0.9
"""Of the datasheet's memory bandwidth, in a kernel that does nothing but move. Assumption; for the
H200 it makes 4.3 TB/s."""

MATMUL_SHARE = 0.7
"""Of the datasheet's dense bf16 rate, in matrix products as large as a layer's. Assumption."""

LINK_SHARE = 0.8
"""Of the datasheet's bandwidth of a link, in one direction. Assumption; 380 of 450 GB/s were seen
on an H100 (NVIDIA/nccl issue 1264)."""

GPUS_PER_NODE = 8
"""Ranks that NVLink connects. Assumption, that of HGX and DGX machines."""


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU, bf16, in bytes, FLOP/s and bytes/s."""

    name: str

    memory: int
    """All there is, as torch reports it, in whole GiB."""

    peak_flops: float
    """Dense, of the datasheet: what MFU is measured against, as in torchtitan's
    `get_peak_flops`."""

    attention_flops: float
    """Causal attention forward at long lengths, half of the square counted."""

    attention_backward_flops: float
    """The same backward, where two and a half times as much is counted."""

    datasheet_bandwidth: float
    """Of the memory."""

    datasheet_nvlink: float
    """In one direction."""

    datasheet_network: float
    """To other nodes in one direction, for each GPU."""

    source: str
    """Of the rates of attention and of the network."""

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
            attention_flops=688e12,
            attention_backward_flops=581e12,
            datasheet_bandwidth=4.8e12,
            datasheet_nvlink=450e9,
            datasheet_network=50e9,
            source="attention: cuDNN at its best, assumed; NVIDIA publishes 619 and 528 TFLOP/s at "
            "32,768 tokens (cudnn-frontend, benchmark/attention_training/results/llama3.1/h200); "
            "network: 400 Gb/s for each GPU, assumed",
        ),
        Gpu(
            name="H100",
            memory=79 * 2**30,
            peak_flops=989e12,
            attention_flops=688e12,
            attention_backward_flops=581e12,
            datasheet_bandwidth=3.35e12,
            datasheet_nvlink=450e9,
            datasheet_network=50e9,
            source="SXM; attention: as the H200, which has the same cores, assumed; network: 400 "
            "Gb/s for each GPU, assumed",
        ),
    )
}
"""By name."""
