"""Compile the Triton kernels for GPUs without having one, and print the results.

    python tests/attention/kernel_compile_probe.py 90 100

The launchers run on meta tensors with the sizes of real runs. Instead of a launch, each kernel is
compiled for compute capabilities 9.0 and 10.0, specialized as the launch would be. Prints one JSON
object per kernel. Must run in its own process, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lighthouse.config import LighthouseConfig
from lighthouse.kernels import gather, scatter_back, scorers, selection

# name: dtype, B, H, Hkv, N, D, L, p, topk
RUNS = {
    "bf16-D128-L3-p4": (torch.bfloat16, 1, 8, 8, 98_304, 128, 3, 4, 1536),
    "bf16-D64-L3-p8-gqa4": (torch.bfloat16, 2, 32, 8, 98_304, 64, 3, 8, 1536),
    "fp32-D256-L5-p2": (torch.float32, 1, 4, 4, 131_072, 256, 5, 2, 2048),
    # Few of these sizes are multiples of 16, so the compiler can assume less.
    "fp16-D80-L4-p8-odd": (torch.float16, 1, 5, 1, 512 * 3 * 1111, 80, 4, 8, 384),
}

# name: run, rotated elements of a head, whether neighbours are pairs. Each layout of pairs is
# compiled for a long and a short span, a head size that is no power of two, and a partial rotation.
ROTARY_RUNS = {
    "bf16-D128-L3-p4-interleaved": ("bf16-D128-L3-p4", 128, True),
    "bf16-D128-L3-p4-quarter": ("bf16-D128-L3-p4", 32, False),
    "bf16-D64-L3-p8-gqa4-halves": ("bf16-D64-L3-p8-gqa4", 64, False),
    "fp32-D256-L5-p2-interleaved": ("fp32-D256-L5-p2", 256, True),
    "fp16-D80-L4-p8-odd-halves": ("fp16-D80-L4-p8-odd", 80, False),
}


def captured_launches(
    run, rotary_dim: int = 0, interleaved: bool = False
) -> list[tuple[JITFunction, dict, dict]]:
    """Every kernel that the launchers start for `run`: function, arguments, options.

    Args:
        rotary_dim: rotated elements of a head. If not 0, only the rotating kernels are compiled.
    """
    launches = []

    def capture(self, *args, grid, warmup, **kwargs):
        names = [param.name for param in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in names if name in kwargs}
        launches.append((self, arguments, kwargs))

    dtype, batch, n_heads, n_kv_heads, seq_len, head_dim, num_levels, factor, topk = run
    config = LighthouseConfig(num_levels=num_levels, pooling_factor=factor, topk=topk)
    config.check_seq_len(seq_len)
    sub_seq_len = config.sub_seq_len(seq_len)

    def empty(heads, length):
        shape = (batch, length, heads, head_dim)
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    q, k, v = empty(n_heads, seq_len), empty(n_kv_heads, seq_len), empty(n_kv_heads, seq_len)
    levels = num_levels, factor
    rotary = ()
    if rotary_dim:
        rows = config.span(num_levels - 1), rotary_dim // 2
        table = (torch.empty(rows, dtype=torch.float32, device="meta") for _ in range(2))
        rotary = *table, interleaved
    launch, JITFunction.run = JITFunction.run, capture
    try:
        *scores, coarsest_q, coarsest_k, coarsest_v = scorers.norm_score_pool(
            q, k, v, *levels, *rotary
        )
        entry, slot = selection.select(*scores, *levels, topk, seq_len, True)
        assert entry.shape[-1] == sub_seq_len
        subs = gather.gather(
            q, k, v, coarsest_q, coarsest_k, coarsest_v, entry, slot, *levels, *rotary
        )  # fmt: skip
        gather.gather_backward(*subs, slot, *levels, seq_len, *rotary)
        out = scatter_back.scatter_back(subs[0], None, entry, slot, *levels, seq_len)
        scatter_back.scatter_back_backward(out, entry, *levels, 1)
    finally:
        JITFunction.run = launch
    if rotary_dim:
        launches = [launch for launch in launches if "PAIRS" in launch[1]]
    return launches


def compile_launch(kernel: JITFunction, arguments: dict, options: dict, capability: int):
    """Compile as for a launch with these arguments, specialized on ones and on multiples of 16."""
    signature, constexprs, attrs = {}, {}, {}
    for position, param in enumerate(kernel.params):
        value = arguments[param.name]
        kind = "constexpr"
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            constexprs[(position,)] = value
        else:
            if isinstance(value, torch.Tensor):
                kind = "*" + POINTERS[value.dtype]
            else:
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attrs[(position,)] = [["tt.divisibility", 16]]
        signature[param.name] = kind
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
}


def resources(compiled) -> dict[str, int]:
    """Registers, stack and local bytes per thread, from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing))
    return {name: int(value) for name, value in usage.items()}


def main() -> None:
    runs = {name: captured_launches(run) for name, run in RUNS.items()}
    for variant, (name, *rotary) in ROTARY_RUNS.items():
        runs[variant] = captured_launches(RUNS[name], *rotary)
    for variant, launches in runs.items():
        for kernel, arguments, options in launches:
            for capability in map(int, sys.argv[1:]):
                compiled = compile_launch(kernel, arguments, options, capability)
                ptx = compiled.asm["ptx"]
                result = {
                    "run": variant,
                    "kernel": kernel.__name__.strip("_"),
                    "capability": capability,
                    "warps": options["num_warps"],
                    **resources(compiled),
                    "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.M)),
                    "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                    "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
                    "narrow_loads": len(re.findall(r"ld\.global\.(?!\S*v4)", ptx)),
                    "narrow_stores": len(re.findall(r"st\.global\.(?!\S*v4)", ptx)),
                    "shuffles": ptx.count("shfl.sync"),
                    "shared_loads": ptx.count("ld.shared"),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
