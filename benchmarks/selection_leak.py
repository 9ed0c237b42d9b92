#!/usr/bin/env python3
"""Measure what the selection of Lighthouse Attention tells a token of the tokens behind it.

    benchmarks/selection_leak.py outputs/RUN/checkpoint/step-600 --dataset-path DATA --cuts 512

Which entries are selected depends on all tokens. So the output at a position can depend on later
tokens. At each cut this script computes the loss of the next token twice: with the true text behind
the cut, and with the text of another window there. The input up to the cut is the same, so a causal
model has the same loss. The difference is what the later tokens give away.

Windows are those of the held-out part of a dataset. Cuts stand at random positions, equally
many at each place of a span of the coarsest level. Behind the last token of such a span, the next
token is in another span.

Prints the loss with the true text, and the mean difference and its standard error (nats): of all
cuts, of those whose next token is in the same span of level 1, in another span of level 1 but the
same of the coarsest level, and in another span of the coarsest level.
"""

import argparse
import json
import random

import torch
import torch.nn.functional as F
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import use_stage_1
from torchtitan.experiments.lighthouse.inference.generate import hidden_states
from torchtitan.experiments.lighthouse.inference.load_model import HeldOutText, open_trained
from torchtitan.experiments.lighthouse.inference.loss_by_position import held_out_windows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint of stage 1")
    parser.add_argument("--dataset", default="jsonl")
    parser.add_argument("--dataset-path", required=True, help="folder of the dataset")
    parser.add_argument("--cuts", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="dense attention, for comparison")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=TORCH_DTYPE_MAP)
    options = parser.parse_args()
    trained = open_trained(options.model)
    seq_len, lighthouse = trained.args.max_seq_len, trained.lighthouse
    model = trained.load(options.device, TORCH_DTYPE_MAP[options.dtype], seq_len)
    if not options.dense:
        use_stage_1(model, lighthouse, trained.args.n_layers)
    windows = held_out_windows(trained, HeldOutText(options.dataset, options.dataset_path), seq_len)
    span = lighthouse.pooling_factor ** (lighthouse.num_levels - 1)
    dice = random.Random(0)

    def loss(tokens: torch.Tensor, at: int, label: torch.Tensor) -> float:
        logits = model.output(hidden_states(model, tokens.to(options.device))[0, at])
        return F.cross_entropy(logits.float().cpu(), label).item()

    true, found = [], {"all": [], "level 1": [], "coarsest level": [], "another span": []}
    for i in range(options.cuts):
        cut = span * dice.randrange(seq_len // span - 1) + i % span
        (tokens, labels), (other, _) = dice.sample(windows, 2)
        label = labels[0, cut]
        true.append(loss(tokens, cut, label))
        changed = torch.cat([tokens[:, : cut + 1], other[:, cut + 1 :]], dim=1)
        difference = loss(changed, cut, label) - true[-1]
        within_level_1 = (cut + 1) % lighthouse.pooling_factor
        kind = "coarsest level" if (cut + 1) % span else "another span"
        found["level 1" if within_level_1 else kind].append(difference)
        found["all"].append(difference)
    print(f"{options.model}: {sum(true) / len(true):.4f} with the true text")
    for name, values in found.items():
        values = torch.tensor(values, dtype=torch.float64)
        error = values.std() / len(values) ** 0.5
        print(f"{name:>16}: {values.mean():+.4f} ± {error:.4f} in {len(values)} cuts", flush=True)
    print(json.dumps({"model": options.model, "losses": true, "differences": found}))


if __name__ == "__main__":
    main()
