"""LighthouseConfig: rules, derived sizes, and nearest legal values."""

import pytest

from lighthouse import LighthouseConfig


@pytest.mark.parametrize(
    "fields, fragments",
    [
        ({"num_levels": 1}, ["num_levels", "at least 2", "got 1"]),
        ({"num_levels": "3"}, ["num_levels", "integer", "'3'"]),
        ({"topk": True}, ["topk", "integer", "True"]),
        ({"topk": 1536.0}, ["topk", "integer", "1536.0"]),
        ({"pooling_factor": 3}, ["pooling_factor", "power of two", "got 3", "nearest: 2"]),
        ({"pooling_factor": 6}, ["got 6", "nearest: 4"]),
        ({"pooling_factor": 1}, ["got 1", "nearest: 2"]),
        ({"pooling_factor": -4}, ["got -4", "nearest: 2"]),
        ({"topk": 0}, ["topk", "positive multiple of 128", "got 0", "nearest: 128"]),
        ({"topk": 1500}, ["got 1500", "nearest: 1536"]),
        ({"topk": 1410}, ["got 1410", "nearest: 1408"]),
        ({"scorer": "nrom"}, ["scorer", "norm", "'nrom'"]),
        ({"dilation": 0}, ["dilation", "at least 1", "got 0"]),
    ],
)
def test_illegal_field(fields, fragments):
    with pytest.raises(ValueError) as error:
        LighthouseConfig(**fields)
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    "config, seq_len, nearest",
    [
        (LighthouseConfig(3, 4, 128), 2050, "nearest with topk 128: 2048"),
        (LighthouseConfig(3, 4, 128), 100, "nearest with topk 128: 2048"),
        (LighthouseConfig(3, 4, 128), 0, "nearest with topk 128: 2048"),
        (LighthouseConfig(3, 4, 128), 1024, "seq_len 2048"),
        (LighthouseConfig(3, 4, 256), 2048, "nearest: topk 128, or seq_len 4096"),
        (LighthouseConfig(3, 4, 384), 8192, "nearest: topk 256, or seq_len 8"),
        (LighthouseConfig(2, 2, 128), 254, "or seq_len 256"),
    ],
)
def test_illegal_seq_len_names_the_nearest_legal(config, seq_len, nearest):
    with pytest.raises(ValueError) as error:
        config.check_seq_len(seq_len)
    message = str(error.value)
    assert "\n" not in message and str(seq_len) in message and nearest in message


@pytest.mark.parametrize(
    "num_levels, pooling_factor, topk, seq_len, sub_seq_len",
    [
        # The paper's runs, by the formula N/p**(L-1) + (L-1)*p*k.
        (3, 4, 1536, 98304, 6144 + 2 * 4 * 1536),
        (3, 2, 1536, 98304, 24576 + 2 * 2 * 1536),
        (3, 4, 8192, 524288, 32768 + 2 * 4 * 8192),
        (4, 4, 4096, 1048576, 16384 + 3 * 4 * 4096),
        (2, 2, 128, 256, 128 + 2 * 128),
    ],
)
def test_sizes(num_levels, pooling_factor, topk, seq_len, sub_seq_len):
    config = LighthouseConfig(num_levels, pooling_factor, topk)
    config.check_seq_len(seq_len)
    assert config.sub_seq_len(seq_len) == sub_seq_len
    assert config.num_strata == topk // 128
    sizes = [seq_len // pooling_factor**level for level in range(num_levels)]
    assert config.num_entries(seq_len) == sum(sizes)
    assert config.level_offset(num_levels - 1, seq_len) == sum(sizes[:-1])
