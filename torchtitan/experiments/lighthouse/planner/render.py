"""What a run will do and need, before a GPU is touched.

    scripts/plan.py train_configs/1m_context.toml --world-size 32 --gpu B200
    scripts/plan.py train_configs/debug.toml --world-size 2 --gpu cpu --lighthouse.topk 256

Checks the configuration as training does, for the given number of processes and device, and
prints lengths, FLOPs, bytes between ranks, memory, and the time that follows from stated rates
(`torchtitan/experiments/lighthouse/planner/`). Fields of the TOML can be
overridden as in training; --json prints the same numbers as one JSON object. A configuration that
cannot run ends it with one line on stderr and exit code 2. Outputs, checkpoints, tokenizer and data
may be there or not: a plan is not a start. Tensor parallelism is not covered.
"""

import argparse
import json

from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.planner.estimate import USABLE_SHARE, Plan, StagePlan, plan
from torchtitan.experiments.lighthouse.planner.gpus import GPUS
from torchtitan.experiments.lighthouse.planner.memory import Memory
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.command_line import Parser, exit_on_value_error

NOTE = "expected from stated rates, not measured"
WIDTH = 12
"""Of a column of numbers."""


def main(args: list[str] | None = None) -> None:
    options, overrides = parse(args)
    gpu = GPUS.get(options.gpu)
    device_type = "cpu" if gpu is None else "cuda"
    with exit_on_value_error():
        if options.world_size < 1:
            raise ValueError(
                f"--world-size must be at least 1, got {options.world_size}; use 1 or more"
            )
        config = load_config(["--job.config_file", options.config, *overrides])
        check_config(config, options.world_size, device_type, is_start=False)
        result = plan(config, options.world_size, gpu)
    print(json.dumps(result.to_json()) if options.json else text(result))


def parse(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and the rest, which is the configuration's."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("config", help="TOML file, before any overrides")
    add("--world-size", type=int, required=True, help="processes, one for each GPU")
    add("--gpu", choices=[*GPUS, "cpu"], default="H100", help="default: H100; cpu: no times")
    add("--json", action="store_true", help="one JSON object in the place of tables")
    return parser.parse_known_args(args)


def text(result: Plan) -> str:
    """The plan in tables of a screen or two."""
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
        f"{run['tokens'] / 1e9:,.2f}B tokens",
    ]
    if run["stage2_seq_len"] < run["seq_len"]:
        full_steps = run["stage2_full_steps"]
        lines.append(
            f"stage 2     sequences in pieces of {run['stage2_seq_len']:,} tokens"
            f"{f'; whole in its last {full_steps:,} steps' if full_steps else ''}"
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
            f"dense too   {'no layer' if not dense else 'layers ' + ', '.join(map(str, dense))}",
        ]
    return "\n".join(lines)


def columns(result: Plan) -> dict[str, StagePlan]:
    """What the tables have a column for."""
    titles = {"2 full": "full length"}
    return {titles.get(name, f"stage {name}"): stage for name, stage in result.stages.items()}


def flops_table(result: Plan) -> str:
    stages = columns(result)
    titles = {"linear": "linear layers", "attention": "attention, half square"}
    found = [stage.flops_per_token for stage in stages.values()]
    rows = {
        titles.get(name, name): [flops[name] / 1e9 for flops in found]
        for name in found[0]
        if any(flops[name] for flops in found)
    }
    rows["computed again"] = [s.recomputed_flops_per_token / 1e9 for s in stages.values()]
    rows["as the log counts for MFU"] = [s.logged_flops_per_token / 1e9 for s in stages.values()]
    rows["PFLOP a step, all ranks"] = [s.flops_per_step / 1e15 for s in stages.values()]
    return table("GFLOP a token", list(stages), rows, "{:,.3f}")


def traffic_table(result: Plan) -> str:
    """Of layers by kind, then of steps."""
    layers = {}
    for stage in result.stages.values():
        for kind, traffic in stage.traffic_per_layer.items():
            layers[f"{kind}"] = traffic
    steps = {name: stage.traffic_per_step for name, stage in columns(result).items()}
    purposes = list(dict.fromkeys(name for traffic in steps.values() for name in traffic))
    if not purposes:
        return ""
    rows = {
        name: [traffic.get(name, 0) / 1e6 for traffic in (layers | steps).values()]
        for name in purposes
    }
    return table("MB sent: layers, steps", [*layers, *steps], rows, "{:,.2f}")


