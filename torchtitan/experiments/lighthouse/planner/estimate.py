"""Estimate the work, memory and time of a run before it starts, from counts and stated rates.

run_shape.py  tokens, ranks, shards, kinds of layers
memory.py     peak memory of a rank
flops.py      FLOPs, and recomputation by activation checkpointing
traffic.py    bytes sent between ranks
step_time.py  seconds, from stated rates
gpus.py       the rates of GPUs
render.py     the printed tables
"""

from dataclasses import asdict, dataclass, field, replace

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.model_args import model_name
from torchtitan.experiments.lighthouse.planner.flops import (
    flops_per_token,
    logged_flops_per_token,
    recomputed_flops_per_token,
)
from torchtitan.experiments.lighthouse.planner.gpus import Gpu
from torchtitan.experiments.lighthouse.planner.memory import Memory, always, stage_memory
from torchtitan.experiments.lighthouse.planner.run_shape import Sizes
from torchtitan.experiments.lighthouse.planner.step_time import step_seconds
from torchtitan.experiments.lighthouse.planner.traffic import KINDS, layer_traffic, step_traffic

from lighthouse.config import SELECTED_PER_STRATUM

NOTE = "expected from stated rates, not measured"

USABLE_SHARE = 0.9
"""Share of a GPU's memory for what `memory.py` counts. Assumption: the rest covers other uses."""


@dataclass(frozen=True)
class StagePlan:
    """The steps of one stage. Bytes, FLOPs and seconds."""

    steps: int

    flops_per_token: dict[str, float]
    """Model FLOPs, forward and backward, by part: linear, attention, scoring, head, total."""

    recomputed_flops_per_token: float
    """FLOPs that activation checkpointing recomputes."""

    logged_flops_per_token: float
    """FLOPs as torchtitan counts them for MFU."""

    flops_per_step: float
    """FLOPs on all ranks, without recomputation."""

    traffic_per_layer: dict[str, dict[str, int]]
    """Bytes that a rank sends for a layer and micro-batch, by kind of layer and by purpose. If only
    some layers are checkpointed, this is for a checkpointed one."""

    traffic_per_step: dict[str, int]
    """Bytes that a rank sends in a step, by purpose."""

    memory: Memory

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of a step, by part. Empty if the rates are unknown."""

    tokens_per_second: float | None = None
    """Tokens per second of one GPU."""

    mfu: float | None = None
    """Share of the peak rate as torchtitan logs it, by `logged_flops_per_token`."""

    gpu_hours: float | None = None
    """GPU-hours of all steps of the stage."""


@dataclass(frozen=True)
class Plan:
    """The plan of a whole run. See `plan`."""

    run: dict[str, object]
    attention: dict[str, object]
    stages: dict[str, StagePlan]
    """Stages with at least one step, by number. With `lighthouse.stage2_seq_len`, "2" is stage 2
    on pieces, and "2 full" is stage 2 at full length."""

    dense: StagePlan
    """The alternative: all steps with dense attention."""

    checkpoints: dict[str, object]
    gpu: Gpu | None

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all stages. Needs the rates of a GPU."""
        return sum(stage.gpu_hours for stage in self.stages.values())

    def to_json(self) -> dict[str, object]:
        """The plan as JSON types, in bytes, FLOPs and seconds."""
        result = asdict(self)
        found = [*result["stages"].values(), result["dense"]]
        for stage, values in zip([*self.stages.values(), self.dense], found, strict=True):
            values["memory"] |= {
                "peak": stage.memory.peak,
                "peak_moment": stage.memory.peak_phase,
                "parts": stage.memory.parts,
            }
        result["note"] = NOTE
        if self.gpu is not None:
            result["gpu_hours"] = self.gpu_hours
            result["speed_up"] = self.dense.gpu_hours / self.gpu_hours
        return result


