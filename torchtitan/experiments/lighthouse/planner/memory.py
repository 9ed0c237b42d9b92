"""Peak memory of one rank in a training step.

    always       parameters, moments, the table of rotations, the batch
    kept         tensors that each layer saves for its backward pass, by activation checkpointing
    one layer    other tensors of its backward pass: recomputed tensors and gradients
    loss         logits, or the logits of a chunk, with their gradients
    FSDP         gathered parameters, and gradients that are not yet reduced
    gradients    gradients of the parameters that the backward pass has reached

`timeline` adds them up for each phase of the step in which the sum can be largest. The peak is the
largest sum. The counts are bytes of the tensors that exist in a phase, for torchtitan's Llama 3
block:

    x -> attention norm -> wq, wk, wv -> rotation of q and k -> attention -> wo -> h = x + ...
    h -> feed-forward norm -> gate = w1, up = w3 -> product = silu(gate) * up -> w2 -> h + ...

Assumptions:

- Matrix products, norms and attention need no workspace beside inputs and outputs. The exception
  is the backward pass of attention on a GPU, which sums dq in fp32.
- On a GPU a norm is one kernel. On the CPU, an eager norm also saves its result before the weight.
- The rotation computes in complex fp32, with two such tensors for each of q and k.
- Compiled layers do not save silu(gate). They write the gradients of gate and up over saved gate
  and up. A compiled loss has no logits in fp32. All else is as in eager mode.
- On the CPU the steps of Lighthouse need temporary index tensors. They are not counted, because a
  layer holds less at that time than in the backward pass of its SwiGLU.

Not counted: fragmentation in the allocator, the CUDA context, buffers of NCCL and cuBLAS,
validation, code and the Python process.
"""

from dataclasses import dataclass

from torchtitan.experiments.lighthouse.planner.run_shape import Sizes
from torchtitan.experiments.lighthouse.planner.traffic import KINDS

from lighthouse.costs import Shape

