"""Unsupported features of a Hugging Face model or batch raise an error that names them."""

import dataclasses

import pytest
import torch
from hf_models import CONFIG, N_LAYERS, QK_NORM, SEQ_LEN, SIZES, make_model, make_tokens
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.masking_utils import create_causal_mask

from lighthouse.context_parallel import ContextParallel
from lighthouse.huggingface import (
    LighthouseSwitch,
    register_lighthouse,
    use_dense,
    use_lighthouse,
)

TOKENS = make_tokens(batch=2)
ONES = torch.ones_like(TOKENS)
PADDED = ONES.clone()
PADDED[1, -7:] = 0
PADDED_LEFT = PADDED.flip(1)
PACKED = torch.arange(SEQ_LEN)[None].repeat(2, 1)
PACKED[1, 100:] -= 100


@pytest.fixture(autouse=True)
def registered():
    register_lighthouse(CONFIG)


@pytest.fixture
def model():
    model = make_model()
    use_lighthouse(model)
    return model


BATCHES = {
    "padding": ({"attention_mask": PADDED}, "attention_mask must be all ones .* got padding"),
    "padding-left": ({"attention_mask": PADDED_LEFT}, "attention_mask must .* got padding"),
    "packing": ({"position_ids": PACKED}, "position_ids must rise by 1"),
    "packing-with-mask": (
        {"position_ids": PACKED, "attention_mask": ONES},
        "position_ids must rise by 1",
    ),
    "mask-4d": (
        {"attention_mask": torch.ones(2, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool)},
        "attention_mask must be all ones .* got a mask",
    ),
    "cu-seq-lens": (
        {"cu_seq_lens_q": torch.tensor([0, 100, SEQ_LEN])},
        "does not support cu_seq_lens_q",
    ),
    "weights": ({"output_attentions": True}, "does not support output_attentions"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_is_not_whole_sequences(name, model):
    batch, message = BATCHES[name]
    with pytest.raises(ValueError, match=message):
        model(input_ids=TOKENS, **batch)
    use_dense(model)
    model(input_ids=TOKENS, **batch)


def test_packing_is_seen_in_the_mask_of_models_that_do_not_pass_positions_on(model):
    embeddings = torch.zeros(2, SEQ_LEN, 8)
    positions = torch.arange(SEQ_LEN)[None]
    assert create_causal_mask(model.config, embeddings, None, None, positions) is None
    with pytest.raises(ValueError, match="position_ids must rise by 1"):
        create_causal_mask(model.config, embeddings, None, None, PACKED)


def test_padding_without_gradients(model):
    """Without gradients but in training mode, the mask reaches the layer."""
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask must be all ones"):
        model(input_ids=TOKENS, attention_mask=PADDED)


def test_a_mask_without_padding_is_none(model):
    expected = model(input_ids=TOKENS).logits
    positions = torch.arange(SEQ_LEN)[None] + 5
    found = model(input_ids=TOKENS, attention_mask=ONES, position_ids=positions - 5).logits
    assert torch.equal(found, expected)
    # Positions may begin anywhere, as in a shard.
    model(input_ids=TOKENS, position_ids=positions)


@pytest.mark.parametrize("name", ["padding", "packing", "packing-with-mask"])
def test_the_same_under_compile(name):
    model = make_model(num_hidden_layers=1)
    use_lighthouse(model)
    batch, message = BATCHES[name]
    batch = {"attention_mask": ONES, "position_ids": torch.arange(SEQ_LEN)[None]} | batch
    if name == "packing":
        del batch["attention_mask"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=message.split(" .*")[0]):
        compiled(input_ids=TOKENS, use_cache=False, **batch)


def test_an_illegal_length(model):
    with pytest.raises(ValueError, match=r"seq_len must be a multiple .* got 511; nearest .* 510"):
        model(input_ids=TOKENS[:, :511])


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_that_does_not_keep_the_selections(kwargs, model):
    model.gradient_checkpointing_enable(kwargs)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="must keep the selections"):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize("family", [*QK_NORM, "phi"])
def test_the_norm_scorer_where_q_and_k_are_normalised(family):
    changes = {"qk_layernorm": True} if family == "phi" else {}
    model = make_model(family, **changes)
    with pytest.raises(ValueError, match=r"scorer must not be norm for .*; use scorer='dilated'"):
        use_lighthouse(model)
    model.set_attn_implementation("lighthouse")
    with pytest.raises(ValueError, match="scorer must not be norm for"):
        model(input_ids=TOKENS)
    register_lighthouse(dataclasses.replace(CONFIG, scorer="dilated"))
    use_lighthouse(model)
    model(input_ids=TOKENS)


def test_a_sliding_window():
    model = make_model("mistral", sliding_window=100)
    use_lighthouse(model)
    with pytest.raises(ValueError, match=r"a sliding window of 100 tokens, got it in layer 0"):
        model(input_ids=TOKENS)
    register_lighthouse(CONFIG, full_attn_layers=range(N_LAYERS))
    found = model(input_ids=TOKENS).logits
    use_dense(model)
    assert torch.equal(found, model(input_ids=TOKENS).logits)


def test_layers_with_a_window_stay_dense_where_they_are_listed():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make_model("gemma3_text", layer_types=types, sliding_window=100)
    config = dataclasses.replace(CONFIG, scorer="dilated")
    for pool_rotary in ("averaged", "aligned"):
        register_lighthouse(config, full_attn_layers=[0, 2], pool_rotary=pool_rotary)
        use_lighthouse(model)
        model(input_ids=TOKENS)
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        model(input_ids=TOKENS, attention_mask=PADDED)
    register_lighthouse(config, full_attn_layers=[0])
    with pytest.raises(ValueError, match="a sliding window of 100 tokens, got it in layer 2"):
        model(input_ids=TOKENS)


def test_dropout():
    model = make_model(attention_dropout=0.1)
    use_lighthouse(model)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 .*, got 0.1"):
        model(input_ids=TOKENS)


def test_sinks():
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2)
    model = GptOssForCausalLM(config).train()
    with pytest.raises(ValueError, match="does not support attention sinks"):
        use_lighthouse(model)
    model.config._attn_implementation = "lighthouse"
    for is_training in (True, False):
        with torch.no_grad(), pytest.raises(ValueError, match="does not support attention sinks"):
            model.train(is_training)(input_ids=TOKENS)


def test_attention_that_is_not_causal():
    model = BertModel(BertConfig(**SIZES, attention_probs_dropout_prob=0)).train()
    model.config._attn_implementation = "lighthouse"
    with pytest.raises(ValueError, match="the mask must be causal"):
        model(input_ids=TOKENS)
    with torch.no_grad(), pytest.raises(ValueError, match="attention that is not causal"):
        model(input_ids=TOKENS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 50.0}, "does not support softcap"),
        ({"position_bias": torch.zeros(1)}, "does not support position_bias"),
        ({"is_causal": False}, "does not support attention that is not causal"),
        ({"something_new": 1}, "does not support something_new, got it in layer 1"),
    ],
)
def test_arguments_of_the_attention(arguments, message, model):
    q = torch.randn(1, 4, SEQ_LEN, 8)
    attention = AttentionInterface()["lighthouse"]
    layer = model.model.layers[1].self_attn
    attention(layer, q, q, q, None, position_ids=PACKED[:1], use_cache=True)
    with pytest.raises(ValueError, match=message):
        attention(layer, q, q, q, None, **arguments)


def test_a_model_that_does_not_use_the_interface(model, monkeypatch):
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(ValueError, match="must use the attention interface of transformers"):
        use_dense(model)


def test_a_name_that_is_not_registered(model):
    for name in ("beacon", "sdpa"):
        with pytest.raises(ValueError, match=f"'{name}' must be registered"):
            use_lighthouse(model, name)


def test_aligned_pooling_without_a_table():
    register_lighthouse(CONFIG, pool_rotary="aligned")
    model = make_model()
    model.set_attn_implementation("lighthouse")
    with pytest.raises(ValueError, match=r"call use_lighthouse\(model\) before training"):
        model(input_ids=TOKENS)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("options", "rope_parameters", "message"),
    [
        ({"full_attn_layers": [3]}, None, "full_attn_layers must be from -3 to 2, got 3"),
        ({"full_attn_layers": [-4]}, None, "full_attn_layers must be from -3 to 2, got -4"),
        (
            {"full_attn_layers": [0, -1, 1]},
            None,
            r"full_attn_layers must leave .* got \[0, -1, 1\] for 3",
        ),
        # Frequencies that depend on the length.
        ({"pool_rotary": "aligned"}, DYNAMIC, "must be averaged for rope_type 'dynamic'"),
        ({"pool_rotary": "aligned"}, LONGROPE, "must be averaged for rope_type 'longrope'"),
    ],
)
def test_settings_that_do_not_fit_the_model(options, rope_parameters, message):
    register_lighthouse(CONFIG, **options)
    model = make_model(rope_parameters=rope_parameters)
    with pytest.raises(ValueError, match=message):
        use_lighthouse(model)


def test_a_model_whose_rotary_embedding_is_not_known(model):
    register_lighthouse(CONFIG, pool_rotary="aligned")
    model.config.model_type = "llama9"
    with pytest.raises(ValueError, match="pool_rotary must be averaged for the model type llama9"):
        use_lighthouse(model)


def test_fields():
    for name in ("sdpa", "eager"):
        with pytest.raises(ValueError, match=f"name must not be .* got '{name}'; choose another"):
            register_lighthouse(CONFIG, name=name)
    with pytest.raises(ValueError, match="pool_rotary must be averaged or aligned, got 'mean'"):
        register_lighthouse(CONFIG, pool_rotary="mean")
    with pytest.raises(ValueError, match="the scheme must be ulysses"):
        register_lighthouse(CONFIG, context=ContextParallel("0", 0, 2, "ring"))
    with pytest.raises(ValueError, match="stage1_steps must be at least -1, got -2"):
        LighthouseSwitch(-2)