def plan(config: JobConfig, world_size: int, gpu: Gpu | None) -> Plan:
    """Plan a run that `preflight.check_config` has passed.

    Args:
        gpu: the GPU of the run. None for the CPU, whose rates are unknown.

    Raises:
        ValueError: the configuration uses a feature that a plan does not cover (`Sizes`).
    """
    sizes = Sizes(config, world_size, "cpu" if gpu is None else "cuda")
    stages = {str(stage): stage_plan(sizes, stage, gpu) for stage in sizes.stages}
    if config.has_pieces and 2 in sizes.stages:
        full_steps = config.lighthouse.stage2_full_steps
        steps = stages.pop("2").steps - full_steps
        if steps:
            stages["2"] = pieces_plan(sizes, gpu, steps)
        if full_steps:
            stages["2 full"] = stage_plan(sizes, 2, gpu, full_steps)
    return Plan(
        run=run_facts(sizes),
        attention=attention_facts(sizes),
        stages=stages,
        dense=stage_plan(sizes, 2, gpu, config.training.steps),
        checkpoints=checkpoint_facts(sizes),
        gpu=gpu,
    )


def run_facts(sizes: Sizes) -> dict[str, object]:
    """Model, tokens and ranks."""
    model, config = sizes.model_args, sizes.config
    checkpointing = config.activation_checkpoint.mode
    if checkpointing == "selective":
        checkpointing += f" {config.activation_checkpoint.selective_ac_option}"
    return {
        "flavor": model_name(config),
        "parameters": sizes.parameters,
        "n_layers": model.n_layers,
        "dim": model.dim,
        "hidden_dim": sizes.hidden_dim,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "vocab_size": model.vocab_size,
        "seq_len": sizes.seq_len,
        "world_size": sizes.world_size,
        "context_parallel": {"degree": sizes.cp_degree, "scheme": sizes.cp_scheme},
        "replicas": sizes.dp_replicate,
        "shards": sizes.fsdp_degree,
        "micro_batches": sizes.micro_batches,
        "sequences_per_step": sizes.tokens_per_step // sizes.seq_len,
        "tokens_per_step": sizes.tokens_per_step,
        "tokens_per_rank": sizes.rank_tokens,
        "steps": config.training.steps,
        "stage_steps": {str(stage): sizes.stage_steps(stage) for stage in (1, 2)},
        "stage2_seq_len": config.lighthouse.stage2_seq_len if config.has_pieces else sizes.seq_len,
        "stage2_full_steps": config.lighthouse.stage2_full_steps,
        "tokens": sizes.tokens_per_step * config.training.steps,
        "activation_checkpoint": checkpointing,
        "compiled": [part for part in ("model", "loss") if sizes.is_compiled(part)],
        "loss_chunk_size": config.training.loss_chunk_size,
    }


