#!/usr/bin/env python3
"""Compare the keys of summaries and tokens in Lighthouse Attention, averaged and aligned.

    benchmarks/probe_summaries.py outputs/passkey/checkpoint/step-1250 --text FILE.jsonl

Reads the first windows of a file of training documents. For every Lighthouse layer of the model,
examines the keys of the tokens in the sub-sequence and of the summaries. A summary is an entry of
the last level above the finest that is not selected.

    norm      mean norm of a summary's key, divided by that of a token's key
    fast      share of a key's squared norm in the faster half of the rotary frequencies
    told      how well a threshold separates the keys of summaries and tokens: area under the ROC
              curve of the better of `norm` and `fast`; 0.5 is chance
    mass      share of the attention of level-0 queries that falls on summaries
    expected  share of summaries among the entries before such a query

Prints one JSON line for each layer and kind of pooling.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.apply_lighthouse import rotary_phases, use_stage_1
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.inference.generate import hidden_states
from torchtitan.experiments.lighthouse.inference.load_model import open_trained

from lighthouse import LighthouseAttention
from lighthouse.gather import gather
from lighthouse.scorers import score
from lighthouse.selection import select_spans


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint of stage 1")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines of documents")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    trained = open_trained(options.model)
    model = trained.load("cpu", torch.float32, trained.args.max_seq_len)
    config, seq_len = trained.lighthouse.attention_config(), trained.args.max_seq_len
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    rotary = rotary_phases(model, config)
    use_stage_1(model, trained.lighthouse, trained.args.n_layers)
    seen = {}
    for name, block in model.layers.items():
        layer = block.attention.inner_attention
        if isinstance(layer, LighthouseAttention):
            layer.register_forward_pre_hook(
                lambda module, qkv, name=name: seen.setdefault(name, []).append(qkv)
            )
    with options.text.open() as lines:
        for line in itertools.islice(lines, options.windows):
            tokens = tokenizer.encode(json.loads(line)["text"], add_bos=True, add_eos=True)
            hidden_states(model, torch.tensor([tokens[:seq_len]]))
    for name, windows in seen.items():
        for kind, phases in (("averaged", None), ("aligned", rotary)):
            trained_with = "trained" if kind == trained.lighthouse.pool_rotary else "not trained"
            found = [probe(qkv, config, phases) for qkv in windows]
            means = {key: sum(x[key] for x in found) / len(found) for key in found[0]}
            print(json.dumps({"layer": name, "pooling": kind, "model": trained_with, **means}))


def probe(qkv, config, rotary) -> dict[str, float]:
    """The figures of one window of one layer."""
    q, k, v = qkv
    seq_len = q.shape[2]
    scores, coarsest = score(q, k, v, config, rotary)
    selection = select_spans(scores, config, seq_len)
    sub_q, sub_k, _ = gather(q, k, v, coarsest, selection, rotary)
    level, index = selection.level, selection.index  # [B, Hkv, S]
    # Entries that stand for their tokens: whose children are not in the sub-sequence.
    is_leaf = torch.zeros_like(level, dtype=torch.bool)
    for above in range(1, config.num_levels):
        first_child = config.level_offset(above - 1, seq_len) + index * config.pooling_factor
        children = selection.entry_to_slot.gather(
            -1, first_child.clamp(max=selection.entry_to_slot.shape[-1] - 1)
        )
        is_leaf |= (level == above) & (children < 0)
    is_token = level == 0
    # Pairs of a rotary embedding: neighbours, from the fastest frequency to the slowest.
    energy = sub_k.square()
    fast = energy[..., : sub_k.shape[-1] // 2].sum(-1) / energy.sum(-1)
    norm = energy.sum(-1).sqrt()
    figures = {
        "norm": norm[is_leaf].mean() / norm[is_token].mean(),
        "fast_summary": fast[is_leaf].mean(),
        "fast_token": fast[is_token].mean(),
        "told": max(told(x[is_leaf], x[is_token]) for x in (norm, fast)),
    }
    length = sub_k.shape[2]
    is_later = torch.arange(length) > torch.arange(length)[:, None]
    logits = (sub_q @ sub_k.mT / sub_k.shape[-1] ** 0.5).masked_fill(is_later, -torch.inf)
    on_leaves = (logits.softmax(-1) * is_leaf[:, :, None]).sum(-1)
    before = is_leaf.cumsum(-1) / torch.arange(1, length + 1)
    figures["mass"] = on_leaves[is_token].mean()
    figures["expected"] = before[is_token].mean()
    return {key: float(value) for key, value in figures.items()}


def told(a: torch.Tensor, b: torch.Tensor) -> float:
    """Area under the ROC curve of telling `a` from `b` by a threshold, in either direction."""
    ranks = torch.cat([a, b]).argsort().argsort()[: len(a)].double()
    area = (ranks.sum() - len(a) * (len(a) - 1) / 2) / (len(a) * len(b))
    return float(max(area, 1 - area))


if __name__ == "__main__":
    main()
