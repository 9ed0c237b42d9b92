"""The training benchmark: its measurements, and its classification of kernels."""

import json

import bench_share
import bench_training
import pytest


def test_all_phases_are_measured(capsys, monkeypatch):
    options = ["--flavor", "debugmodel", "--seq-len", "2048", "--topk", "128", "--steps", "3"]
    monkeypatch.setattr("sys.argv", ["bench_training.py", *options, "--dtype", "float32"])
    bench_training.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["speed_up"] == result["lighthouse"] / result["dense"] > 0
    assert result["stage2_seq_len"] == 512 and result["pieces"] > 0
    assert len(result["memory_gib"]) == 3


def test_a_failed_run_tells_why(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_training.py", "--flavor", "unknown"])
    with pytest.raises(SystemExit, match=r"model\.flavor"):
        bench_training.main()


@pytest.mark.parametrize(
    ("script", "options"),
    [(bench_training, []), (bench_share, ["train_configs/debug.toml", "--world-size", "2"])],
)
def test_a_step_must_be_left_to_measure(script, options, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", *options, "--steps", "2"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--steps must be more than the 2 of warm-up, got 2" in capsys.readouterr().err


def test_kernels_are_told_apart_by_name(tmp_path):
    names = {
        "_norm_score_pool_kernel": "score",
        "_select_kernel": "select",
        "_gather_kernel": "gather",
        "_gather_backward_kernel": "gather backward",
        "_scatter_back_kernel": "scatter back",
        "_scatter_back_backward_kernel": "scatter back backward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "fmha_cutlassB_f32_aligned_64x64_k64_sm80": "attention",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
        "ncclDevKernel_AllGather_RING_LL": "between ranks",
        "void at::native::multi_tensor_apply_kernel<...>": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "other",
    }
    events = [{"cat": "kernel", "name": name, "dur": 1000 * 2**i} for i, name in enumerate(names)]
    ignored = [{"cat": "cpu_op", "name": "aten::mm", "dur": 5}, {"name": "process_name"}]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events + ignored}))
    expected = dict.fromkeys([*bench_training.KINDS, "other"], 0)
    for i, kind in enumerate(names.values()):
        expected[kind] += 2**i
    assert bench_training.kernel_times(trace) == expected


def test_a_breakdown_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_training.py", "--breakdown"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_training.main()
    assert "--breakdown needs a GPU" in capsys.readouterr().err
