"""Time each step of a Lighthouse layer and compare it with dense attention and a lower bound.

    lighthouse bench --device cpu --seq-lens 8192 16384 32768
    lighthouse bench --seq-lens 8192 32768 98304 524288 1048576   # on a GPU

Every length uses topk = N/64, rounded to a legal value, unless --topk is given. Each time is the
median of several runs. Forward and backward are measured separately. `copy` is the measured time
of a copy of as many bytes as the step must move. `floor` is the least possible time of the layer at
the bandwidth of that copy and the rate of dense attention, both measured in the same run
(`lighthouse/costs.py`). On a GPU, times are those of the device: it is kept busy until the host has
launched the work, as in a training step. `host` is the time that the host takes to launch it, which
decides at short lengths. The last line of the output is one JSON object.
"""

import argparse
import importlib.util
import itertools
import json
import math
import platform
import shutil
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse import LighthouseConfig, RotaryPhases, lighthouse_attention
from lighthouse.costs import Shape, attention_flops, floor_seconds, layer_costs
from lighthouse.gather import gather, scatter_back
from lighthouse.scorers import SCORERS, score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans
from lighthouse_cli.parser import Parser, check_output_folder, exit_on_value_error

BACKWARD = ("scatter back backward", "attend backward", "gather backward")
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main() -> None:
    options = parse()
    device = describe(options.device)
    print(device)
    rows = []
    backends = options.backends if options.device == "cuda" else ["flash"]
    for seq_len, backend in itertools.product(options.seq_lens, backends):
        dense = time_dense(seq_len, backend, options)
        for pool_rotary in options.pool_rotary:
            row = measure_layer(seq_len, backend, pool_rotary, dense, options)
            rows.append(row)
            print_steps(row)
    table = summary_table(rows)
    print(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench_attention.md").write_text(f"```\n{device}\n```\n\n{table}")
        plot(rows, options.output / "bench_attention.png")
    print(json.dumps({"device": device, "rows": rows}))


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
    if options.n_kv_heads is None:
        options.n_kv_heads = options.n_heads
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.runs is None:
        options.runs = 20 if options.device == "cuda" else 3
    with exit_on_value_error():
        check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for an illegal option, before anything is measured."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be present, got cuda without a GPU; use cpu")
    for name in ("batch", "n_heads", "n_kv_heads", "head_dim", "runs"):
        if getattr(options, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} must be at least 1, got {getattr(options, name)}; use 1 or more"
            )
    if options.n_heads % options.n_kv_heads:
        raise ValueError(
            f"--n-kv-heads must be a divisor of --n-heads, {options.n_heads}, got "
            f"{options.n_kv_heads}; use {math.gcd(options.n_heads, options.n_kv_heads)}"
        )
    if "aligned" in options.pool_rotary and options.head_dim % 2:
        raise ValueError(
            f"--head-dim must be even with --pool-rotary aligned, got {options.head_dim}; use "
            f"{options.head_dim + 1}"
        )
    for seq_len in options.seq_lens:
        config_of(seq_len, options)
    if options.output is not None:
        check_output_folder("--output", options.output)


def describe(device: str) -> str:
    """Device, versions and commit, on one line."""
    command, commit = ["git", "describe", "--always", "--dirty"], ""
    if shutil.which("git"):
        here = Path(__file__).parent
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    parts = [f"torch {torch.__version__}", f"commit {commit or 'unknown'}"]
    if device == "cuda":
        import triton

        cudnn = torch.backends.cudnn.version()
        name = torch.cuda.get_device_name(device)
        versions = [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}", f"triton {triton.__version__}"]
        parts = [name, *versions, *parts]
    else:
        parts = [f"CPU {platform.machine()}, {torch.get_num_threads()} threads", *parts]
    return ", ".join(parts)


class Time(NamedTuple):
    """Seconds that a call takes."""

    seconds: float
    """On the device."""
    host: float
    """On the host: to launch it, or on the CPU to run it."""


