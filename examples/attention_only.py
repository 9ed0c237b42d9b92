"""A GPT in plain PyTorch with Lighthouse Attention, without any other library.

    python examples/attention_only.py

It trains on the text of Python's standard library, most steps under Lighthouse and the last ones
dense, and takes less than a minute on a CPU.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lighthouse import LighthouseConfig, causal_sdpa, lighthouse_attention

DIM, N_HEADS, N_LAYERS, VOCAB_SIZE = 128, 4, 2, 256


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: torch.Tensor, config: LighthouseConfig | None) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(2, (3 * N_HEADS, -1))  # [B, N, 3H, D]
        q, k, v = qkv.transpose(1, 2).chunk(3, 1)  # [B, H, N, D]
        out = causal_sdpa(q, k, v) if config is None else lighthouse_attention(q, k, v, config)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, seq_len: int):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, DIM)
        # Learned positions; a rotary embedding would pass its table as `rotary`.
        self.positions = nn.Embedding(seq_len, DIM)
        self.blocks = nn.ModuleList([Block() for _ in range(N_LAYERS)])
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB_SIZE))

    def forward(self, tokens: torch.Tensor, config: LighthouseConfig | None) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, config)
        return self.head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps in all")
    parser.add_argument("--stage1-steps", type=int, default=45, help="steps under Lighthouse")
    parser.add_argument("--seq-len", type=int, default=2048, help="bytes of a sequence")
    options = parser.parse_args()

    torch.manual_seed(0)
    lighthouse = LighthouseConfig(num_levels=3, pooling_factor=2, topk=128)
    lighthouse.check_seq_len(options.seq_len)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)[: 2**21]))
    model = GPT(options.seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        config = lighthouse if step < options.stage1_steps else None
        start = torch.randint(len(text) - options.seq_len, ())
        window = text[start : start + options.seq_len + 1]
        logits = model(window[None, :-1], config)
        loss = F.cross_entropy(logits[0], window[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            stage = "dense" if config is None else "lighthouse"
            print(f"step {step + 1:3d}  {stage:10s}  loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
