"""The soak test: what it refuses before it starts a run."""

import pytest
import soak


@pytest.mark.parametrize("option", ["--minutes", "--every"])
@pytest.mark.parametrize("value", ["nan", "0", "-1"])
def test_a_time_that_is_not_above_0_is_refused(option, value, tmp_path, monkeypatch, capsys):
    args = ["soak.py", "run.toml", "--output", str(tmp_path / "run"), f"{option}={value}"]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as end:
        soak.main()
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} must be above 0, got {float(value)}; ")
