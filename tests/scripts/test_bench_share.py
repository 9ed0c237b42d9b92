"""The benchmark of one rank's share: a simulated rank trains, and its metrics are reported."""

import json

import bench_share


def test_a_rank_of_two_is_measured(capsys, monkeypatch):
    options = ["--world-size", "2", "--steps", "3"]
    # What the other rank sends is then NaN, which must not end the run.
    options += ["--debug.deterministic", "--debug.seed", "0"]
    monkeypatch.setattr("sys.argv", ["bench_share.py", "train_configs/cp_smoke_cpu.toml", *options])
    bench_share.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ranks"] == 2 and result["phase"] == "lighthouse"
    assert result["tokens_per_second"] > 0 and result["memory_gib"] > 0
