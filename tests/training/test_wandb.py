"""W&B without a network: the records of a two-stage run."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import STAGE1_STEPS, STEPS, command_line, train, write_corpus
from torchtitan.experiments.lighthouse import metrics

pytest.importorskip("wandb")

HELD_OUT = metrics.VALIDATION_LOSS


def records(path: Path) -> Iterator[bytes]:
    """The records of a W&B file, a log in LevelDB's format after a header of 7 bytes.

    In blocks of 32 KiB, each part of a record has a checksum (4 bytes), its length (2) and its kind
    (1). The kind is the whole record, or its first, middle or last part. Incomplete records are
    left out.
    """
    data, position, parts = path.read_bytes(), 7, []
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        end = position + 7 + int.from_bytes(data[position + 4 : position + 6], "little")
        if end > len(data):
            return
        parts.append(data[position + 7 : end])
        if data[position + 6] in (1, 4):
            yield b"".join(parts)
            parts = []
        position = end


def read(path: Path) -> tuple[dict, dict[int, dict]]:
    """The configuration of a run, and its rows by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    # W&B's own process may still be writing when `wandb.finish` has returned.
    deadline, found = time.monotonic() + 30, []
    while not found or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} does not end"
        time.sleep(0.1)
        found = [Record.FromString(data) for data in records(path)]

    config, rows = {}, {}
    for record in found:
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items
            }
            rows[row["_step"]] = row
    return config, rows


def test_a_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    corpus = write_corpus(tmp_path / "text")
    options = {
        "metrics__enable_wandb": True,
        "validation__enable": True,
        "validation__freq": 2,
        "lighthouse__telemetry_freq": 2,
        "checkpoint__enable": False,
    }
    run = train(command_line(tmp_path / "run", corpus, **options))
    (folder,) = (tmp_path / "run").rglob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    config, rows = read(file)

    assert config["lighthouse"]["stage1_steps"] == STAGE1_STEPS
    assert config["lighthouse"]["full_attn_layers"] == [0, -1]
    assert config["training"]["steps"] == STEPS and config["model"]["flavor"] == "debugmodel"

    assert list(rows) == list(range(1, STEPS + 1))
    assert {step: row[metrics.LOSS] for step, row in rows.items()} == run.losses
    stages = {step: row["lighthouse/stage"] for step, row in rows.items()}
    assert stages == {step: 1 if step <= STAGE1_STEPS else 2 for step in rows}
    assert [step for step, row in rows.items() if metrics.SWITCH in row] == [STAGE1_STEPS]
    # At the switch, the held-out loss with both kinds of attention.
    found = {
        (step, stage): row[f"{HELD_OUT}_stage_{stage}"]
        for step, row in rows.items()
        for stage in (1, 2)
        if f"{HELD_OUT}_stage_{stage}" in row
    }
    lines = metrics.read_metrics(tmp_path / "run", HELD_OUT)
    assert found == {(line["step"], line["stage"]): line[HELD_OUT] for line in lines}
    assert {(STAGE1_STEPS, 1), (STAGE1_STEPS, 2)} <= found.keys()
    assert all(row[HELD_OUT] == found[step, 2] for step, row in rows.items() if (step, 2) in found)
    assert [s for s, row in rows.items() if "telemetry/layer_1/coverage/level_0" in row] == [2]
