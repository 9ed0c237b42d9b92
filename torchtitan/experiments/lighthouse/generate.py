"""Text from a checkpoint, by the dense model that training ends with.

A checkpoint of either stage is a plain Llama 3 checkpoint; here it is read as one.
"""

import dataclasses
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse import FLAVORS
from torchtitan.models.llama3 import Transformer


def load_dense_model(flavor: str, checkpoint: str | Path, max_seq_len: int) -> Transformer:
    """The model of a training checkpoint with dense attention, in fp32 on the CPU.

    Args:
        flavor: `model.flavor` of the run.
        checkpoint: a checkpoint's folder, `.../step-N`.
        max_seq_len: the longest sequence the model will see, in tokens.
    """
    model = Transformer(dataclasses.replace(FLAVORS[flavor], max_seq_len=max_seq_len))
    with torch.no_grad():
        model.init_weights()
    state_dict = model.state_dict()
    with warnings.catch_warnings():
        # It is a single process indeed.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state_dict, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state_dict)
    return model.eval()


@torch.no_grad()
def generate(
    model: Transformer, prompt: list[int], num_tokens: int, temperature: float, seed: int
) -> list[int]:
    """Continue `prompt` by `num_tokens` tokens, sampled at `temperature`.

    The whole sequence is computed again for every token: for samples, not for serving.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt])
    for _ in range(num_tokens):
        logits = model(tokens[:, -model.model_args.max_seq_len :])[0, -1]
        probabilities = torch.softmax(logits / temperature, -1)
        token = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, token[None]], 1)
    return tokens[0, len(prompt) :].tolist()
