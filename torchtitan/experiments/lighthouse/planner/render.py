"""Predict memory, time and GPU-hours of a run before it starts, on any machine.

    lighthouse plan train_configs/1m_context.toml --world-size 32 --gpu B200
    lighthouse plan train_configs/debug.toml --world-size 2 --gpu cpu --training.seq_len 4096

Checks the configuration as training does, for the given number of processes and device. Prints
lengths, FLOPs, bytes sent between ranks and memory. Times are computed from stated rates
(`torchtitan/experiments/lighthouse/planner/`). Any field of the TOML can be overridden as in
training. --json prints the same numbers as one JSON object. A configuration that cannot run prints
one line on stderr and exits with code 2. Outputs, checkpoints, tokenizer and data need not exist.
Tensor parallelism is not covered.
"""

import argparse
import json

from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.rule_helpers import check_choice, require
from torchtitan.experiments.lighthouse.planner.estimate import (
    NOTE,
    USABLE_SHARE,
    Plan,
    StagePlan,
    plan,
)
from torchtitan.experiments.lighthouse.planner.gpus import GPUS, Gpu, read_gpu
from torchtitan.experiments.lighthouse.planner.memory import Memory
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.command_line import Parser, exit_on_value_error

BYTES = {"GiB": 2**30, "MiB": 2**20}
HOURS = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600, "ms": 1 / 3.6e6}
TOKENS = {"billion tokens": 1e9, "million tokens": 1e6, "tokens": 1.0}
WIDTH = 14
"""Characters of a column of numbers."""


def main(args: list[str] | None = None) -> None:
    options, overrides = parse(args)
    with exit_on_value_error():
        size = options.world_size
        require(size >= 1, "--world-size", "at least 1", size, "use 1 or more")
        gpu = gpu_of(options.gpu)
        device_type = "cpu" if gpu is None else "cuda"
        config = load_config(["--job.config_file", options.config, *overrides])
        check_config(config, options.world_size, device_type, is_start=False)
        result = plan(config, options.world_size, gpu)
    print(json.dumps(result.to_json()) if options.json else text(result))


