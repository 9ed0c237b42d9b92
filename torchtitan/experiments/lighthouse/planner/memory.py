"""Memory of one rank in a training step: what it holds, and when it holds the most.

    always       parameters, moments, the table of rotations, the batch
    kept         what each layer leaves for its backward pass, by activation checkpointing
    one layer    what its backward pass needs beside: what is computed again, gradients on the way
    loss         logits, or those of a chunk, with their gradients
    FSDP         parameters that are gathered, gradients that are not yet reduced
    gradients    of the parameters, as far as the backward pass has come

`timeline` puts them together for each phase of the step at which the sum can be largest; the peak
is the largest of those sums. All counts are bytes of tensors that exist in that phase, found in
torchtitan's Llama 3 block:

    x -> attention norm -> wq, wk, wv -> rotation of q and k -> attention -> wo -> h = x + ...
    h -> feed-forward norm -> gate = w1, up = w3 -> product = silu(gate) * up -> w2 -> h + ...

What is assumed, beside that:

- Matrix products, norms and attention need no memory but their inputs and outputs, except for an
  fp32 sum of dq in the backward pass of attention on a GPU.
- On a GPU a norm is one kernel; on the CPU, if not compiled, it keeps its result before the weight.
- The rotation computes in complex fp32: two such tensors for each of q and k.
- Compiled layers do not keep silu(gate), and put gradients of gate and up in their places if those
  were kept; a compiled loss has no logits in fp32. Otherwise as without compiling.
- On the CPU the steps of Lighthouse need index tensors for a while. They are not counted: while
  they live, a layer holds less than in the backward pass of its SwiGLU.

Not counted: what the allocator cannot use, the CUDA context, buffers of NCCL and cuBLAS,
validation, code and the Python process.
"""

from dataclasses import dataclass

from torchtitan.experiments.lighthouse.planner.run_shape import Sizes

_COMPLEX64, _FP32, _INT32, _INT64 = 8, 4, 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in the steps of one stage."""

    always: dict[str, int]
    """By name; there from the first to the last step."""

    kept_per_layer: dict[str, int]
    """What a layer leaves for its backward pass, by kind: `Lighthouse` or `dense`."""

    phases: dict[str, dict[str, int]]
    """What comes on top of `always`, by name, in each phase of the step."""

    @property
    def peak_phase(self) -> str:
        """The phase in which the rank holds the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What is held at the peak, by name."""
        return self.always | self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def stage_memory(sizes: Sizes, stage: int) -> Memory:
    """Memory in the steps of `stage`, the first step left out, which has no moments yet."""
    kept = {}
    for layer in range(sizes.model_args.n_layers):
        is_lighthouse = sizes.is_lighthouse(stage, layer)
        size = sum(kept_tensors(sizes, is_lighthouse, sizes.checkpointing(layer)).values())
        name = "Lighthouse" if is_lighthouse else "dense"
        kept[name] = max(size, kept.get(name, 0))
    return Memory(always(sizes), kept, timeline(sizes, stage))


def always(sizes: Sizes) -> dict[str, int]:
    """What a rank holds in every step, in bytes."""
    shard = -(-sizes.parameters["total"] // sizes.fsdp_degree) * sizes.param_bytes
    rotations = sizes.seq_len * sizes.head_dim // 2 * _COMPLEX64
    # Tokens and labels of whole sequences: each rank cuts out its own.
    batch = 2 * sizes.batch * sizes.seq_len * _INT64
    return {"parameters": shard, "moments": 2 * shard, "rotations": rotations, "batch": batch}


def timeline(sizes: Sizes, stage: int) -> dict[str, dict[str, int]]:
    """What a rank holds beside `always` in each phase of a step, in bytes: phase, part, bytes.

    Of the backward passes of all layers the one that holds the most.
    """
    n_layers = sizes.model_args.n_layers
    shard = {
        name: -(-n // sizes.fsdp_degree) * sizes.param_bytes for name, n in sizes.parameters.items()
    }
    # Of the micro-batches before.
    carried = shard["total"] if sizes.micro_batches > 1 else 0
    kinds = [sizes.is_lighthouse(stage, layer) for layer in range(n_layers)]
    kept = [
        sum(kept_tensors(sizes, kind, sizes.checkpointing(layer)).values())
        for layer, kind in enumerate(kinds)
    ]
    head = sum(head_tensors(sizes).values())

    phases = {}
    for name, size in loss_phases(sizes).items():
        phases[name] = {
            "kept": sum(kept) + head,
            "loss": size,
            "gradients": carried,
            "FSDP": fsdp_bytes(sizes, "loss"),
        }
    layers = {}
    for layer in range(n_layers):
        held = layer_phases(sizes, kinds[layer], sizes.checkpointing(layer))
        gradients = shard["head"] + (n_layers - 1 - layer) * shard["layer"]
        layers[f"backward of layer {layer}"] = {
            "kept": sum(kept[:layer]),
            "one layer": max(held.values()),
            "gradients": max(gradients, carried),
            "FSDP": fsdp_bytes(sizes, "last layer" if layer == n_layers - 1 else "layer"),
        }
    largest = max(layers, key=lambda name: sum(layers[name].values()))
    phases[largest] = layers[largest]
    phases["backward of the embedding"] = {
        "one layer": sizes.rank_tokens * sizes.model_args.dim * sizes.residual_bytes,
        "gradients": shard["total"],
        "FSDP": fsdp_bytes(sizes, "embedding"),
    }
    # `foreach` takes the roots of all second moments at once.
    is_foreach = sizes.config.optimizer.implementation == "foreach"
    phases["optimizer"] = {
        "gradients": shard["total"],
        "optimizer": shard["total"] if is_foreach else 0,
    }
    if sizes.fsdp_degree == 1 and sizes.dp_replicate > 1:
        # Buckets that gradients are copied to and summed in.
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
    """What attention keeps for its backward pass but `out`, the input of wo, in bytes, by name.

    Under `ulysses` q, k, v and the output are of some heads and all ranks' tokens, which is as
    much as of all heads and the tokens here.
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
        # It is `out` itself.
        tensors["attended"] = 0
    if sizes.cp_scheme is not None:
        # Those of the positions here, picked out of the table.
        positions = sizes.seq_len // sizes.cp_degree
        tensors["rotations"] = positions * sizes.head_dim // 2 * _COMPLEX64
    return tensors


