"""The benchmark of one rank's share: a simulated rank trains, and its metrics are reported."""

import json

import bench_share


def test_a_rank_of_two_is_measured(capsys, monkeypatch):
    sizes = ["--world-size", "2", "--steps", "3"]
    monkeypatch.setattr("sys.argv", ["bench_share.py", "train_configs/cp_smoke_cpu.toml", *sizes])
    bench_share.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ranks"] == 2 and result["phase"] == "lighthouse"
    assert result["tokens_per_second"] > 0 and result["memory_gib"] > 0