def measure(run, options: argparse.Namespace) -> Time:
    """Median time of `run()`, after two warm-up calls (one on the CPU).

    Slow functions get fewer calls: at least three, and no further call after two seconds.
    """
    timed, warm_up = (time_on_cpu, 1) if options.device == "cpu" else (time_on_gpu, 2)
    for _ in range(warm_up):
        timed(run)
    times = []
    while len(times) < options.runs and (len(times) < 3 or sum(t.seconds for t in times) < 2):
        times.append(timed(run))
    return Time(*(statistics.median(values) for values in zip(*times, strict=True)))


def time_on_cpu(run) -> Time:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Time(seconds, seconds)


def time_on_gpu(run) -> Time:
    # Overwrite the L2 cache, so that no step finds its inputs there, and keep the GPU busy for some
    # milliseconds until the host has launched all of `run`.
    buffer = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(32):
        buffer.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    before = time.perf_counter()
    run()
    host = time.perf_counter() - before
    end.record()
    torch.cuda.synchronize()
    return Time(start.elapsed_time(end) / 1e3, host)


def measure_layer(
    seq_len: int,
    backend: str,
    pool_rotary: str,
    dense: dict[str, Time],
    options: argparse.Namespace,
) -> dict:
    """Times for one sequence length, in seconds. `dense` is that of `time_dense`."""
    config, shape = config_of(seq_len, options), shape_of(seq_len, options)
    rotary = None
    if pool_rotary == "aligned":
        rotary = rotary_phases(config, shape.head_dim, options.device)

    steps = time_steps(shape, config, rotary, backend, options)
    whole = dense | {name: steps.pop(name) for name in ("forward", "backward")}
    costs = layer_costs(shape, config, 0 if rotary is None else shape.head_dim)
    copies = {
        name: measure(copy_of(cost.bytes, options.device), options).seconds
        for name, cost in costs.items()
    }
    # The largest copy fits into no cache.
    largest = max(costs, key=lambda name: costs[name].bytes)
    bandwidth = costs[largest].bytes / copies[largest]
    dense_flops = attention_flops(shape.batch, shape.n_heads, seq_len, shape.head_dim)
    rates = {
        False: dense_flops / dense["dense forward"].seconds,
        True: dense_flops * 2.5 / dense["dense backward"].seconds,
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
        **{name: took.seconds for name, took in whole.items()},
        **{f"host {name}": took.host for name, took in whole.items()},
        "forward floor": sum(t for name, t in floors.items() if name not in BACKWARD),
        "backward floor": sum(t for name, t in floors.items() if name in BACKWARD),
        "steps": {
            name: {
                "seconds": took.seconds,
                "host": took.host,
                "floor": floors[name],
                "copy": copies[name],
                "bytes": costs[name].bytes,
            }
            for name, took in steps.items()
        },
        "bandwidth": bandwidth,
    }