def kept_tensors(sizes: Sizes, is_lighthouse: bool, checkpointing: str) -> dict[str, int]:
    """What a layer leaves for its backward pass, in bytes, by name.

    Args:
        checkpointing: `none`: everything. `full`: its input, its selection and, where they are
            dear, the scores. `op`: those, the outputs of every second matrix product (wq, wv, w1,
            w2), what went from rank to rank, and on a GPU those of attention.
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
    """What a layer holds in the phases of its backward pass, its input included, in bytes."""
    tensors = layer_tensors(sizes, is_lighthouse)
    tokens = sizes.rank_tokens
    heads, kv_heads = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    residual = tensors["x"]
    # The gradient of x, or of h, and what the wq, wk, wv need.
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
    # The gradient of a rotation is one: its input and its output, where they are not already fp32.
    rotation = tokens * heads * (_FP32 if sizes.compute_bytes == _FP32 else 2 * _FP32)
    # Of product, silu(gate) and up, or gate and up; the first frees the product.
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
        # The gradients as attention gives them, as they are sent, and as they are received.
        phases["exchange"] = around + 3 * qkv * shape.itemsize
    elif sizes.cp_scheme == "ring":
        phases["attention"] += _ring_bytes(sizes, is_lighthouse)
    return phases


def head_tensors(sizes: Sizes) -> dict[str, int]:
    """What the last norm and the head keep for their backward pass, in bytes, by name."""
    residual = sizes.rank_tokens * sizes.model_args.dim * sizes.residual_bytes
    tensors = {"x": residual, "norm": _norm(sizes, 1, is_compiled=False)}
    if sizes.is_autocast:
        tensors["weights"] = sizes.parameters["head"] * sizes.compute_bytes
    return tensors


def loss_phases(sizes: Sizes) -> dict[str, int]:
    """What the logits and the loss need, forward and backward, in bytes.

    Without chunks torchtitan's loss copies the logits to fp32; its log-softmax is as large, and
    so, backward, are two gradients. Compiled, there are the logits and their gradient. In chunks:
    see `loss.py`.
    """
    tokens, dim = sizes.rank_tokens, sizes.model_args.dim
    vocab, e = sizes.model_args.vocab_size, sizes.compute_bytes
    chunk = min(sizes.config.training.loss_chunk_size, tokens)
    if chunk:
        logits = chunk * vocab * (e if e == _FP32 else e + _FP32)
        dweight = chunk * vocab * e + vocab * dim * e
        kept = tokens * dim * sizes.compute_bytes + vocab * dim * _FP32
        handed_on = tokens * dim * sizes.compute_bytes + vocab * dim * _weight_bytes(sizes)
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
    # This layer and the next, and what the next is received in; the gradients, and the copy of
    # them that is summed.
    size = layer * (4 * e + reduced)
    return size + (head * reduced if phase == "last layer" else 0)


def _norm(sizes: Sizes, num_inputs: int, is_compiled: bool | None = None) -> int:
    """Bytes that a norm keeps for the `num_inputs` matrix products that read its result."""
    is_compiled = sizes.is_compiled("model") if is_compiled is None else is_compiled
    elements = sizes.rank_tokens * sizes.model_args.dim
    # Autocast makes a copy for each.
    copies = num_inputs if sizes.is_autocast and not is_compiled else 1
    is_one_kernel = is_compiled or sizes.device_type == "cuda"
    before_weight = 0 if is_one_kernel else elements * sizes.residual_bytes
    return elements * sizes.compute_bytes * copies + before_weight + sizes.rank_tokens * _FP32


def _ring_bytes(sizes: Sizes, is_lighthouse: bool) -> int:
    """Buffers of torch's ring attention, backward: fp32 sums, and what goes round."""
    shape = sizes.attention_shape(sizes.attended_len(is_lighthouse) // sizes.cp_degree)
    rows = shape.batch * shape.seq_len * shape.head_dim
    q, kv = rows * shape.n_heads, 2 * rows * shape.n_kv_heads
    is_gathered = sizes.config.parallelism.context_parallel_rotate_method == "allgather"
    # Keys and values of all ranks, or of this one's neighbours; sent and received.
    rotated = kv * shape.itemsize * ((sizes.cp_degree if is_gathered else 1) + 1)
    return (q + kv) * _FP32 + rotated + 2 * kv * _FP32


def _weight_bytes(sizes: Sizes) -> int:
    """Bytes of an element of a weight, as the model multiplies it."""
    return sizes.param_bytes if sizes.is_autocast else sizes.compute_bytes
