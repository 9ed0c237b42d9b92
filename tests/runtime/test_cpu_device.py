"""The CPU as torchtitan's device: initial parameters of the ranks."""

import torch
from ranks import launch
from runs import command_line, trainer_of
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse.config.load import load_config


def initial_weights(args: list[str]) -> dict[str, torch.Tensor]:
    """The full parameters of a new trainer."""
    with trainer_of(load_config(args)) as trainer:
        (model,) = trainer.model_parts
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def test_ranks_start_from_the_parameters_of_one_process(corpus, tmp_path):
    """Without the fix, both halves of each sharded parameter would be equal."""
    args = command_line(tmp_path / "run", corpus, debug__seed=3)
    one = launch(initial_weights, 1, tmp_path / "one", args)[0]
    for rank in launch(initial_weights, 2, tmp_path / "two", args):
        assert rank.keys() == one.keys()
        assert all(torch.equal(rank[name], one[name]) for name in one)
