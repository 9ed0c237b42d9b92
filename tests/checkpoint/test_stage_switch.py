"""The record of the stage switch. Its digests change with every element and every name."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from torchtitan.experiments.lighthouse.checkpoint.stage_switch import (
    data_positions,
    digest,
    state_digests,
    write_handover,
)

pytestmark = pytest.mark.usefixtures("one_rank")


def test_the_digest_is_sha256_of_names_and_values_in_order():
    values = torch.arange(12.0).view(3, 4)
    tensors = {
        "a": values,
        "transposed": values.t(),
        "b": values.bfloat16(),
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    shard = hashlib.sha256()
    for name, tensor in tensors.items():
        bits = tensor.view(torch.int16) if name == "b" else tensor
        shard.update(name.encode() + bits.numpy().tobytes())
    expected = hashlib.sha256(shard.hexdigest().encode()).hexdigest()
    assert digest(tensors.items()) == expected


@pytest.fixture
def trainer() -> SimpleNamespace:
    """The model and the optimizer of a trainer after one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return SimpleNamespace(model_parts=[model], optimizers=SimpleNamespace(optimizers=[optimizer]))


def test_state_digests_cover_every_parameter(trainer):
    before = state_digests(trainer)
    assert state_digests(trainer) == before
    for parameter in trainer.model_parts[0].parameters():
        with torch.no_grad():
            parameter[0] += 1
            changed = state_digests(trainer)
            parameter[0] -= 1
        assert changed["parameters"] != before["parameters"]
        assert changed["optimizer"] == before["optimizer"]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_state_digests_cover_every_moment(trainer, key):
    before = state_digests(trainer)
    for state in trainer.optimizers.optimizers[0].state.values():
        kept = state[key].clone()
        state[key] += 1
        changed = state_digests(trainer)
        state[key].copy_(kept)
        assert changed["optimizer"] != before["optimizer"]
        assert changed["parameters"] == before["parameters"]
    assert state_digests(trainer) == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_workers_position_is_unknown(num_workers):
    dataset = SimpleNamespace(position=lambda: {"epoch": 1})
    dataloader = SimpleNamespace(num_workers=num_workers, dataset=dataset, state_dict=dict)
    expected = {"epoch": 1} if num_workers == 0 else None
    assert data_positions(SimpleNamespace(dataloader=dataloader)) == [expected]


def test_the_record_is_written_whole_and_over_an_older_one(tmp_path):
    for step in (1, 2):
        path = write_handover(str(tmp_path / "new"), {"from": "lighthouse", "step": step})
        assert path == tmp_path / "new" / "handover.json"
        assert json.loads(path.read_text()) == {"from": "lighthouse", "step": step}
    assert [file.name for file in path.parent.iterdir()] == ["handover.json"]
