"""GPU tests: kernels at real sizes, determinism, large offsets, compilation, a training run.

`test_kernels.py` also runs on a GPU if there is one. `scripts/gpu_check.sh` runs both.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_scorers import BY_ATTENTION, BY_ATTENTION_IDS, plain_scores

from lighthouse import LighthouseConfig, RotaryPhases, lighthouse_attention
from lighthouse.gather import gather, scatter_back
from lighthouse.scorers import score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
PAPER = LighthouseConfig(3, 4, 1536)


def random(*shape: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """[B, H, N, D] as a view of [B, N, H, D]."""
    batch, n_heads, seq_len, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (batch, seq_len, n_heads, head_dim)
    x = torch.randn(size, device="cuda", dtype=torch.float32, generator=generator)
    return x.to(dtype).transpose(1, 2).requires_grad_()


def inputs(seq_len: int, n_heads: int = 8, n_kv_heads: int = 8, dtype=torch.bfloat16):
    heads = (n_heads, n_kv_heads, n_kv_heads)
    return [random(1, h, seq_len, 128, dtype=dtype, seed=i) for i, h in enumerate(heads)]


def phases(interleaved: bool, num_rows: int = 16, rotary_dim: int = 128) -> RotaryPhases:
    frequencies = 500_000.0 ** -(torch.arange(0, rotary_dim, 2, device="cuda") / rotary_dim)
    angles = torch.arange(num_rows, device="cuda")[:, None] * frequencies
    return RotaryPhases(angles.cos(), angles.sin(), interleaved)


def succeed(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_selection_at_98k_is_that_of_the_cpu(n_kv_heads):
    q, k, v = inputs(98304, n_kv_heads=n_kv_heads)
    scores, _ = score(q, k, v, PAPER)
    selection = select_spans(scores, PAPER, 98304)
    expected = select_spans(type(scores)(*(x.cpu() for x in scores)), PAPER, 98304)
    assert torch.equal(selection.slot_to_entry.cpu(), expected.slot_to_entry)
    assert torch.equal(selection.entry_to_slot.cpu(), expected.entry_to_slot)


@pytest.mark.parametrize("seed", range(20))
def test_selection_of_many_ties_is_that_of_the_cpu(seed):
    generator = torch.Generator().manual_seed(seed)
    config, seq_len = LighthouseConfig(4, 2, 512), 16384
    num_scores = config.num_entries(seq_len) - seq_len
    tied = torch.randint(0, 4, (2, 2, 3, num_scores), generator=generator).float()
    scores = score(*(torch.zeros(2, 3, seq_len, 16) for _ in range(3)), config)[0]
    expected = select_spans(type(scores)(*tied), config, seq_len)
    selection = select_spans(type(scores)(*tied.cuda()), config, seq_len)
    assert torch.equal(selection.slot_to_entry.cpu(), expected.slot_to_entry)
    assert torch.equal(selection.entry_to_slot.cpu(), expected.entry_to_slot)


@pytest.mark.parametrize("pairs", [None, "interleaved", "halves"])
def test_layer_and_gradients_at_16k_are_as_exact_as_their_attention(pairs):
    """The error is at most twice that of the PyTorch bodies on the same selection, in bf16."""
    config, seq_len = LighthouseConfig(3, 4, 256), 16384
    q, k, v = inputs(seq_len, 4, 2)
    dout = torch.randn(1, 4, seq_len, 128, device="cuda", dtype=torch.bfloat16)

    def run(q, k, v, dout):
        # One selection for all, from the scores of the bf16 inputs on the GPU.
        selection = select_spans(type(scores)(*(x.to(q.device) for x in scores)), config, seq_len)
        rotary = None if pairs is None else phases(pairs == "interleaved").to(q.device)
        _, coarsest = score(q, k, v, config, rotary)
        subs = gather(q, k, v, coarsest, selection, rotary)
        out = scatter_back(causal_sdpa(*subs, enable_gqa=True), selection)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    scores, _ = score(q, k, v, config)
    ours = run(q, k, v, dout)
    exact, plain = (
        run(*(x.detach().cpu().to(dtype).requires_grad_() for x in (q, k, v)), dout.cpu().to(dtype))
        for dtype in (torch.float64, torch.bfloat16)
    )
    for found, truth, reference in zip(ours, exact, plain, strict=True):
        error = (found.cpu().double() - truth).norm() / truth.norm()
        allowed = (reference.double() - truth).norm() / truth.norm()
        assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
def test_scores_by_attention_are_as_exact_as_plain_pytorch(config):
    q, k, v = inputs(2048, 4, 2)
    scores, _ = score(q, k, v, config)
    plain, exact = (
        plain_scores(*(x.detach().cpu().to(dtype) for x in (q, k, v)), config)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for ours, theirs, truth in zip(scores, plain, exact, strict=True):
        error, plain_error = ((x.cpu().double() - truth).norm() for x in (ours, theirs))
        assert 0 < error <= 2 * plain_error


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_scoring_at_98k_needs_no_square(scorer):
    q, k, v = inputs(98304)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scores, _ = score(q, k, v, LighthouseConfig(3, 4, 1536, scorer))
    assert all(x.isfinite().all() for x in scores)
    # Eight copies of v in fp32 are 3 GiB; the logits of all classes and heads would be 36 GiB.
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30


def test_data_path_is_bitwise_repeatable():
    def run():
        q, k, v = inputs(98304)
        scores, coarsest = score(q, k, v, PAPER)
        selection = select_spans(scores, PAPER, 98304)
        subs = gather(q, k, v, coarsest, selection)
        out = scatter_back(subs[2], selection)
        return [*scores, selection.slot_to_entry, out, *torch.autograd.grad(out.sum(), (v,))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("is_aligned", [False, True], ids=["averaged", "aligned"])
def test_layer_is_bitwise_repeatable_with_a_deterministic_attention(is_aligned):
    rotary = phases(interleaved=True) if is_aligned else None
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            q, k, v = inputs(98304)
            out = lighthouse_attention(q, k, v, PAPER, rotary=rotary)
            runs.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


def test_offsets_beyond_int32():
    """With 4M tokens and 2**32 elements, every position gets its contributions."""
    seq_len, config = 2**22, LighthouseConfig(4, 4, 4096)
    x = torch.ones(1, seq_len, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    x.requires_grad_()
    scores, coarsest = score(x, x, x, config)
    selection = select_spans(scores, config, seq_len)
    subs = gather(x, x, x, coarsest, selection)
    assert all((sub == 1).all() for sub in subs)
    out = scatter_back(subs[2], selection)
    expected = torch.zeros(8, seq_len, device="cuda")
    for level in range(4):
        offset, span = config.level_offset(level, seq_len), config.span(level)
        present = (
            selection.entry_to_slot[0, :, offset : offset + config.level_len(level, seq_len)] >= 0
        )
        covered = present.float().repeat_interleave(span, -1)
        expected[:, span - 1 :] += covered[:, : seq_len - span + 1]
    assert torch.equal(out[0, :, :, 0].float(), expected)
    assert torch.equal(out[0, :, :, 127].float(), expected)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.isfinite(dx).all() and (dx[0, :, -1] > 0).all()


def test_attention_without_a_fused_kernel_is_refused():
    q = torch.randn(1, 2, 256, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="No available kernel"):
        causal_sdpa(q, q, q)


def test_compiles_in_one_graph():
    config, seq_len = LighthouseConfig(3, 4, 256), 16384
    q, k, v = inputs(seq_len, 4, 2)
    compiled = torch.compile(lambda *qkv: lighthouse_attention(*qkv, config), fullgraph=True)
    results = []
    for layer in (lambda *qkv: lighthouse_attention(*qkv, config), compiled):
        out = layer(q, k, v)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for eager, graph in zip(*results, strict=True):
        assert (eager - graph).float().norm() <= 1e-2 * eager.float().norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_stage_run(tmp_path, compiled):
    command = [
        sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
        "--job.config_file", str(ROOT / "train_configs" / "debug.toml"),
        "--job.dump_folder", str(tmp_path), "--training.steps", "6",
        "--lr_scheduler.warmup_steps", "2",
        "--lighthouse.stage1_steps", "3", "--training.mixed_precision_param", "bfloat16",
        *(["--compile.enable"] if compiled else []),
    ]  # fmt: skip
    succeed(command)
    assert (tmp_path / "handover.json").exists()
    if not compiled:
        checkpoint, cli = str(tmp_path / "checkpoint" / "step-6"), [sys.executable, "-m"]
        for program in (
            ["generate", checkpoint, "--prompt", "def f(", "--num-tokens", "4"],
            ["eval-loss", checkpoint, "--windows", "1", "--lighthouse"],
            ["eval-passkey", checkpoint, "--lengths", "1024"],
            ["export", checkpoint, "--output", str(tmp_path / "model")],
        ):
            succeed([*cli, "lighthouse_cli", *program])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 0.05), (torch.bfloat16, 0.3)], ids=["fp32", "bf16"]
)
def test_hugging_face_model_agrees_with_the_cpu(dtype, tolerance):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from lighthouse.huggingface import register_lighthouse, use_lighthouse

    # In the first layer equal tokens have equal norms, so rounding would decide the selection.
    register_lighthouse(LighthouseConfig(3, 4, 128), full_attn_layers=[0])
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=4096)
    model = transformers.LlamaForCausalLM(config).train()
    use_lighthouse(model)
    tokens = torch.randint(256, (1, 4096))
    results = []
    for device, autocast_dtype in (("cpu", torch.float32), ("cuda", dtype)):
        model.to(device).zero_grad()
        is_mixed = autocast_dtype != torch.float32
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        weight = model.model.layers[1].self_attn.v_proj.weight
        results.append((loss.item(), weight.grad.cpu().double()))
    (loss, grad), (gpu_loss, gpu_grad) = results
    assert gpu_loss == pytest.approx(loss, rel=1e-3)
    # Rounding changes a few selections. In bf16 on the CPU, the difference is 0.14.
    assert (gpu_grad - grad).norm() <= tolerance * grad.norm()


def test_hugging_face_example(tmp_path):
    pytest.importorskip("transformers", minversion="5.23")
    command = [sys.executable, str(ROOT / "examples" / "train_hf.py"), "--output", str(tmp_path)]
    sizes = ["--steps", "20", "--stage1-steps", "15", "--save-steps", "10"]
    succeed([*command, *sizes])
    assert (tmp_path / "model" / "model.safetensors").exists()