def memory_table(result: Plan) -> str:
    stages = columns(result)
    memories = [stage.memory for stage in stages.values()]
    parts = dict.fromkeys(name for memory in memories for name in memory.parts)
    rows = {
        name: [memory.parts.get(name, 0) / 2**30 for memory in memories]
        for name in parts
        if any(memory.parts.get(name) for memory in memories)
    }
    rows["peak"] = [memory.peak / 2**30 for memory in memories]
    lines = [table("GiB of a rank at its peak", list(stages), rows, "{:,.2f}")]
    for name, memory in zip(stages, memories, strict=True):
        kept = ", ".join(
            f"{size / 2**30:.3f} by a {kind} layer" for kind, size in memory.kept_per_layer.items()
        )
        lines.append(f"  {name}: at the {memory.peak_moment}; kept {kept}")
    if result.gpu is not None:
        lines += [f"  {name}: {fit(result, stage.memory)}" for name, stage in stages.items()]
    return "\n".join(lines)


def fit(result: Plan, memory: Memory) -> str:
    """Whether it fits, in words."""
    usable = USABLE_SHARE * result.gpu.memory
    words = "fits" if memory.peak <= usable else "DOES NOT FIT"
    return (
        f"{words}: {memory.peak / 2**30:.1f} of {usable / 2**30:.0f} GiB, which are "
        f"{USABLE_SHARE:.0%} of the memory of one {result.gpu.name}"
    )


def time_table(result: Plan) -> str:
    stages = columns(result)
    names = dict.fromkeys(name for stage in stages.values() for name in stage.seconds)
    rows = {name: [1e3 * stage.seconds.get(name, 0) for stage in stages.values()] for name in names}
    rows["step"] = [1e3 * sum(stage.seconds.values()) for stage in stages.values()]
    rows["tokens/s/GPU"] = [f"{stage.tokens_per_second:,.0f}" for stage in stages.values()]
    rows["MFU as logged, %"] = [100 * stage.mfu for stage in stages.values()]
    rows["GPU-hours"] = [stage.gpu_hours for stage in stages.values()]
    return table("ms a step", list(stages), rows, "{:,.1f}") + f"\n  {NOTE}"


def totals(result: Plan) -> str:
    """GPU-hours, and those of training dense from the start."""
    dense, world_size = result.dense.gpu_hours, result.run["world_size"]
    hours = result.gpu_hours
    return (
        f"in all      {hours:,.1f} GPU-hours, {hours / world_size:,.1f} hours\n"
        f"all dense   {dense:,.1f} GPU-hours, {dense / world_size:,.1f} hours, "
        f"{dense / hours:.2f} times as long"
    )


def checkpoint_line(result: Plan) -> str:
    facts = result.checkpoints
    if not facts["steps"]:
        return "checkpoints none"
    return (
        f"checkpoints {len(facts['steps'])} of {facts['bytes'] / 2**30:.2f} GiB, the last "
        f"{facts['last_bytes'] / 2**30:.2f}; on disk at most {facts['most_on_disk'] / 2**30:.1f} "
        f"GiB, {facts['left'] / 2**30:.1f} in the end"
    )


def rates(result: Plan) -> str:
    gpu = result.gpu
    return (
        f"rates       {gpu.name}: matrix products {gpu.matmul_flops / 1e12:,.0f}, attention "
        f"{gpu.attention_flops / 1e12:,.0f} and {gpu.attention_backward_flops / 1e12:,.0f} "
        f"TFLOP/s, memory {gpu.bandwidth / 1e12:.1f} TB/s,\n            NVLink "
        f"{gpu.nvlink / 1e9:.0f} and network {gpu.network / 1e9:.0f} GB/s one way; what is assumed "
        "is in torchtitan/experiments/\n            lighthouse/{gpus,plan,memory}.py"
    )


def table(title: str, heads: list[str], rows: dict, number: str, width: int = WIDTH) -> str:
    """Aligned columns; a number of zero is a dash."""
    label = max(len(title), *(len(name) + 2 for name in rows)) + 2
    lines = [title.ljust(label) + "".join(head.rjust(width) for head in heads)]
    for name, values in rows.items():
        cells = (
            value if isinstance(value, str) else number.format(value) if value else "-"
            for value in values
        )
        lines.append(f"  {name}".ljust(label) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


def million(count: int) -> str:
    return f"{count / 1e6:.1f}M"
