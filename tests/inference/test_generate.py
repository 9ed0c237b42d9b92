"""Generation: same results with and without the cache, and no quadratic tensor."""

import pytest
import torch
from models import GQA, random_model, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.experiments.lighthouse.apply_lighthouse import use_fused_attention
from torchtitan.experiments.lighthouse.data.byte_tokenizer import EOS_ID
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference.generate import (
    generate,
    hidden_states,
    key_value_cache,
    main,
    next_token_logits,
)

MAX_SEQ_LEN = 96
PROMPT = list(b"def read_lines(path):\n")


@pytest.fixture(params=["debugmodel", "gqa"])
def model(request):
    # With seed 0 and torch 2.11, one model repeats five tokens for every prompt.
    return random_model({**FLAVORS, "gqa": GQA}[request.param], MAX_SEQ_LEN, seed=3)


def test_cached_generation_is_uncached_argmax(model):
    tokens = list(PROMPT)
    for _ in range(40):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert generate(model, PROMPT, 40, temperature=0) == tokens[len(PROMPT) :]
    # A model that repeats itself would pass the test with a wrong cache.
    assert len({*tokens[len(PROMPT) :]}) > 5


def test_prefill_is_the_forward_of_the_model(model):
    tokens = torch.randint(0, 320, (2, MAX_SEQ_LEN))
    expected = model(tokens)
    assert torch.equal(model.output(hidden_states(model, tokens)), expected)
    torch.testing.assert_close(next_token_logits(model, tokens), expected[:, -1])


def test_logits_of_every_cached_step(model):
    tokens = torch.randint(0, 320, (2, MAX_SEQ_LEN))
    expected = model.double()(tokens)
    with key_value_cache(model, MAX_SEQ_LEN):
        next_token_logits(model, tokens[:, :50])
        for i in range(50, MAX_SEQ_LEN):
            logits = next_token_logits(model, tokens[:, i : i + 1], start=i)
            # RoPE computes in fp32 for every dtype.
            torch.testing.assert_close(logits, expected[:, i], atol=1e-4, rtol=1e-5)


def test_the_cache_leaves_nothing_behind(model):
    before = [type(m) for m in model.modules()], list(model.state_dict())
    first = generate(model, PROMPT, 8, temperature=0)
    assert ([type(m) for m in model.modules()], list(model.state_dict())) == before
    assert generate(model, PROMPT, 8, temperature=0) == first


def test_samples_follow_from_the_seed(model):
    samples = [generate(model, PROMPT, 12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_a_cold_sample_is_the_likeliest_one(model):
    assert generate(model, PROMPT, 12, temperature=1e-4) == generate(model, PROMPT, 12, 0)


@pytest.mark.parametrize("prompt, num_tokens", [([], 4), (PROMPT, MAX_SEQ_LEN)])
def test_a_prompt_that_does_not_fit(model, prompt, num_tokens):
    with pytest.raises(ValueError, match=f"^prompt and num_tokens must be .* {MAX_SEQ_LEN} tokens"):
        generate(model, prompt, num_tokens, temperature=0)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in tensors)])
        return result


def test_nothing_is_quadratic_in_the_prompt():
    seq_len = 2048
    model = random_model(FLAVORS["quickstart"], seq_len)
    use_fused_attention(model, torch.float32, seq_len, "cudnn")
    with LargestTensor() as largest:
        generate(model, [i % 256 for i in range(seq_len - 4)], 4, temperature=0)
    # The largest size per position is the width of the SwiGLU, not the length or the vocabulary.
    assert largest.size <= seq_len * 384 < seq_len**2


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """The output of `lighthouse generate` for a saved model, or its error line."""
    folder = save(random_model(FLAVORS["debugmodel"], MAX_SEQ_LEN, seed=3), tmp_path, "debugmodel")

    def program(*args: str) -> str:
        monkeypatch.setattr("sys.argv", ["lighthouse generate", str(folder), *args])
        try:
            main()
        except SystemExit as end:
            assert end.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            return line
        return capsys.readouterr().out

    return program


def test_the_program_continues_a_prompt(program):
    model = random_model(FLAVORS["debugmodel"], MAX_SEQ_LEN, seed=3)
    tokens = generate(model, PROMPT, 20, temperature=0)
    assert EOS_ID not in tokens
    # A random model also returns ids that are not bytes.
    text = bytes(PROMPT + [token for token in tokens if token < 256]).decode(errors="replace")
    args = ["--device", "cpu", "--dtype", "float32", "--num-tokens", "20", "--temperature", "0"]
    assert program("--prompt", bytes(PROMPT).decode(), *args) == text + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--num-tokens", "96"], "--prompt and --num-tokens must be at least 1 and at most 96"),
        (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["--device", "tpu"], "--device must be one of cpu"),
    ],
    ids=str,
)
def test_the_program_refuses_in_one_line(program, args, message):
    assert program("--prompt", "x", "--device", "cpu", *args).startswith(f"error: {message}")