def attention_facts(sizes: Sizes) -> dict[str, object]:
    """Sizes of the sub-sequence and its strata. Empty for a run without Lighthouse Attention."""
    if 1 not in sizes.stages:
        return {}
    config, seq_len = sizes.attention, sizes.seq_len
    coarsest = config.level_len(config.num_levels - 1, seq_len)
    below = SELECTED_PER_STRATUM * config.pooling_factor
    return {
        "num_levels": config.num_levels,
        "pooling_factor": config.pooling_factor,
        "topk": config.topk,
        "scorer": config.scorer,
        "pool_rotary": sizes.config.lighthouse.pool_rotary,
        "sub_seq_len": config.sub_seq_len(seq_len),
        "square": (config.sub_seq_len(seq_len) / seq_len) ** 2,
        "level_lens": [config.level_len(level, seq_len) for level in range(config.num_levels)],
        "strata": config.num_strata,
        "chunks": sizes.num_chunks,
        "strata_per_rank": config.num_strata // sizes.cp_degree,
        "strata_per_chunk": config.num_strata // sizes.num_chunks,
        # From the finest level up.
        "candidates_per_stratum": [below] * (config.num_levels - 1)
        + [coarsest // config.num_strata],
        "is_aligned_to_128": config.sub_seq_len(seq_len) % 128 == 0,
        "dense_layers": sorted(sizes.dense_layers),
    }


def stage_plan(sizes: Sizes, stage: int, gpu: Gpu | None, steps: int | None = None) -> StagePlan:
    """Plan the steps of `stage`. `steps` replaces its number of steps."""
    flops = flops_per_token(sizes, stage)
    kinds, checkpointing = map(set, zip(*sizes.layers(stage), strict=True))
    checkpointing = max(checkpointing, key=["none", "op", "full"].index)
    result = StagePlan(
        steps=sizes.stage_steps(stage) if steps is None else steps,
        flops_per_token=flops,
        recomputed_flops_per_token=recomputed_flops_per_token(sizes, stage),
        logged_flops_per_token=logged_flops_per_token(sizes, stage),
        flops_per_step=flops["total"] * sizes.tokens_per_step,
        traffic_per_layer={
            KINDS[kind]: layer_traffic(sizes, kind, checkpointing)
            for kind in sorted(kinds, reverse=True)
        },
        traffic_per_step=step_traffic(sizes, stage),
        memory=stage_memory(sizes, stage),
    )
    if gpu is None:
        return result
    seconds = step_seconds(sizes, stage, gpu)
    step = sum(seconds.values())
    rate = sizes.tokens_per_step / step / sizes.world_size
    return replace(
        result,
        seconds=seconds,
        tokens_per_second=rate,
        mfu=rate * result.logged_flops_per_token / (gpu.logged_peak_flops or gpu.peak_flops),
        gpu_hours=result.steps * step * sizes.world_size / 3600,
    )


def pieces_plan(sizes: Sizes, gpu: Gpu | None, steps: int) -> StagePlan:
    """Plan `steps` steps of stage 2 on pieces."""
    pieces = sizes.in_pieces()
    result = stage_plan(pieces, 2, gpu, steps)
    # The rotation table and the loader's batch have the length of whole sequences.
    memory = replace(result.memory, always=always(sizes))
    traffic = {"pieces": result.traffic_per_layer[KINDS[False]]}
    return replace(result, memory=memory, traffic_per_layer=traffic)


def checkpoint_facts(sizes: Sizes) -> dict[str, object]:
    """Steps at which checkpoints are saved, bytes of each, and the peak disk use.

    A checkpoint holds the parameters and their two moments. Old checkpoints are removed when a new
    one is saved. The checkpoint of the stage switch is kept.
    """
    checkpoint, steps = sizes.config.checkpoint, sizes.config.training.steps
    if not checkpoint.enable:
        return {"steps": [], "bytes": 0, "last_bytes": 0, "most_on_disk": 0, "left": 0}
    stage1_steps = sizes.config.lighthouse.stage1_steps
    switch = stage1_steps if 0 < stage1_steps < steps else None
    saved = {*range(checkpoint.interval, steps + 1, checkpoint.interval), steps}
    saved |= {switch} - {None}
    saved |= {1} if checkpoint.enable_first_step_checkpoint else set()
    parameters = sizes.parameters["total"]
    full = 3 * parameters * sizes.param_bytes
    last = full
    if checkpoint.last_save_model_only:
        last = parameters * TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize
    on_disk, most = [], 0

    def size(kept: list[int]) -> int:
        return sum(last if step == steps else full for step in kept)

    for step in sorted(saved):
        whole = list(on_disk)
        on_disk.append(step)
        most = max(most, size(on_disk))
        if checkpoint.async_mode == "disabled":
            whole.append(step)
        if checkpoint.keep_latest_k:
            kept = {*whole[-checkpoint.keep_latest_k :], switch, step}
            on_disk = [old for old in on_disk if old in kept]
    return {
        "steps": sorted(saved),
        "bytes": full,
        "last_bytes": last,
        "most_on_disk": most,
        "left": size(on_disk),
    }
