"""Make torchtitan train on the CPU. torchtitan supports accelerators only.

torchtitan 0.2.2 uses "cuda" if it finds no accelerator, and has no setting for another device.
`use_cpu_device` therefore replaces three names of `torchtitan.tools.utils` at run time. It replaces
them in that module and in all torchtitan modules that have imported them:

    device_type      "cpu"
    device_module    `CpuDevice`, the few functions that torchtitan calls
    get_peak_flops   `measure_peak_flops`; torchtitan looks up the rates of GPUs

On a machine without an accelerator, our trainer calls it before it builds torchtitan's trainer. On
a GPU nothing is replaced. Importing this module replaces nothing.
"""

import os
import resource
import sys
import timeit
import warnings
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.models.llama3 import Transformer
from torchtitan.tools import utils


def device_type() -> str:
    """The device type that a run uses on this machine. "cpu" without an accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # torchtitan does not support MPS devices.
    is_missing = accelerator is None or accelerator.type == "mps"
    return "cpu" if is_missing else utils.device_type


def use_cpu_device() -> None:
    """Make the CPU torchtitan's device, also in torchtitan modules that are already imported."""
    # Autocast to fp32 on the CPU does nothing and warns about it.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
    # `draw_initial_weights` replaces the random operators that this warning is about.
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete")
    replacements = {
        "device_type": (utils.device_type, "cpu"),
        "device_module": (utils.device_module, CpuDevice),
        "get_peak_flops": (utils.get_peak_flops, lambda device_name: measure_peak_flops()),
    }
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("torchtitan.")]
    for module in modules:
        for name, (old, new) in replacements.items():
            if getattr(module, name, None) is old:
                setattr(module, name, new)


def sum_gradients_on_gloo(model: torch.nn.Module) -> None:
    """Make FSDP reduce with plain sums. gloo has no scaled sum (`ReduceOp.PREMUL_SUM`)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def draw_initial_weights(model: Transformer) -> None:
    """Initialize the parameters of a sharded model with the values that one process would draw.

    On a CPU, each rank would draw its shard of a DTensor from the same seed. All shards would have
    equal values.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    with torch.device("meta"):
        whole = Transformer(model.model_args)
    whole.to_empty(device="cpu")
    torch.manual_seed(torch.initial_seed())
    whole.init_weights()
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole.state_dict(), options=options)


def measure_peak_flops() -> float:
    """FLOP/s of an fp32 matrix product with the threads of this process. Best of five runs."""
    size = 1024
    a = torch.rand(size, size)
    return 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))


class CpuDevice:
    """The functions of a device module that torchtitan calls. Memory is that of the process."""

    @staticmethod
    def set_device(device) -> None: ...

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device=None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def reset_peak_memory_stats(device=None) -> None: ...

    @staticmethod
    def get_device_name(device=None) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    @staticmethod
    def get_device_properties(device=None) -> SimpleNamespace:
        pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return SimpleNamespace(total_memory=pages * page_size)

    @staticmethod
    def memory_stats(device=None) -> dict[str, int]:
        """The peak resident size of the process, in bytes. It cannot be reset."""
        # ru_maxrss is in KiB on Linux, in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }
