"""Adding Lighthouse to a model's attention, removing it, and the FLOPs it saves."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend
from torchtitan.experiments.lighthouse.apply_lighthouse import (
    flops_saved_per_token,
    use_dense,
    use_fused_attention,
    use_lighthouse,
)
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from lighthouse import LighthouseAttention, LighthouseConfig, select
from lighthouse.reference import reference_attention, rope_of
from lighthouse.scorers import squared_norms

N_LAYERS = 4
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, topk=128)
MODEL_ARGS = TransformerModelArgs(
    dim=32, n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=512
)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(MODEL_ARGS)
    with torch.no_grad():
        model.init_weights()
    return model


def wrapped_layers(model: Transformer) -> list[int]:
    return [
        int(name)
        for name, block in model.layers.items()
        if isinstance(block.attention.inner_attention, LighthouseAttention)
    ]


def test_phases_are_those_of_the_model_with_its_scaling():
    scaling = RoPEScalingArgs(scaling_factor=8.0, original_max_position_embeddings=64)
    tables = []
    for args in (MODEL_ARGS, dataclasses.replace(MODEL_ARGS, rope_scaling_args=scaling)):
        model = Transformer(args)
        with torch.no_grad():
            model.init_weights()
        use_lighthouse(model, CONFIG, [0], N_LAYERS, "aligned")
        assert model.layers["0"].attention.inner_attention.__class__ is not LighthouseAttention
        rotary = model.layers["1"].attention.inner_attention.rotary
        assert rotary.interleaved and rotary.cos.shape == (2, MODEL_ARGS.dim // 4 // 2)
        table = torch.complex(rotary.cos, rotary.sin)
        assert torch.equal(table, model.freqs_cis[:2])
        tables.append(table)
        use_dense(model)
        use_lighthouse(model, CONFIG, [0], N_LAYERS)
        assert model.layers["1"].attention.inner_attention.rotary is None
    assert not torch.equal(*tables)


def test_aligned_layers_attend_by_the_rotary_embedding_of_the_model(model):
    """The inputs of a layer give the reference computed from its unrotated q and k."""
    attention = model.layers["0"].attention
    x = torch.randn(1, 512, MODEL_ARGS.dim)
    errors = {}
    with torch.no_grad():
        # As large as those of a trained model.
        attention.wq.weight *= 10
        attention.wk.weight *= 10
        q, k, v = (
            w(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for w in (attention.wq, attention.wk, attention.wv)
        )
        rope = rope_of(model.freqs_cis[1].angle(), interleaved=True)
        for pool_rotary in ("aligned", "averaged"):
            use_lighthouse(model, CONFIG, [], N_LAYERS, pool_rotary)
            seen = []
            attention.inner_attention.register_forward_hook(
                lambda module, qkv, out, seen=seen: seen.extend([*qkv, out])
            )
            attention(x, model.freqs_cis, None)
            use_dense(model)
            selection = select(*(squared_norms(y, 2) for y in seen[:2]), CONFIG)
            levels_and_indices = zip(selection.level[0], selection.index[0], strict=True)
            entries = [
                list(zip(*map(torch.Tensor.tolist, y), strict=True)) for y in levels_and_indices
            ]
            expected = reference_attention(q, k, v, 2, 2, 128, entries=[entries], rope=rope)
            errors[pool_rotary] = (seen[3].double() - expected).norm() / expected.norm()
    assert errors["aligned"] < 1e-4 and errors["averaged"] > 1e-2, errors


@pytest.mark.parametrize(
    ("full_attn_layers", "wrapped"),
    [
        ([], [0, 1, 2, 3]),
        ([0], [1, 2, 3]),
        ([-1], [0, 1, 2]),
        ([0, 1, -2, -1], []),
        ([3, -1], [0, 1, 2]),
        ([-4, 2], [1, 3]),
    ],
    ids=str,
)
def test_all_layers_but_the_dense_ones_are_wrapped(model, full_attn_layers, wrapped):
    inner = [block.attention.inner_attention for block in model.layers.values()]
    use_lighthouse(model, CONFIG, full_attn_layers, N_LAYERS)
    assert wrapped_layers(model) == wrapped
    for layer in wrapped:
        attention = model.layers[str(layer)].attention.inner_attention
        assert attention.inner is inner[layer] and attention.config is CONFIG
    # Remove it twice.
    for _ in range(2):
        use_dense(model)
        assert [block.attention.inner_attention for block in model.layers.values()] == inner


def test_layers_count_in_the_whole_model_for_a_part_of_it(model):
    """A pipeline stage with the last two layers."""
    for name in ("0", "1"):
        del model.layers[name]
    use_lighthouse(model, CONFIG, [-1], N_LAYERS)
    assert wrapped_layers(model) == [2]


def test_wrapping_twice_is_a_mistake_of_ours(model):
    use_lighthouse(model, CONFIG, [], N_LAYERS)
    with pytest.raises(AssertionError):
        use_lighthouse(model, CONFIG, [], N_LAYERS)


def test_names_and_values_stay(model):
    names = ("state_dict", "named_parameters", "named_buffers")
    before = {name: dict(getattr(model, name)()) for name in names}
    for change in (lambda: use_lighthouse(model, CONFIG, [0], N_LAYERS), lambda: use_dense(model)):
        change()
        for name in names:
            after = dict(getattr(model, name)())
            assert list(after) == list(before[name])
            assert all(torch.equal(after[key], value) for key, value in before[name].items())


def test_the_model_attends_with_lighthouse_and_then_again_as_before(model):
    tokens = torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(0))
    dense = model(tokens)
    use_lighthouse(model, CONFIG, [], N_LAYERS)
    lighthouse = model(tokens)
    assert lighthouse.isfinite().all() and not torch.allclose(lighthouse, dense, atol=1e-3)
    use_dense(model)
    assert torch.equal(model(tokens), dense)


@pytest.mark.parametrize(
    ("prefer", "first"),
    [("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)],
)
def test_attention_is_kept_to_fused_kernels(model, prefer, first):
    inner = [block.attention.inner_attention for block in model.layers.values()]
    assert all(SDPBackend.MATH in module.sdpa_backends for module in inner)
    use_fused_attention(model, torch.bfloat16, 512, prefer)
    for module in inner:
        assert module.sdpa_backends[0] == first and SDPBackend.MATH not in module.sdpa_backends
    # The change affects only this model.
    other = Transformer(MODEL_ARGS).layers["0"].attention.inner_attention
    assert SDPBackend.MATH in other.sdpa_backends


def test_fused_attention_changes_nothing_on_the_cpu(model):
    tokens = torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    use_fused_attention(model, torch.float32, 512, "cudnn")
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("full_attn_layers", "saved"),
    [
        # N = 1,024 tokens, S = 1,024/2 + 2*128 = 768 entries: 768 * 768 / 1,024 = 576 positions
        # per token instead of 1,024. 448 less, in each of the layers, for each of the 32 channels
        # of q·k and of p·v, at 2 FLOPs forward and 4 backward.
        ([], 4 * 448 * 32 * 2 * 6),
        ([0, -1], 2 * 448 * 32 * 2 * 6),
        # Layer 3 by both of its indices.
        ([3, -1], 3 * 448 * 32 * 2 * 6),
        ([0, 1, 2, 3], 0),
    ],
    ids=str,
)
def test_flops_saved_per_token(full_attn_layers, saved):
    assert CONFIG.sub_seq_len(1024) == 768
    assert flops_saved_per_token(MODEL_ARGS, CONFIG, full_attn_layers, 1024) == saved


@pytest.mark.parametrize(
    ("scorer", "dilation", "positions"),
    [
        # A token attends to a class of 1,024/4 or 1,024/2 tokens, in both directions.
        ("dilated", 4, 2 * 256),
        ("dilated", 2, 2 * 512),
        # Each head has a state of 8 * 8, which costs as much as 8 positions, in both directions.
        ("gla", 4, 2 * 8),
    ],
)
def test_scoring_by_attention_saves_less(scorer, dilation, positions):
    config = LighthouseConfig(2, 2, 128, scorer, dilation)
    by_norm = flops_saved_per_token(MODEL_ARGS, CONFIG, [0], 1024)
    saved = flops_saved_per_token(MODEL_ARGS, config, [0], 1024)
    # 2 FLOPs, forward only, for the 32 channels of q·k and of p·v in each of the three layers.
    assert saved == pytest.approx(by_norm - 3 * positions * 32 * 2 * 2)


def test_flops_saved_by_the_papers_recipe():
    model_args = TransformerModelArgs(dim=1024, n_layers=30, n_heads=8)
    config = LighthouseConfig(num_levels=3, pooling_factor=2, topk=1536)
    # S = 98,304/4 + 2 * 2 * 1,536 = 30,720, and 30,720**2 / 98,304 = 9,600.
    saved = 26 * (98304 - 9600) * 1024 * 2 * 6
    assert flops_saved_per_token(model_args, config, [0, 1, 28, 29], 98304) == saved
