"""Context parallelism on gloo ranks computes the same function as one device."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from layer_inputs import rotary_table
from ranks import launch
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from lighthouse import LighthouseAttention, LighthouseConfig, lighthouse_attention
from lighthouse.context_parallel import (
    ContextParallel,
    UlyssesAttention,
    all_to_all,
    exchange_edges,
)
from lighthouse.gather import scatter_back
from lighthouse.ring import RingAttention
from lighthouse.scorers import score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans

# The largest case has one chunk per stratum, on four ranks with two chunks each.
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=2, topk=1024)
SEQ_LEN = 8 * 256 * 4
HEADS = {"GQA": (8, 4), "MHA": (4, 4)}
HEAD_DIM = 8
# Heads with a quarter of their elements not rotated, and heads without rotary embedding.
ROTARY = {"GQA": rotary_table(6, 4, True, torch.float32), "MHA": None}
CASES = [
    (scheme, dtype, heads)
    for scheme in ("ulysses", "ring")
    for dtype, heads in ((torch.float64, "GQA"), (torch.float32, "MHA"))
]
CASE_IDS = [f"{scheme}-{str(dtype)[6:]}-{heads}" for scheme, dtype, heads in CASES]


def inputs_of(dtype, heads, batch=1, seq_len=SEQ_LEN):
    """The whole q, k, v and gradient of the output, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    n_heads, n_kv_heads = HEADS[heads]
    return [
        torch.randn(batch, n, seq_len, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    ]


def attention_of(context):
    if context.scheme == "ring":
        return RingAttention(context)
    return UlyssesAttention(causal_sdpa, context)


def run(attention, q, k, v, dout):
    """The output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def whole_layer(dtype, heads):
    """The results of a layer on one device, and the slot of each entry."""
    q, k, v, dout = inputs_of(dtype, heads)
    selection = select_spans(score(q, k, v, CONFIG)[0], CONFIG, SEQ_LEN)
    layer = partial(lighthouse_attention, config=CONFIG, rotary=ROTARY[heads])
    return run(layer, q, k, v, dout), selection.entry_to_slot


def on_rank():
    """The results of one rank by case, and those of a layer without the edges of chunks."""
    results = {}
    for scheme, dtype, heads in CASES:
        context = ContextParallel.of(dist.group.WORLD, scheme)
        # torch merges in fp32, so the results are not compared to fp64.
        torch_ring._cp_options.convert_to_f32 = dtype != torch.float64
        q, k, v, dout = (context.shard(x, 2) for x in inputs_of(dtype, heads))
        layer = LighthouseAttention(attention_of(context), CONFIG, ROTARY[heads], context)
        config = context.shard_config(CONFIG, q.shape[2])
        scores, _ = score(q, k, v, config)
        selection = select_spans(scores, config, q.shape[2], context.rank == 0)
        results[scheme, dtype, heads] = run(layer, q, k, v, dout), selection.entry_to_slot
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results["compiled"] = run(compiled, q, k, v, dout)
    results["eager"] = run(layer, q, k, v, dout)
    for scheme in ("ulysses", "ring"):
        context = ContextParallel.of(dist.group.WORLD, scheme)
        for method in ("allgather", "alltoall"):
            torch_ring.set_rotate_method(method)
            shards = [context.shard(x, 2) for x in inputs_of(torch.float32, "GQA", 2, 64)]
            attention = attention_of(context)
            results["dense", scheme, method] = run(
                lambda *x, attention=attention: attention(*x, enable_gqa=True), *shards
            )
    results["dropped"] = without_edges(ContextParallel.of(dist.group.WORLD, "ulysses"))
    return results


def without_edges(context):
    """The outputs of this rank that change if nothing crosses the edges of its chunk."""
    q, k, v, _ = (context.shard(x, 2) for x in inputs_of(torch.float64, "MHA"))
    config = context.shard_config(CONFIG, q.shape[2])
    selection = select_spans(score(q, k, v, config)[0], config, q.shape[2], context.rank == 0)
    sub_out = torch.rand(1, 4, selection.slot_to_entry.shape[-1], HEAD_DIM, dtype=torch.float64) + 1
    edges = exchange_edges(sub_out, selection, context)
    outs = [scatter_back(sub_out, selection, x) for x in (edges, torch.zeros_like(edges))]
    return (outs[0] != outs[1]).any(-1)[0], selection.entry_to_slot, edges


@pytest.fixture(scope="module", params=[2, 4], ids=["W2", "W4"])
def ranks(request, tmp_path_factory):
    return launch(on_rank, request.param, tmp_path_factory.mktemp("ranks") / "run")


@pytest.fixture(scope="module")
def whole():
    return {(dtype, heads): whole_layer(dtype, heads) for _, dtype, heads in CASES}


def joined(shards, scheme, dim):
    """Join the shards of all ranks into one tensor in the order of the sequence."""
    contexts = [ContextParallel("", rank, len(shards), scheme) for rank in range(len(shards))]
    chunks = {}
    for context, shard in zip(contexts, shards, strict=True):
        parts = shard.chunk(context.chunks_per_rank, dim)
        chunks |= zip(context.chunks_of(context.rank), parts, strict=True)
    return torch.cat([chunks[i] for i in sorted(chunks)], dim)


@pytest.mark.parametrize(("scheme", "dtype", "heads"), CASES, ids=CASE_IDS)
def test_selection_is_that_of_one_device(ranks, whole, scheme, dtype, heads):
    # Compare the entries level by level, because every rank numbers its own entries.
    lens = [CONFIG.level_len(level, SEQ_LEN) for level in range(CONFIG.num_levels)]
    shard_lens = [n // len(ranks) for n in lens]
    by_rank = [rank[scheme, dtype, heads][1].split(shard_lens, -1) for rank in ranks]
    expected = whole[dtype, heads][1].split(lens, -1)
    for slots, *shards in zip(expected, *by_rank, strict=True):
        assert torch.equal(joined(shards, scheme, -1) >= 0, slots >= 0)


@pytest.mark.parametrize(("scheme", "dtype", "heads"), CASES, ids=CASE_IDS)
def test_outputs_and_gradients_are_those_of_one_device(ranks, whole, scheme, dtype, heads):
    results = [rank[scheme, dtype, heads][0] for rank in ranks]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, *shards in zip(whole[dtype, heads][0], *results, strict=True):
        torch.testing.assert_close(joined(shards, scheme, 2), one, rtol=tolerance, atol=tolerance)


def test_what_crosses_an_edge_is_the_last_entry_of_each_level(ranks):
    reach = [CONFIG.span(level) - 1 for level in range(1, CONFIG.num_levels)]
    for rank, (changed, _, edges) in enumerate(result["dropped"] for result in ranks):
        if rank == 0:
            assert not changed.any() and not edges.any()
            continue
        slot = ranks[rank - 1]["dropped"][1]
        lens = [CONFIG.level_len(level, SEQ_LEN) // len(ranks) for level in range(3)]
        last = [of_level[0, :, -1] >= 0 for of_level in slot.split(lens, -1)[1:]]
        for head in range(4):
            reached = max(n for n, is_there in zip(reach, last, strict=True) if is_there[head])
            assert changed[head].nonzero().flatten().tolist() == list(range(reached))


def test_compiled_layer_is_the_eager_one(ranks):
    for result in ranks:
        for ours, eager in zip(result["compiled"], result["eager"], strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("scheme", ["ulysses", "ring"])
@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_dense_attention_of_batches(ranks, scheme, method):
    expected = run(
        lambda *x: causal_sdpa(*x, enable_gqa=True), *inputs_of(torch.float32, "GQA", 2, 64)
    )
    results = [rank["dense", scheme, method] for rank in ranks]
    for one, *shards in zip(expected, *results, strict=True):
        torch.testing.assert_close(joined(shards, scheme, 2), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["ulysses", "ring"])
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_every_chunk_has_its_owner(scheme, degree):
    owners = {
        chunk: (rank, place)
        for rank in range(degree)
        for place, chunk in enumerate(ContextParallel("", rank, degree, scheme).chunks_of(rank))
    }
    context = ContextParallel("", 0, degree, scheme)
    assert owners == {chunk: context.owner(chunk) for chunk in range(context.num_chunks)}


@pytest.mark.parametrize(("scheme", "num_chunks"), [("ulysses", 3), ("ring", 6)])
def test_strata_that_do_not_align_are_refused(scheme, num_chunks):
    context = ContextParallel("", 0, 3, scheme)
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=512)
    with pytest.raises(ValueError, match=rf"topk must be a multiple of {128 * num_chunks}.*768"):
        context.shard_config(config, 2 * 2 * 128)


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_scorers_that_look_beyond_a_shard_are_refused(scorer):
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=256, scorer=scorer)
    with pytest.raises(ValueError, match=f"scorer must be norm .*got '{scorer}'; set it to norm"):
        ContextParallel("", 0, 2, "ulysses").shard_config(config, 512)


def test_calls_that_do_not_fit():
    with pytest.raises(ValueError, match="scheme must be one of ulysses, ring, got 'rings'"):
        ContextParallel("", 0, 2, "rings")
    context = ContextParallel("", 0, 2, "ulysses")
    with pytest.raises(ValueError, match="divide into 2 equal chunks, got 9 tokens; use"):
        context.shard(torch.arange(9), 0)
    q = torch.randn(1, 3, 8, 4)
    with pytest.raises(ValueError, match=r"must divide .* got degree 2 and 3 heads; use another"):
        UlyssesAttention(causal_sdpa, context)(q, q, q)


def test_all_to_all_is_an_op(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        x = torch.randn(1, 4, 3, requires_grad=True)
        torch.library.opcheck(all_to_all, (x, dist.group.WORLD.group_name))
    finally:
        dist.destroy_process_group()
