"""Two runs of one configuration are equal in every bit."""

import pytest
import torch
from runs import assert_same_state, command_line, train, write_corpus


@pytest.mark.parametrize("scorer", ["norm", "gla"])
def test_two_runs_of_a_configuration_are_identical(tmp_path, scorer):
    corpus = write_corpus(tmp_path / "corpus")
    options = {
        "debug__deterministic": True,
        "lighthouse__scorer": scorer,
        "activation_checkpoint__mode": "full",
    }
    try:
        first, second = (
            train(command_line(tmp_path / name, corpus, **options)) for name in ("first", "second")
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.losses == second.losses and len(first.losses) == 7
    assert first.batches == second.batches
    assert_same_state(first, second)


def test_another_seed_is_another_run(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    options = {"training__steps": 2, "lighthouse__stage1_steps": -1, "checkpoint__enable": False}
    first, second = (
        train(command_line(tmp_path / str(seed), corpus, **options, debug__seed=seed))
        for seed in (0, 1)
    )
    assert all(first.losses[step] != second.losses[step] for step in (1, 2))
