"""Hugging Face models with Lighthouse: each family, and equality with our torchtitan model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hf_models import CONFIG, FAMILIES, N_LAYERS, QK_NORM, SEQ_LEN, make_model, make_tokens
from models import GQA, random_model
from torchtitan.experiments.lighthouse import apply_lighthouse
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lighthouse.huggingface import (
    gradient_checkpointing_kwargs,
    register_lighthouse,
    use_dense,
    use_lighthouse,
)
from lighthouse.reference import reference_attention
from lighthouse.rotary import rotate

NUM_STEPS = 40
STAGE1_STEPS = 30


def pair_of_models(pool_rotary):
    """Models with the same weights and Lighthouse, for torchtitan and for transformers.

    The first layer is dense. Its q have equal norms for equal tokens, so rounding would decide the
    selection there.
    """
    ours = random_model(GQA, SEQ_LEN).train().requires_grad_(True)
    theirs = LlamaForCausalLM(LlamaConfig(**hf_llama.to_config(ours.model_args)))
    weights = hf_llama.Llama3Adapter(ours.model_args, None).to_hf(ours.state_dict())
    theirs.load_state_dict({name: weight.clone() for name, weight in weights.items()})
    apply_lighthouse.use_lighthouse(ours, CONFIG, [0], GQA.n_layers, pool_rotary)
    register_lighthouse(CONFIG, full_attn_layers=[0], pool_rotary=pool_rotary)
    use_lighthouse(theirs.train())
    return ours, theirs


def losses_of(model, logits_of, dense):
    """Losses of 30 steps with Lighthouse and 10 dense steps, on batches that depend on the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(NUM_STEPS):
        if step == STAGE1_STEPS:
            dense(model)
        tokens = make_tokens(seq_len=257, seed=step)
        loss = F.cross_entropy(logits_of(tokens[:, :-1])[0], tokens[0, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "pool_rotary", [pytest.param("averaged", marks=pytest.mark.slow), "aligned"]
)
def test_the_loss_curve_is_that_of_torchtitan(pool_rotary):
    ours, theirs = pair_of_models(pool_rotary)
    expected = losses_of(ours, ours, apply_lighthouse.use_dense)
    found = losses_of(theirs, lambda x: theirs(input_ids=x).logits, use_dense)
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("pool_rotary", ["averaged", "aligned"])
def test_gradients_are_those_of_torchtitan(pool_rotary):
    ours, theirs = pair_of_models(pool_rotary)
    tokens = make_tokens(batch=2)
    F.cross_entropy(ours(tokens).flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(theirs(input_ids=tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    expected = hf_llama.Llama3Adapter(ours.model_args, None).to_hf(gradients)
    found = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name


def config_for(family):
    return dataclasses.replace(CONFIG, scorer="dilated" if family in QK_NORM else "norm")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_table_is_that_of_the_model(family):
    """With one token at every position, q and k of neighbours differ only by a rotation."""
    model = make_model(family)
    register_lighthouse(config_for(family), pool_rotary="aligned")
    use_lighthouse(model)
    captured = []

    def capture(module, q, k, *args, **kwargs):
        captured.append((module.lighthouse_rotary, q, k))
        return sdpa_attention_forward(module, q, k, *args, **kwargs)

    AttentionInterface.register("capture", capture)
    model.set_attn_implementation("capture")
    with torch.no_grad():
        model(input_ids=torch.full((1, 2), 7))
    assert len(captured) == N_LAYERS
    for rotary, q, k in captured:
        for x in (q, k):
            rotated = rotate(x[:, :, 0], rotary.cos[1], rotary.sin[1], interleaved=False)
            assert not torch.allclose(x[:, :, 0], x[:, :, 1], rtol=1e-3)
            torch.testing.assert_close(rotated, x[:, :, 1], rtol=1e-4, atol=1e-5)


def test_the_rotary_table_is_fp32_under_another_default_dtype():
    register_lighthouse(CONFIG, pool_rotary="aligned")
    model = make_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        use_lighthouse(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.model.layers[0].self_attn.lighthouse_rotary.cos.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_attends_by_lighthouse_in_training(family):
    """Outputs of each layer equal the reference, with the model's own scale of the logits."""
    model = make_model(family)
    config = config_for(family)
    register_lighthouse(config)
    lighthouse = AttentionInterface()["lighthouse"]
    captured = []

    def capture(module, q, k, v, *args, **kwargs):
        result = lighthouse(module, q, k, v, *args, **kwargs)
        captured.append((q * kwargs["scaling"] * q.shape[3] ** 0.5, k, v, result[0]))
        return result

    AttentionInterface.register("capture", capture)
    model.set_attn_implementation("capture")
    model(input_ids=make_tokens(seq_len=256))
    assert len(captured) == N_LAYERS
    q, k, v, out = (x.detach() for x in captured[0])
    levels = config.num_levels, config.pooling_factor, config.topk
    expected = reference_attention(q, k, v, *levels, config.scorer, config.dilation)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-tied", "gpt_neox", "gemma3_text"])
def test_dense_outside_training(family):
    model = make_model(family).eval()
    register_lighthouse(config_for(family))
    tokens = make_tokens(batch=2, seq_len=100)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    prompt = {"input_ids": tokens, "attention_mask": mask}
    generate = {**prompt, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = model(**prompt).logits, model.generate(**generate)
        use_lighthouse(model)
        assert torch.equal(model(**prompt).logits[mask > 0], expected[0][mask > 0])
        assert torch.equal(model.generate(**generate), expected[1])


def test_a_cache_of_earlier_tokens_is_attended_densely():
    model = make_model()
    tokens = make_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[:, 256:]
        # In training mode, the first part would use Lighthouse.
        cache = model(input_ids=tokens[:, :256], use_cache=True).past_key_values
        register_lighthouse(CONFIG)
        use_lighthouse(model)
        found = model(input_ids=tokens[:, 256:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "expected"), [([], [0, 1, 2]), ([0, -1], [1]), ([1], [0, 2])])
def test_full_attn_layers_stay_dense(layers, expected, monkeypatch):
    found = []
    register_lighthouse(CONFIG, full_attn_layers=layers)
    attention = AttentionInterface()["lighthouse"]
    rotary = type(attention)._rotary
    monkeypatch.setattr(
        type(attention),
        "_rotary",
        lambda self, module, device: found.append(module.layer_idx) or rotary(self, module, device),
    )
    model = make_model()
    use_lighthouse(model)
    model(input_ids=make_tokens())
    assert found == expected


def test_use_dense_is_the_dense_model():
    model = make_model()
    tokens = make_tokens()
    expected = model(input_ids=tokens).logits
    register_lighthouse(CONFIG)
    use_lighthouse(model)
    assert not torch.allclose(model(input_ids=tokens).logits, expected, rtol=1e-3)
    use_dense(model)
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_the_saved_model_has_no_trace_of_it(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "before")
    register_lighthouse(CONFIG, pool_rotary="aligned")
    use_lighthouse(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("before", "after")
    )
    assert before == after and b"lighthouse" not in after["config.json"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.config._attn_implementation == "sdpa"
    tokens = make_tokens()
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, expected)


def test_the_name_is_known_to_from_pretrained(tmp_path):
    make_model().save_pretrained(tmp_path)
    register_lighthouse(CONFIG, name="sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse").train()
    expected = make_model()
    use_lighthouse(expected, "sparse")
    tokens = make_tokens()
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_gradient_checkpointing_changes_nothing(scorer):
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model()
        register_lighthouse(dataclasses.replace(CONFIG, scorer=scorer))
        use_lighthouse(model)
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs())
        tokens = make_tokens()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_in_one_graph():
    model = make_model()
    register_lighthouse(CONFIG, full_attn_layers=[0], pool_rotary="aligned")
    use_lighthouse(model)
    tokens = make_tokens()
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch, use_cache=False).loss, expected)


@pytest.mark.parametrize("is_autocast", [False, True], ids=["parameters", "autocast"])
def test_bf16(is_autocast):
    """Under autocast the rotary embedding of the model returns q and k in fp32, and v is bf16."""
    model = make_model().to(torch.float32 if is_autocast else torch.bfloat16)
    register_lighthouse(CONFIG, pool_rotary="aligned")
    use_lighthouse(model)
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected = make_model()
    use_lighthouse(expected)
    assert abs(loss.item() - expected(input_ids=tokens, labels=tokens).loss.item()) < 0.02
