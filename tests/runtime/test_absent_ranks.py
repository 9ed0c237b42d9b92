"""The error names the rank that is absent, not the one whose connection broke first."""

import pytest
import torch.distributed as dist
from torchtitan.experiments.lighthouse.runtime import absent_ranks as module
from torchtitan.experiments.lighthouse.runtime.absent_ranks import (
    absent_ranks,
    announce,
    description,
    is_of_communication,
)


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process act as each of three ranks in turn."""
    store, current = dist.HashStore(), {}
    monkeypatch.setattr(module, "_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: current["rank"])
    for current["rank"] in range(3):
        announce()
    return lambda rank: current.update(rank=rank)


def test_who_has_not_reported_is_absent_and_told_by_its_place(as_rank, monkeypatch):
    monkeypatch.setattr(module, "_host", lambda: "other")
    as_rank(1)
    announce()
    as_rank(0)
    assert absent_ranks(7, 0.1).keys() == {1, 2}
    as_rank(2)
    absent = absent_ranks(7, 0.1)
    assert absent.keys() == {1}
    line = description(absent, 7)
    assert line.startswith("rank 1 (process ") and " on other) did not reach step 7" in line
    assert "py-spy" in line and "\n" not in line
    as_rank(1)
    assert absent_ranks(7, 0.1) == {}


def test_the_reports_of_another_step_do_not_count(as_rank):
    for rank in range(3):
        as_rank(rank)
        absent_ranks(6, 0)
    assert absent_ranks(7, 0.1).keys() == {0, 1}


def test_a_store_that_does_not_answer_names_no_one(as_rank, monkeypatch):
    as_rank(0)

    def fail():
        raise dist.DistNetworkError("broken pipe")

    monkeypatch.setattr(module, "_store", fail)
    assert absent_ranks(7, 0.1) == {}


def test_an_error_of_one_rank_alone_is_none_of_communication():
    assert is_of_communication(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed"))
    assert is_of_communication(dist.DistBackendError("NCCL error"))
    assert not is_of_communication(RuntimeError("CUDA out of memory"))
    assert not is_of_communication(ValueError("Connection closed by peer"))
    assert not is_of_communication(None)