def parse(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and the remaining arguments for the configuration."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("config", help="TOML file, before any overrides")
    add("--world-size", type=int, default=1, help="number of processes, one per GPU; default: 1")
    kinds = f"{', '.join(GPUS)}, a TOML file (`planner/gpus.py`), or cpu, without times"
    add("--gpu", default="H100", help=f"{kinds}; default: H100")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_known_args(args)


def gpu_of(name: str) -> Gpu | None:
    """The GPU that --gpu names. None for the CPU."""
    if name == "cpu":
        return None
    if name in GPUS:
        return GPUS[name]
    if not name.endswith(".toml"):
        check_choice("--gpu", name, [*GPUS, "cpu", "a TOML file"])
    return read_gpu(name)


def text(result: Plan) -> str:
    """The plan as tables."""
    run, gpu = result.run, result.gpu
    device = "CPU processes" if gpu is None else gpu.name
    sections = [
        f"{run['flavor']}, {run['seq_len']:,} tokens, {run['world_size']} x {device}: {NOTE}",
        facts(result),
        flops_table(result),
        traffic_table(result),
        memory_table(result),
    ]
    if gpu is not None:
        sections += [time_table(result), totals(result)]
    sections += [checkpoint_line(result)]
    if gpu is not None:
        sections += [rates(result)]
    return "\n\n".join(section for section in sections if section)


def facts(result: Plan) -> str:
    """Model, tokens, ranks and the sub-sequence."""
    run, attention = result.run, result.attention
    parameters, parallel = run["parameters"], run["context_parallel"]
    shared = f"context {parallel['degree']} ({parallel['scheme']}) x " if parallel["scheme"] else ""
    data = run["world_size"] // parallel["degree"]
    loss = f", loss in chunks of {run['loss_chunk_size']}" if run["loss_chunk_size"] else ""
    steps = run["stage_steps"]
    lines = [
        f"model       {million(parameters['total'])} parameters: embedding "
        f"{million(parameters['embedding'])}, {run['n_layers']} layers of "
        f"{million(parameters['layer'])}, head {million(parameters['head'])}",
        f"step        {run['sequences_per_step']:,} sequences, {run['tokens_per_step']:,} tokens, "
        f"{run['tokens_per_rank']:,} on a rank at a time"
        f"{', ' + str(run['micro_batches']) + ' times' if run['micro_batches'] > 1 else ''}",
        f"ranks       {shared}data {data}; parameters sharded over {run['shards']}"
        f"{', ' + str(run['replicas']) + ' replicas' if run['replicas'] > 1 else ''}",
        f"computing   activation checkpointing {run['activation_checkpoint']}; compiled: "
        f"{' and '.join(run['compiled']) or 'nothing'}{loss}",
        f"steps       {steps['1']:,} with Lighthouse, {steps['2']:,} dense; "
        f"{amount(run['tokens'], TOKENS)}",
    ]
    if run["stage2_seq_len"] < run["seq_len"]:
        full_steps = run["stage2_full_steps"]
        lines.append(
            f"stage 2     sequences in pieces of {run['stage2_seq_len']:,} tokens"
            f"{f'; at full length in its last {full_steps:,} steps' if full_steps else ''}"
        )
    if attention:
        candidates = attention["candidates_per_stratum"]
        dense = attention["dense_layers"]
        lines += [
            f"attention   L{attention['num_levels']} p{attention['pooling_factor']} "
            f"k{attention['topk']} {attention['scorer']} {attention['pool_rotary']}: "
            f"S {attention['sub_seq_len']:,}"
            f"{', a multiple of 128' if attention['is_aligned_to_128'] else ''}; "
            f"S²/N² {attention['square']:.2%}",
            f"strata      {attention['strata']} a level, {attention['strata_per_rank']} a rank, "
            f"{attention['strata_per_chunk']} a chunk; candidates of one, level 0 to "
            f"{len(candidates) - 1}: {', '.join(map(str, candidates))}",
            f"dense       {'no layer' if not dense else 'layers ' + ', '.join(map(str, dense))}",
        ]
    return "\n".join(lines)


def columns(result: Plan) -> dict[str, StagePlan]:
    """The stages by the title of their column."""
    titles = {"2 full": "full length"}
    return {titles.get(name, f"stage {name}"): stage for name, stage in result.stages.items()}


def flops_table(result: Plan) -> str:
    stages = columns(result)
    titles = {"linear": "linear layers", "attention": "attention, half square"}
    found = [stage.flops_per_token for stage in stages.values()]
    unit, scale = unit_of(max(flops["total"] for flops in found), {"GFLOP": 1e9, "MFLOP": 1e6})
    rows = {
        titles.get(name, name): [flops[name] / scale for flops in found]
        for name in found[0]
        if any(flops[name] for flops in found)
    }
    rows["recomputed"] = [s.recomputed_flops_per_token / scale for s in stages.values()]
    rows["as the log counts for MFU"] = [s.logged_flops_per_token / scale for s in stages.values()]
    per_step = [stage.flops_per_step for stage in stages.values()]
    step_unit, step_scale = unit_of(max(per_step), {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9})
    rows[f"{step_unit} a step, all ranks"] = [flops / step_scale for flops in per_step]
    return table(f"{unit} a token", list(stages), rows, "{:,.3f}")


def traffic_table(result: Plan) -> str:
    """A column for each kind of layer, then one for a step of each stage."""
    layers = {}
    for stage in result.stages.values():
        layers |= stage.traffic_per_layer
    steps = {name: stage.traffic_per_step for name, stage in columns(result).items()}
    purposes = list(dict.fromkeys(name for traffic in steps.values() for name in traffic))
    if not purposes:
        return ""
    columns_of = [*(layers | steps).values()]
    largest = max(max(traffic.values(), default=0) for traffic in columns_of)
    unit, scale = unit_of(largest, {"MB": 1e6, "KB": 1e3})
    rows = {name: [traffic.get(name, 0) / scale for traffic in columns_of] for name in purposes}
    return table(f"{unit} sent: layers, steps", [*layers, *steps], rows, "{:,.2f}")


def memory_table(result: Plan) -> str:
    stages = columns(result)
    memories = [stage.memory for stage in stages.values()]
    parts = dict.fromkeys(name for memory in memories for name in memory.parts)
    unit, scale = unit_of(max(memory.peak for memory in memories), BYTES)
    rows = {
        name: [memory.parts.get(name, 0) / scale for memory in memories]
        for name in parts
        if any(memory.parts.get(name) for memory in memories)
    }
    rows["peak"] = [memory.peak / scale for memory in memories]
    lines = [table(f"{unit} of a rank at its peak", list(stages), rows, "{:,.2f}")]
    for name, memory in zip(stages, memories, strict=True):
        kept = ", ".join(
            f"{size / scale:.3f} by a {kind} layer" for kind, size in memory.kept_per_layer.items()
        )
        lines.append(f"  {name}: peak at the {memory.peak_phase}; saved {kept}")
    if result.gpu is not None:
        lines += [f"  {name}: {fit(result, stage.memory)}" for name, stage in stages.items()]
    return "\n".join(lines)


def fit(result: Plan, memory: Memory) -> str:
    """One line on whether the peak fits into the GPU's memory."""
    usable = USABLE_SHARE * result.gpu.memory
    words = "fits" if memory.peak <= usable else "DOES NOT FIT"
    return (
        f"{words}: {amount(memory.peak, BYTES)} of {usable / 2**30:.0f} GiB, which are "
        f"{USABLE_SHARE:.0%} of the memory of one {result.gpu.name}"
    )


def time_table(result: Plan) -> str:
    stages = columns(result)
    names = dict.fromkeys(name for stage in stages.values() for name in stage.seconds)
    steps = [sum(stage.seconds.values()) for stage in stages.values()]
    # Milliseconds with one decimal are too coarse for a short step.
    title, scale = ("ms", 1e-3) if max(steps) >= 1e-2 else ("µs", 1e-6)
    rows = {
        name: [stage.seconds.get(name, 0) / scale for stage in stages.values()] for name in names
    }
    rows["step"] = [step / scale for step in steps]
    rows["tokens/s/GPU"] = [f"{stage.tokens_per_second:,.0f}" for stage in stages.values()]
    rows["MFU as logged, %"] = [100 * stage.mfu for stage in stages.values()]
    unit, scale = unit_of(result.gpu_hours, HOURS)
    rows[f"GPU-{unit}"] = [stage.gpu_hours / scale for stage in stages.values()]
    return table(f"{title} a step", list(stages), rows, "{:,.1f}") + f"\n  {NOTE}"


def totals(result: Plan) -> str:
    """GPU-hours of the run, and GPU-hours of training dense from the start."""
    dense, world_size = result.dense.gpu_hours, result.run["world_size"]
    hours = result.gpu_hours
    return (
        f"total       {amount(hours, HOURS, 'GPU-')}, {amount(hours / world_size, HOURS)}\n"
        f"all dense   {amount(dense, HOURS, 'GPU-')}, {amount(dense / world_size, HOURS)}, "
        f"{dense / hours:.2f} times as long"
    )


def checkpoint_line(result: Plan) -> str:
    facts = result.checkpoints
    if not facts["steps"]:
        return "checkpoints none"
    return (
        f"checkpoints {len(facts['steps'])} of {amount(facts['bytes'], BYTES)}, the last "
        f"{amount(facts['last_bytes'], BYTES)}; on disk at most "
        f"{amount(facts['most_on_disk'], BYTES)}, {amount(facts['left'], BYTES)} in the end"
    )


def rates(result: Plan) -> str:
    gpu = result.gpu
    return (
        f"rates       {gpu.name}: matrix products {gpu.matmul_flops / 1e12:,.0f}, attention "
        f"{gpu.attention_flops / 1e12:,.0f} and {gpu.attention_backward_flops / 1e12:,.0f} "
        f"TFLOP/s, memory {gpu.bandwidth / 1e12:.1f} TB/s,\n            GPUs "
        f"{gpu.nvlink / 1e9:.0f} and network {gpu.network / 1e9:.0f} GB/s one way; assumptions "
        "are in torchtitan/experiments/\n            lighthouse/planner/{gpus,step_time,memory}.py"
    )


def unit_of(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The first unit, with its size, in which `largest` is at least 1. Otherwise the last unit."""
    return next(((u, size) for u, size in units.items() if largest >= size), [*units.items()][-1])


def amount(value: float, units: dict[str, float], prefix: str = "") -> str:
    """A number in a fitting unit."""
    unit, size = unit_of(value, units)
    number = f"{value / size:,.1f}".removesuffix(".0")
    return f"{number} {prefix}{unit}"


def table(title: str, heads: list[str], rows: dict, number: str) -> str:
    """Aligned columns. Zero is printed as a dash."""
    label = max(len(title), *(len(name) + 2 for name in rows)) + 2
    lines = [title.ljust(label) + "".join(head.rjust(WIDTH) for head in heads)]
    for name, values in rows.items():
        cells = (
            value if isinstance(value, str) else number.format(value) if value else "-"
            for value in values
        )
        lines.append(f"  {name}".ljust(label) + "".join(cell.rjust(WIDTH) for cell in cells))
    return "\n".join(lines)


def million(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count / 1e3:.1f}K"