_COMPLEX64, _FP32, _INT32, _INT64 = 8, 4, 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in the steps of one stage."""

    always: dict[str, int]
    """Tensors that exist from the first to the last step, by name."""

    kept_per_layer: dict[str, int]
    """Tensors that a layer saves for its backward pass, by kind: `Lighthouse` or `dense`."""

    phases: dict[str, dict[str, int]]
    """Tensors in addition to `always`, by phase of the step and name."""

    @property
    def peak_phase(self) -> str:
        """The phase in which the rank holds the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Tensors held at the peak, by name."""
        return self.always | self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def stage_memory(sizes: Sizes, stage: int) -> Memory:
    """Memory in the steps of `stage`. The first step of a run needs less: it has no moments yet."""
    kept = {}
    for is_lighthouse, checkpointing in sizes.layers(stage):
        size = sum(kept_tensors(sizes, is_lighthouse, checkpointing).values())
        name = KINDS[is_lighthouse]
        kept[name] = max(size, kept.get(name, 0))
    return Memory(always(sizes), kept, timeline(sizes, stage))


def always(sizes: Sizes) -> dict[str, int]:
    """Tensors that a rank holds in every step, in bytes."""
    shard = -(-sizes.parameters["total"] // sizes.fsdp_degree) * sizes.param_bytes
    rotations = sizes.seq_len * sizes.head_dim // 2 * _COMPLEX64
    # Each rank has the tokens and labels of whole sequences and cuts out its own part.
    batch = 2 * sizes.batch * sizes.seq_len * _INT64
    return {"parameters": shard, "moments": 2 * shard, "rotations": rotations, "batch": batch}


def timeline(sizes: Sizes, stage: int) -> dict[str, dict[str, int]]:
    """Bytes that a rank holds in addition to `always`, by phase of a step and by part.

    Of the backward passes of all layers, only the largest is a phase.
    """
    shard = {
        name: -(-n // sizes.fsdp_degree) * sizes.param_bytes for name, n in sizes.parameters.items()
    }
    # Gradients of earlier micro-batches.
    carried = shard["total"] if sizes.micro_batches > 1 else 0
    layers = sizes.layers(stage)
    kept = [sum(kept_tensors(sizes, *layer).values()) for layer in layers]

    phases = {
        name: {
            "kept": sum(kept) + head_bytes(sizes),
            "loss": size,
            "gradients": carried,
            "FSDP": fsdp_bytes(sizes, "loss"),
        }
        for name, size in loss_phases(sizes).items()
    }
    backward = {}
    for i, layer in enumerate(layers):
        later = len(layers) - 1 - i
        backward[f"backward of layer {i}"] = {
            "kept": sum(kept[:i]),
            "one layer": max(layer_phases(sizes, *layer).values()),
            "gradients": max(shard["head"] + later * shard["layer"], carried),
            "FSDP": fsdp_bytes(sizes, "layer" if later else "last layer"),
        }
    largest = max(backward, key=lambda name: sum(backward[name].values()))
    phases[largest] = backward[largest]
    phases["backward of the embedding"] = {
        "one layer": sizes.rank_tokens * sizes.model_args.dim * sizes.residual_bytes,
        "gradients": shard["total"],
        "FSDP": fsdp_bytes(sizes, "embedding"),
    }
    # `foreach` computes the roots of all second moments at once.
    is_foreach = sizes.config.optimizer.implementation == "foreach"
    phases["optimizer"] = {
        "gradients": shard["total"],
        "optimizer": shard["total"] if is_foreach else 0,
    }
    if sizes.fsdp_degree == 1 and sizes.dp_replicate > 1:
        # DDP copies gradients to buckets and sums them there.
        for parts in phases.values():
            parts["DDP"] = shard["total"]
    return phases


def layer_tensors(sizes: Sizes, is_lighthouse: bool) -> dict[str, int]:
    """The tensors of a layer that its backward pass needs, in bytes, by name."""
    tokens, dim, hidden_dim = sizes.rank_tokens, sizes.model_args.dim, sizes.hidden_dim
    e, residual = sizes.compute_bytes, tokens * dim * sizes.residual_bytes
    out = tokens * sizes.n_heads * sizes.head_dim * e
    tensors = {
        "x": residual,
        "attention norm": _norm(sizes, 3),
        **attention_tensors(sizes, is_lighthouse),
        "out": out,
        "h": residual,
        "feed-forward norm": _norm(sizes, 2),
        "gate": tokens * hidden_dim * e,
        "up": tokens * hidden_dim * e,
        "silu(gate)": 0 if sizes.is_compiled("model") else tokens * hidden_dim * e,
        "product": tokens * hidden_dim * e,
    }
    if sizes.is_autocast:
        tensors["weights"] = sizes.parameters["layer"] * e
    return tensors


def attention_tensors(sizes: Sizes, is_lighthouse: bool) -> dict[str, int]:
    """Tensors that attention saves for its backward pass, except `out`, in bytes, by name.

    Under `ulysses` a rank has some of the heads and the tokens of all ranks. That is as much as all
    heads with this rank's tokens.
    """
    shape = sizes.attention_shape(sizes.attended_len(is_lighthouse) // sizes.cp_degree)
    rows, row = shape.batch * shape.seq_len, shape.head_dim * shape.itemsize
    tensors = {
        "q": rows * shape.n_heads * row,
        "k": rows * shape.n_kv_heads * row,
        "v": rows * shape.n_kv_heads * row,
        "attended": rows * shape.n_heads * row,
        "log-sum-exp": rows * shape.n_heads * _FP32,
    }
    if is_lighthouse:
        entries = sizes.attention.num_entries(sizes.seq_len) // sizes.cp_degree
        ids = sizes.batch * sizes.n_kv_heads * _INT32
        tensors["selection"] = (shape.seq_len + entries) * ids
    elif sizes.cp_scheme is None:
        # The output of attention is `out` itself.
        tensors["attended"] = 0
    if sizes.cp_scheme is not None:
        # Rotations of this rank's positions, copied from the table.
        positions = sizes.seq_len // sizes.cp_degree
        tensors["rotations"] = positions * sizes.head_dim // 2 * _COMPLEX64
    return tensors


def kept_tensors(sizes: Sizes, is_lighthouse: bool, checkpointing: str) -> dict[str, int]:
    """Tensors that a layer saves for its backward pass, in bytes, by name.

    Args:
        checkpointing: `none` saves everything. `full` saves the layer's input, the selection and
            expensive scores. `op` also saves every second matrix product (wq, wv, w1, w2) and the
            tensors exchanged between ranks. On a GPU, `op` saves the outputs of attention, too.
    """
    tensors = layer_tensors(sizes, is_lighthouse)
    if checkpointing == "none":
        return tensors
    names = ["x", "selection"]
    if checkpointing == "op":
        names += ["gate"]
        if sizes.device_type == "cuda":
            names += ["attended" if tensors["attended"] else "out", "log-sum-exp"]
    kept = {name: tensors[name] for name in names if name in tensors}
    if is_lighthouse and sizes.attention.scorer != "norm":
        scored = sizes.attention.num_entries(sizes.seq_len) - sizes.seq_len
        kept["scores"] = 2 * sizes.batch * sizes.n_kv_heads * scored * _FP32
    if checkpointing == "op":
        row = sizes.rank_tokens * sizes.head_dim * sizes.compute_bytes
        kept["wq"], kept["wv"] = row * sizes.n_heads, row * sizes.n_kv_heads
        if not sizes.is_compiled("model"):
            kept["w2"] = sizes.rank_tokens * sizes.model_args.dim * sizes.compute_bytes
        if sizes.cp_scheme == "ulysses":
            names = ("q", "k", "v", "attended")
            kept["exchanged"] = sum(tensors[name] for name in names)
    return kept


def layer_phases(sizes: Sizes, is_lighthouse: bool, checkpointing: str) -> dict[str, int]:
    """Bytes that a layer holds in the phases of its backward pass, including its input."""
    tensors = layer_tensors(sizes, is_lighthouse)
    tokens = sizes.rank_tokens
    heads, kv_heads = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    residual = tensors["x"]
    # The gradient of x or of h, and the inputs of wq, wk, wv.
    around = residual + sum(
        tensors.get(name, 0) for name in ("x", "attention norm", "rotations", "weights")
    )
    shape = sizes.attention_shape(sizes.attended_len(is_lighthouse) // sizes.cp_degree)
    attended = shape.batch * shape.seq_len
    qkv = attended * (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    names = ("q", "k", "v", "log-sum-exp", "selection")
    saved = sum(tensors.get(name, 0) for name in names)
    saved += tensors["attended"] or tensors["out"]
    dattended = attended * heads * shape.itemsize
    dq_sum = attended * heads * _FP32 if sizes.device_type == "cuda" else 0
    dqkv = tokens * (heads + 2 * kv_heads) * sizes.compute_bytes
    # The backward pass of the rotation is a rotation. Its input and output are fp32 copies, unless
    # they are fp32 already.
    rotation = tokens * heads * (_FP32 if sizes.compute_bytes == _FP32 else 2 * _FP32)
    # Gradients of product, silu(gate) and up, or of gate and up. The first frees the product.
    dswiglu = 2 * tensors["gate"] if not sizes.is_compiled("model") else 3 * tensors["gate"]
    if sizes.is_compiled("model") and checkpointing == "none":
        dswiglu = tensors["gate"]
    phases = {
        "SwiGLU": sum(tensors.values()) + residual + dswiglu,
        "attention": around + saved + dattended + dq_sum + qkv * shape.itemsize,
        "rotation": around + dqkv + rotation,
    }
    if is_lighthouse:
        phases["gather"] = around + tensors["selection"] + qkv * shape.itemsize + dqkv
    if sizes.cp_scheme == "ulysses":
        # Three copies of the gradients: the results of attention, the send buffer, the receive
        # buffer.
        phases["exchange"] = around + 3 * qkv * shape.itemsize
    elif sizes.cp_scheme == "ring":
        phases["attention"] += _ring_bytes(sizes, shape)
    return phases


def head_bytes(sizes: Sizes) -> int:
    """Bytes that the last norm and the head save for their backward pass."""
    residual = sizes.rank_tokens * sizes.model_args.dim * sizes.residual_bytes
    weights = sizes.parameters["head"] * sizes.compute_bytes if sizes.is_autocast else 0
    return residual + _norm(sizes, 1, is_compiled=False) + weights


def loss_phases(sizes: Sizes) -> dict[str, int]:
    """Bytes of the logits and the loss, forward and backward.

    Without chunks, torchtitan's loss copies the logits to fp32. Its log-softmax and two gradients
    are each as large. A compiled loss needs only the logits and their gradient. `loss.py` describes
    the loss in chunks.
    """
    tokens, dim = sizes.rank_tokens, sizes.model_args.dim
    vocab, e = sizes.model_args.vocab_size, sizes.compute_bytes
    chunk = min(sizes.config.training.loss_chunk_size, tokens)
    if chunk:
        logits = chunk * vocab * (e if e == _FP32 else e + _FP32)
        dweight = chunk * vocab * e + vocab * dim * e
        kept = tokens * dim * e + vocab * dim * _FP32
        handed_on = tokens * dim * e + vocab * dim * sizes.residual_bytes
        return {"loss": kept + max(logits, dweight), "backward of the loss": kept + handed_on}
    if sizes.is_compiled("loss"):
        return {"loss": tokens * vocab * e, "backward of the loss": 2 * tokens * vocab * e}
    forward = e + _FP32 + (0 if e == _FP32 else _FP32)
    return {"loss": tokens * vocab * forward, "backward of the loss": 3 * tokens * vocab * _FP32}


def fsdp_bytes(sizes: Sizes, phase: str) -> int:
    """Gathered parameters and gradients not yet reduced, in bytes.

    Args:
        phase: `loss`, `last layer`, `layer` or `embedding`.
    """
    if sizes.fsdp_degree == 1:
        return 0
    e, reduced = sizes.compute_bytes, sizes.reduce_bytes
    embedding, layer, head = (sizes.parameters[name] for name in ("embedding", "layer", "head"))
    if phase == "loss":
        policy = sizes.config.parallelism.fsdp_reshard_after_forward
        layers = sizes.model_args.n_layers if policy == "never" else 0
        return (head + layers * layer) * e
    if phase == "embedding":
        return embedding * (2 * e + reduced)
    # Parameters of this layer and the next, and the receive buffer of the next. Gradients, and the
    # copy of them that is summed.
    size = layer * (4 * e + reduced)
    return size + (head * reduced if phase == "last layer" else 0)


def _norm(sizes: Sizes, num_inputs: int, is_compiled: bool | None = None) -> int:
    """Bytes that a norm saves for the `num_inputs` matrix products that read its result."""
    is_compiled = sizes.is_compiled("model") if is_compiled is None else is_compiled
    elements = sizes.rank_tokens * sizes.model_args.dim
    # Autocast makes a copy for each matrix product.
    copies = num_inputs if sizes.is_autocast and not is_compiled else 1
    is_one_kernel = is_compiled or sizes.device_type == "cuda"
    before_weight = 0 if is_one_kernel else elements * sizes.residual_bytes
    return elements * sizes.compute_bytes * copies + before_weight + sizes.rank_tokens * _FP32


def _ring_bytes(sizes: Sizes, shape: Shape) -> int:
    """Buffers of torch's ring attention, backward: fp32 sums and tensors passed around."""
    rows = shape.batch * shape.seq_len * shape.head_dim
    q, kv = rows * shape.n_heads, 2 * rows * shape.n_kv_heads
    is_gathered = sizes.config.parallelism.context_parallel_rotate_method == "allgather"
    # Keys and values of all ranks, or of a neighbour, and the buffer that is sent.
    rotated = kv * shape.itemsize * ((sizes.cp_degree if is_gathered else 1) + 1)
    return (q + kv) * _FP32 + rotated + 2 * kv * _FP32
