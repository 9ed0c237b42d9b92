"""Context parallelism of a Hugging Face model: two ranks compute the same as one."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hf_models import CONFIG, make_model, make_tokens
from ranks import launch

from lighthouse import ContextParallel
from lighthouse.huggingface import register_lighthouse, use_dense, use_lighthouse

NUM_RANKS = 2
SEQ_LEN = 1024
CP_CONFIG = dataclasses.replace(CONFIG, topk=256)
STAGES = {"lighthouse": use_lighthouse, "dense": use_dense}


def step(stage: str, context: ContextParallel | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a batch, or of this rank's shard under context parallelism."""
    register_lighthouse(CP_CONFIG, full_attn_layers=[0], pool_rotary="aligned", context=context)
    model = make_model()
    use_lighthouse(model)
    STAGES[stage](model)
    tokens = make_tokens(batch=2, seq_len=SEQ_LEN + 1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    position_ids = torch.arange(SEQ_LEN)[None]
    if context is not None:
        inputs, labels, position_ids = (context.shard(x, 1) for x in (inputs, labels, position_ids))
    loss = model(
        input_ids=inputs, position_ids=position_ids, labels=labels, shift_labels=labels
    ).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def steps_of_a_rank():
    torch.set_num_threads(1)
    context = ContextParallel.of(dist.group.WORLD, "ulysses")
    results = {stage: step(stage, context) for stage in STAGES}
    results["errors"] = errors_of(context)
    for stage in STAGES:
        loss, gradients = results[stage]
        for x in (loss, *gradients):
            dist.all_reduce(x)
            x /= NUM_RANKS
    return results


def errors_of(context: ContextParallel) -> list[str]:
    register_lighthouse(CP_CONFIG, context=context)
    model = make_model()
    use_dense(model)
    assert model.config._attn_implementation == "sdpa"
    use_lighthouse(model)
    errors = []
    tokens = make_tokens(seq_len=256)
    padded = torch.ones_like(tokens)
    padded[0, :9] = 0
    with torch.no_grad():
        for dense in (False, True):
            if dense:
                use_dense(model)
            try:
                model.eval()(input_ids=tokens, attention_mask=padded)
            except ValueError as error:
                errors.append(str(error))
            try:
                model.train()
                cache = make_model()(input_ids=tokens, use_cache=True).past_key_values
                model(input_ids=tokens[:, :1], past_key_values=cache)
            except ValueError as error:
                errors.append(str(error))
    return errors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(steps_of_a_rank, NUM_RANKS, tmp_path_factory.mktemp("ranks") / "run")


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_compute_what_one_does(stage, ranks):
    loss, gradients = step(stage, None)
    for results in ranks:
        found_loss, found = results[stage]
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
        for gradient, expected in zip(found, gradients, strict=True):
            assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_masks_and_caches_are_refused(ranks):
    mask, cache = "attention_mask must be all ones", "must train without a cache"
    for results in ranks:
        assert len(results["errors"]) == 4
        for error, expected in zip(results["errors"], [mask, cache] * 2, strict=True):
            assert expected in error
