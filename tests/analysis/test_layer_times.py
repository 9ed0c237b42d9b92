"""Layer times: the measurement, and the crossing of the curves."""

import pytest
from torchtitan.experiments.lighthouse.analysis.layer_times import LayerTimes, measure_layer_times

from lighthouse import LighthouseConfig


@pytest.mark.parametrize(
    ("dense", "lighthouse", "expected"),
    [
        ([1, 4, 16], [2, 4, 8], 2000),
        # Halfway on logarithmic axes.
        ([1, 4, 16], [2, 2, 2], 1000 * 2**0.5),
        ([4, 8, 16], [1, 1, 1], None),
        ([1, 1, 1], [2, 3, 4], None),
    ],
    ids=["at_a_length", "between_two", "always_faster", "never_faster"],
)
def test_crossing(dense, lighthouse, expected):
    assert LayerTimes([1000, 2000, 4000], dense, lighthouse).crossing() == pytest.approx(expected)


def test_measures_every_length():
    times = measure_layer_times(LighthouseConfig(topk=128), 1, 16, [2048, 4096], repeats=1)
    assert times.seq_lens == [2048, 4096]
    # Attention over twice the length costs about four times as much. That is more than the noise.
    assert 0 < times.dense[0] < times.dense[1]
    assert all(ms > 0 for ms in times.lighthouse)
