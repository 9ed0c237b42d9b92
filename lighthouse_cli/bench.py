"""Time each step of a Lighthouse layer and compare it with dense attention and a lower bound.

    lighthouse bench --device cpu --seq-lens 8192 16384 32768
    lighthouse bench --seq-lens 8192 32768 98304 524288 1048576   # on a GPU

Every length uses topk = N/64, rounded to a legal value, unless --topk is given. Each time is the
median of several runs. Forward and backward are measured separately. `copy` is the measured time
of a copy of as many bytes as the step must move. `floor` is the least possible time of the layer at
the bandwidth of that copy and the rate of dense attention, both measured in the same run
(`lighthouse/costs.py`). The last line of the output is one JSON object.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse import LighthouseConfig, RotaryPhases, lighthouse_attention
from lighthouse.costs import Shape, attention_flops, floor_seconds, layer_costs
from lighthouse.gather import gather, scatter_back
from lighthouse.scorers import SCORERS, score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans
from lighthouse_cli.parser import Parser

BACKWARD = ("scatter back backward", "attend backward", "gather backward")
WHOLE = ("dense forward", "dense backward", "forward", "backward")
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    print(describe(device))
    rows = []
    for seq_len in options.seq_lens:
        backends = options.backends if device.type == "cuda" else ["flash"]
        for backend, pool_rotary in itertools.product(backends, options.pool_rotary):
            row = measure_layer(seq_len, backend, pool_rotary, options, device)
            rows.append(row)
            print_steps(row)
    table = summary_table(rows)
    print(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench_attention.md").write_text(
            f"```\n{describe(device)}\n```\n\n{table}"
        )
        plot(rows, options.output / "bench_attention.png")
    print(json.dumps({"device": describe(device), "rows": rows}))


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if on_gpu else "cpu", choices=["cuda", "cpu"])
    add("--seq-lens", type=int, nargs="+", default=[8192, 16384])
    add("--batch", type=int, default=1)
    add("--n-heads", type=int, default=8)
    add("--n-kv-heads", type=int, default=None, help="default: --n-heads")
    add("--head-dim", type=int, default=128)
    add("--num-levels", type=int, default=3)
    add("--pooling-factor", type=int, default=4)
    add("--topk", type=int, default=None, help="default: the legal value nearest N/64")
    add("--scorer", default="norm", choices=list(SCORERS))
    add("--pool-rotary", nargs="+", default=["averaged"], choices=["averaged", "aligned"])
    add("--dtype", default=None, choices=["bfloat16", "float16", "float32"])
    add("--backends", nargs="+", default=["cudnn"], choices=list(BACKENDS))
    add("--runs", type=int, default=None, help="per time; default 20 on a GPU, 3 on the CPU")
    add("--output", type=Path, default=None, help="folder for the table and the plot")
    options = parser.parse_args()
    if options.output is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws a plot with matplotlib, which is not installed; install it")
    options.n_kv_heads = options.n_kv_heads or options.n_heads
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.runs = options.runs or (20 if options.device == "cuda" else 3)
    return options


def describe(device: torch.device) -> str:
    """Device, versions and commit, on one line."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    parts = [f"torch {torch.__version__}", f"commit {commit or 'unknown'}"]
    if device.type == "cuda":
        import triton

        cudnn = torch.backends.cudnn.version()
        name = torch.cuda.get_device_name(device)
        versions = [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}", f"triton {triton.__version__}"]
        parts = [name, *versions, *parts]
    else:
        parts = [f"CPU {platform.machine()}, {torch.get_num_threads()} threads", *parts]
    return ", ".join(parts)


def measure(run, device: torch.device, runs: int) -> float:
    """Median seconds of `run()`, after two warm-up calls (one on the CPU).

    Slow functions get fewer calls: at least three, and no further call after two seconds.
    """
    timed = time_on_cpu if device.type == "cpu" else time_on_gpu
    for _ in range(1 if device.type == "cpu" else 2):
        timed(run)
    seconds = []
    while len(seconds) < runs and (len(seconds) < 3 or sum(seconds) < 2):
        seconds.append(timed(run))
    return statistics.median(seconds)