def config_of(seq_len: int, options) -> LighthouseConfig:
    """The settings for one length, with the given topk or the legal one nearest to N/64."""
    topk, sizes = options.topk, (options.num_levels, options.pooling_factor)
    if topk is None:
        topk = max(128, seq_len // 64 // 128 * 128)
        topk = LighthouseConfig(*sizes, topk).nearest_topk(seq_len) or topk
    config = LighthouseConfig(*sizes, topk, options.scorer)
    config.check_seq_len(seq_len)
    return config


def shape_of(seq_len: int, options) -> Shape:
    itemsize = getattr(torch, options.dtype).itemsize
    heads = (options.n_heads, options.n_kv_heads)
    return Shape(options.batch, *heads, seq_len, options.head_dim, itemsize)


def time_dense(seq_len: int, backend: str, options: argparse.Namespace) -> dict[str, Time]:
    """Times of dense attention."""
    shape = shape_of(seq_len, options)
    qkv = random_inputs(shape, options)
    attend = attention(shape, backend, options.device)
    return {
        "dense forward": measure(lambda: attend(*qkv), options),
        "dense backward": measure_backward(attend(*qkv), qkv, options),
    }


def time_steps(
    shape: Shape,
    config: LighthouseConfig,
    rotary: RotaryPhases | None,
    backend: str,
    options: argparse.Namespace,
) -> dict[str, Time]:
    """Times of the whole layer (`forward`, `backward`), and of each step of it."""
    q, k, v = qkv = random_inputs(shape, options)
    attend = attention(shape, backend, options.device)

    timed = partial(measure, options=options)
    backward = partial(measure_backward, options=options)

    def layer():
        return lighthouse_attention(q, k, v, config, rotary=rotary, attend=attend)

    whole = {"forward": timed(layer), "backward": backward(layer(), qkv)}
    scores, coarsest = score(q, k, v, config, rotary)
    selection = select_spans(scores, config, shape.seq_len)
    subs = gather(q, k, v, coarsest, selection, rotary)
    leaves = tuple(x.detach().requires_grad_() for x in subs)
    sub_out = attend(*leaves)
    sub_leaf = sub_out.detach().requires_grad_()
    result = scatter_back(sub_leaf, selection)
    return whole | {
        "score": timed(lambda: score(q, k, v, config, rotary)),
        "select": timed(lambda: select_spans(scores, config, shape.seq_len)),
        "gather": timed(lambda: gather(q, k, v, coarsest, selection, rotary)),
        "attend": timed(lambda: attend(*leaves)),
        "scatter back": timed(lambda: scatter_back(sub_leaf, selection)),
        "scatter back backward": backward(result, (sub_leaf,)),
        "attend backward": backward(sub_out, leaves),
        "gather backward": backward(subs, qkv),
    }


def random_inputs(shape: Shape, options: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """q, k, v, in the layout of a model: views of [B, N, H, D]."""
    generator = torch.Generator(options.device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        size = (shape.batch, shape.seq_len, heads, shape.head_dim)
        x = torch.randn(size, device=options.device, dtype=torch.float32, generator=generator)
        return x.to(getattr(torch, options.dtype)).transpose(1, 2).requires_grad_()

    return tuple(random(heads) for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads))


def attention(shape: Shape, backend: str, device: str):
    """Causal attention by one backend."""
    is_grouped = shape.n_heads != shape.n_kv_heads

    def attend(q, k, v, enable_gqa=is_grouped):
        if device == "cpu":
            return causal_sdpa(q, k, v, enable_gqa=enable_gqa)
        with sdpa_kernel(BACKENDS[backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=enable_gqa
            )

    return attend


def measure_backward(outputs, inputs, options: argparse.Namespace) -> Time:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = tuple(torch.randn_like(x) for x in outputs)
    return measure(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True), options)


def rotary_phases(config: LighthouseConfig, head_dim: int, device: str) -> RotaryPhases:
    """The rotary table of a Llama with theta 500,000."""
    frequencies = 500_000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    offsets = torch.arange(config.span(config.num_levels - 1), device=device)
    angles = offsets[:, None] * frequencies
    return RotaryPhases(angles.cos(), angles.sin(), interleaved=True)


def copy_of(num_bytes: int, device: str):
    """A copy that reads and writes `num_bytes` in total."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def print_steps(row: dict) -> None:
    print(
        f"\nN {row['seq_len']:,}, topk {row['topk']}, S {row['sub_seq_len']:,}, {row['dtype']}, "
        f"dense by {row['backend']}; copy {row['bandwidth'] / 1e9:,.0f} GB/s"
    )
    print(
        f"  {'step':<24}{'ms':>10}{'floor ms':>10}{'copy ms':>10}{'copy/step':>10}{'host ms':>10}"
    )
    for name, step in row["steps"].items():
        values = "".join(f"{1e3 * step[key]:10.3f}" for key in ("seconds", "floor", "copy"))
        share = "" if name.startswith("attend") else f"{step['copy'] / step['seconds']:.0%}"
        print(f"  {name:<24}{values}{share:>10}{1e3 * step['host']:10.3f}")
    host = (f"{1e3 * row[f'host {name}']:.2f}" for name in ("forward", "backward"))
    print("  host ms of the whole layer: {} forward, {} backward".format(*host))


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
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