def time_on_cpu(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_on_gpu(run) -> float:
    # Overwrite the L2 cache, so that no step finds its inputs there.
    torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_layer(
    seq_len: int, backend: str, pool_rotary: str, options, device: torch.device
) -> dict:
    """Times for one sequence length, in seconds."""
    config, shape = config_of(seq_len, options), shape_of(seq_len, options)
    rotary = None
    if pool_rotary == "aligned":
        rotary = rotary_phases(config, shape.head_dim, device)

    def timed(run) -> float:
        return measure(run, device, options.runs)

    steps = time_steps(shape, config, rotary, backend, timed, getattr(torch, options.dtype), device)
    whole = {name: steps.pop(name) for name in WHOLE}
    costs = layer_costs(shape, config, 0 if rotary is None else shape.head_dim)
    copies = {name: timed(copy_of(cost.bytes, device)) for name, cost in costs.items()}
    # The largest copy fits into no cache.
    largest = max(costs, key=lambda name: costs[name].bytes)
    bandwidth = costs[largest].bytes / copies[largest]
    dense_flops = attention_flops(shape.batch, shape.n_heads, seq_len, shape.head_dim)
    rates = {
        False: dense_flops / whole["dense forward"],
        True: dense_flops * 2.5 / whole["dense backward"],
    }
    floors = {
        name: floor_seconds({name: cost}, bandwidth, rates[name in BACKWARD])[name]
        for name, cost in costs.items()
    }
    return {
        "seq_len": seq_len,
        "topk": config.topk,
        "scorer": config.scorer,
        "pool_rotary": pool_rotary,
        "sub_seq_len": config.sub_seq_len(seq_len),
        "shape": shape._asdict(),
        "dtype": options.dtype,
        "backend": backend,
        **whole,
        "forward floor": sum(t for name, t in floors.items() if name not in BACKWARD),
        "backward floor": sum(t for name, t in floors.items() if name in BACKWARD),
        "steps": {
            name: {
                "seconds": seconds,
                "floor": floors[name],
                "copy": copies[name],
                "bytes": costs[name].bytes,
            }
            for name, seconds in steps.items()
        },
        "bandwidth": bandwidth,
    }


def config_of(seq_len: int, options) -> LighthouseConfig:
    """The settings for one length, with the given topk or the legal one nearest to N/64."""
    topk = options.topk or max(128, seq_len // 64 // 128 * 128)
    fields = (options.num_levels, options.pooling_factor)
    legal = LighthouseConfig(*fields, topk).nearest_topk(seq_len)
    topk = topk if options.topk else legal or topk
    config = LighthouseConfig(*fields, topk, options.scorer)
    config.check_seq_len(seq_len)
    return config


def shape_of(seq_len: int, options) -> Shape:
    itemsize = getattr(torch, options.dtype).itemsize
    heads = (options.n_heads, options.n_kv_heads)
    return Shape(options.batch, *heads, seq_len, options.head_dim, itemsize)


def time_steps(
    shape: Shape,
    config: LighthouseConfig,
    rotary: RotaryPhases | None,
    backend: str,
    timed,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of dense attention, of the whole layer (`WHOLE`), and of each step of it.

    Args:
        timed: returns the seconds that a call takes.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        # The layout of a model: a view of [B, N, H, D].
        size = (shape.batch, shape.seq_len, heads, shape.head_dim)
        x = torch.randn(size, device=device, dtype=torch.float32, generator=generator)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    def attend(q, k, v, enable_gqa):
        if device.type == "cpu":
            return causal_sdpa(q, k, v, enable_gqa=enable_gqa)
        with sdpa_kernel(BACKENDS[backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=enable_gqa
            )

    def backward(outputs, inputs) -> float:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = tuple(torch.randn_like(x) for x in outputs)
        return timed(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True))

    def dense():
        return attend(q, k, v, gqa)

    def layer():
        return lighthouse_attention(q, k, v, config, rotary=rotary, attend=attend)

    gqa = shape.n_heads != shape.n_kv_heads
    q, k, v = (random(heads) for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads))
    seconds = {}
    for name, run in (("dense ", dense), ("", layer)):
        out = run()
        seconds[f"{name}forward"] = timed(run)
        seconds[f"{name}backward"] = backward(out, (q, k, v))
        del out
    scores, coarsest = score(q, k, v, config, rotary)
    selection = select_spans(scores, config, shape.seq_len)
    subs = gather(q, k, v, coarsest, selection, rotary)
    leaves = tuple(x.detach().requires_grad_() for x in subs)
    sub_out = attend(*leaves, gqa)
    sub_leaf = sub_out.detach().requires_grad_()
    result = scatter_back(sub_leaf, selection)
    return seconds | {
        "score": timed(lambda: score(q, k, v, config, rotary)),
        "select": timed(lambda: select_spans(scores, config, shape.seq_len)),
        "gather": timed(lambda: gather(q, k, v, coarsest, selection, rotary)),
        "attend": timed(lambda: attend(*leaves, gqa)),
        "scatter back": timed(lambda: scatter_back(sub_leaf, selection)),
        "scatter back backward": backward(result, (sub_leaf,)),
        "attend backward": backward(sub_out, leaves),
        "gather backward": backward(subs, (q, k, v)),
    }


def rotary_phases(config: LighthouseConfig, head_dim: int, device: torch.device) -> RotaryPhases:
    """The rotary table of a Llama with theta 500,000."""
    frequencies = 500_000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    offsets = torch.arange(config.span(config.num_levels - 1), device=device)
    angles = offsets[:, None] * frequencies
    return RotaryPhases(angles.cos(), angles.sin(), interleaved=True)


def copy_of(num_bytes: int, device: torch.device):
    """A copy that reads and writes `num_bytes` in total."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def print_steps(row: dict) -> None:
    print(
        f"\nN {row['seq_len']:,}, topk {row['topk']}, S {row['sub_seq_len']:,}, {row['dtype']}, "
        f"dense by {row['backend']}; copy {row['bandwidth'] / 1e9:,.0f} GB/s"
    )
    print(f"  {'step':<24}{'ms':>10}{'floor ms':>10}{'copy ms':>10}{'copy/step':>10}")
    for name, step in row["steps"].items():
        values = "".join(f"{1e3 * step[key]:10.3f}" for key in ("seconds", "floor", "copy"))
        share = "" if name.startswith("attend") else f"{step['copy'] / step['seconds']:10.0%}"
        print(f"  {name:<24}{values}{share}")


def summary_table(rows: list[dict]) -> str:
    """Times of the whole layer as a markdown table, one row per length."""
    lines = [
        "| N | topk | S | pooling | dense by | forward ms | dense ms | speed-up | backward ms "
        "| dense ms | forward+backward | forward / floor | both / floor |",
        "|" + "---|" * 13,
    ]
    for row in rows:
        both = row["forward"] + row["backward"]
        dense = row["dense forward"] + row["dense backward"]
        floor = row["forward floor"] + row["backward floor"]
        cells = [
            f"{row['seq_len']:,}", row["topk"], f"{row['sub_seq_len']:,}",
            row["pool_rotary"], row["backend"],
            f"{1e3 * row['forward']:.2f}", f"{1e3 * row['dense forward']:.2f}",
            f"{row['dense forward'] / row['forward']:.1f}x",
            f"{1e3 * row['backward']:.2f}", f"{1e3 * row['dense backward']:.2f}",
            f"{dense / both:.1f}x", f"{row['forward'] / row['forward floor']:.2f}",
            f"{both / floor:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n\n" + break_even(rows)


def break_even(rows: list[dict]) -> str:
    """The length at which Lighthouse and dense attention take the same time, by interpolation."""
    points = []
    for row in rows:
        dense = row["dense forward"] + row["dense backward"]
        points.append((row["seq_len"], dense / (row["forward"] + row["backward"])))
    points.sort()
    if points[0][1] >= 1:
        return f"Break-even: below {points[0][0]:,} tokens, the shortest length measured.\n"
    for (n0, s0), (n1, s1) in itertools.pairwise(points):
        if s0 < 1 <= s1:
            return f"Break-even: about {n0 + (n1 - n0) * (1 - s0) / (s1 - s0):,.0f} tokens.\n"
    return f"Break-even: above {points[-1][0]:,} tokens, the longest length measured.\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plot the times of the layer and of dense attention against length, and their ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    series = {}
    for row in rows:
        series.setdefault(f"{row['pool_rotary']}, {row['backend']}", []).append(row)
    for name, of_series in series.items():
        lengths = [row["seq_len"] for row in of_series]
        for label, forward, backward in (
            ("dense", "dense forward", "dense backward"),
            ("Lighthouse", "forward", "backward"),
            ("floor of Lighthouse", "forward floor", "backward floor"),
        ):
            both = [1e3 * (row[forward] + row[backward]) for row in of_series]
            left.loglog(lengths, both, marker="o", label=f"{label} ({name})")
        for label, ours, dense in (
            ("forward", "forward", "dense forward"),
            ("backward", "backward", "dense backward"),
        ):
            ratios = [row[dense] / row[ours] for row in of_series]
            right.semilogx(lengths, ratios, marker="o", label=f"{label} ({name})")
    right.axhline(1, color="black", linewidth=0.8)
    left.set(xlabel="tokens", ylabel="forward + backward, ms")
    right.set(xlabel="tokens", ylabel="speed-up over dense attention")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
