"""Legal configurations pass. Wrong ones raise one line that names field, value and remedy.

Rules that need no checkpoint and no other device are in the table of `test_bad_input.py`.
"""

import json
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.checkpoint as dcp
from refusals import refused
from test_bad_input import CP2, RING, RING4, TRAINER
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.metrics import LOSS
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime import cpu_device
from torchtitan.models.llama3 import Transformer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a small run on one rank."""
    path = tmp_path_factory.mktemp("checkpoint") / "step-8"
    state = {
        "dataloader": {"dp_rank_0": pickle.dumps({"documents": 3}), "world_size": 1},
        "train_state": {"step": 8, "ntokens_seen": 8},
    }
    dcp.save(
        {**Transformer(FLAVORS["debugmodel"]).state_dict(), **state},
        checkpoint_id=path,
        no_dist=True,
    )
    return path


@pytest.fixture
def place(tmp_path, corpus, checkpoint) -> SimpleNamespace:
    """Paths for {dump}, {corpus} and other placeholders in the cases."""
    dump = tmp_path / "dump"
    dump.mkdir()
    whole, torn = dump / "whole" / "step-8", dump / "torn" / "step-8"
    for path in (whole, torn):
        shutil.copytree(checkpoint, path)
    (torn / ".metadata").unlink()
    for step in (8, 9):
        shutil.copytree(checkpoint, dump / "later" / f"step-{step}")
    (dump / "empty").mkdir()
    return SimpleNamespace(dump=dump, corpus=corpus, whole=whole)


def check(place: SimpleNamespace, args: str, world_size: int = 1) -> None:
    """Load and check a small run with more arguments."""
    check_config(load_config((TRAINER + args).format(**vars(place)).split()), world_size)


def assert_refused(place: SimpleNamespace, parts: tuple[str, ...], *args, **options) -> None:
    with refused(*(part.format(**vars(place)) for part in parts)):
        check(place, *args, **options)


@pytest.mark.parametrize(
    ("world_size", "args"),
    [
        (1, ""),
        (1, "--lighthouse.stage1_steps 0"),
        (1, "--lighthouse.stage1_steps -1"),
        (1, "--lighthouse.stage1_steps 60"),
        (1, "--lighthouse.stage2_seq_len 2048"),
        (1, "--lighthouse.stage2_seq_len 1 --lighthouse.stage2_full_steps 20"),
        (1, "--lighthouse.stage2_seq_len 512 --lighthouse.stage1_steps -1"),
        (1, "--lighthouse.stage1-steps=60"),
        (1, "--lighthouse.full_attn_layers -4 0 3"),
        (1, "--training.global_batch_size 3"),
        (1, "--checkpoint.enable --checkpoint.keep_latest_k 0"),
        (1, "--checkpoint.enable --checkpoint.last_save_model_only"),
        (1, "--checkpoint.enable --checkpoint.initial_load_path {whole}"),
        (1, "--checkpoint.no_enable --checkpoint.interval 0"),
        (1, "--validation.enable --validation.seq_len 2048"),
        # Without Lighthouse, its rules about lengths do not apply.
        (1, "--training.seq_len 6 --lighthouse.stage1_steps 0"),
        (1, "--validation.enable --validation.seq_len 2047 --lighthouse.stage1_steps 0"),
        (2, ""),
        (2, "--training.loss_chunk_size 64"),
        (2, "--parallelism.data_parallel_shard_degree 2"),
        (4, "--parallelism.tensor_parallel_degree 2"),
        (4, "--parallelism.data_parallel_replicate_degree 2 --training.global_batch_size 8"),
        (2, "--parallelism.context_parallel_degree 2 --lighthouse.stage1_steps 0"),
        (2, CP2),
        (2, f"{CP2} --lighthouse.scorer gla --lighthouse.stage1_steps 0"),
        (2, f"{CP2} {RING} --lighthouse.topk 512"),
        (2, f"{CP2} --lighthouse.stage2_seq_len 1024 --lighthouse.stage2_full_steps 1"),
        # Two batches of two pieces give one piece per rank.
        (4, f"{RING4} --lighthouse.stage2_seq_len 1024 --training.local_batch_size 2"),
    ],
)
def test_what_is_right_passes(place, world_size, args):
    check(place, args, world_size)


def test_the_command_line_overrides_the_file(place):
    path = place.dump.with_suffix(".toml")
    path.write_text('[model]\nflavor = "debugmodel"\n[lighthouse]\ntopk = 128\n')
    for flag in (["--job.config_file", str(path)], [f"--job.config-file={path}"]):
        config = load_config([*flag, "--lighthouse.topk", "256"])
        assert config.lighthouse.topk == 256 and config.model.flavor == "debugmodel"


@pytest.mark.parametrize("section", ["training", "validation"])
def test_the_old_name_of_tokenized_data_works_with_a_warning(section, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "propagate", True)
    config = load_config([f"--{section}.dataset", "prepared"])
    assert getattr(config, section).dataset == "tokenized"
    (message,) = caplog.messages
    assert message == f"{section}.dataset = 'prepared' is now called 'tokenized'; rename it"


@pytest.mark.parametrize(
    ("world_size", "args", "parts"),
    [
        (
            1,
            "--checkpoint.folder whole --checkpoint.load_step 7",
            ("checkpoint.load_step must be -1", "got 7", "use -1"),
        ),
        (
            1,
            "--checkpoint.folder later --checkpoint.load_step 8",
            ("checkpoint.load_step must be the newest in {dump}/later, 9", "got 8", "move newer"),
        ),
        (
            1,
            "--checkpoint.folder empty",
            ("checkpoint.folder must hold a whole", "with no checkpoint", "move the folder"),
        ),
        # A folder of torn checkpoints would be ignored.
        *(
            (
                1,
                f"--checkpoint.folder torn {more}",
                (
                    "checkpoint.folder must hold a whole",
                    "only torn checkpoints (step-8: .metadata, which",
                    "move the folder",
                ),
            )
            for more in ("", "--checkpoint.initial_load_path {whole}")
        ),
        (
            2,
            "--checkpoint.initial_load_path {whole}",
            ("data-parallel degree must be that of {whole}, 1", "got 2", "start 1 processes"),
        ),
        (
            4,
            f"--checkpoint.folder whole {CP2}",
            ("the data-parallel degree", "step-8, 1", "got 2", "start 2 processes", "dataloader"),
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(place, world_size, args, parts):
    assert_refused(place, parts, f"--checkpoint.enable {args}", world_size)


def test_a_ring_in_float32_is_refused_on_a_gpu(place, monkeypatch):
    args = f"{CP2} {RING} --lighthouse.topk 512 --training.mixed_precision_param "
    check(place, args + "float32", world_size=2)
    monkeypatch.setattr(cpu_device, "device_type", lambda: "cuda")
    check(place, args + "bfloat16", world_size=2)
    parts = ("mixed_precision_param must be bfloat16 with", "'ring'", "got 'float32'", "'ulysses'")
    assert_refused(place, parts, args + "float32", world_size=2)


def test_a_checkpoint_whose_metadata_is_torn_is_refused(place):
    (place.whole / ".metadata").write_bytes(b"torn")
    parts = ("initial_load_path must hold a whole", "{whole}", "cannot be read", "an older one")
    assert_refused(place, parts, "--checkpoint.enable --checkpoint.initial_load_path {whole}")


@pytest.mark.parametrize(
    ("last_step", "interval", "is_lost"),
    # The switch after step 40 is also saved.
    [(19, 20, False), (20, 20, False), (21, 20, True), (40, 500, False), (41, 500, True)],
)
def test_checkpoints_that_are_gone_are_missed(place, last_step, interval, is_lost):
    line = {"step": last_step, "stage": 1, LOSS: 3.0}
    (place.dump / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    args = f"--checkpoint.enable --checkpoint.interval {interval}"
    if not is_lost:
        check(place, args)
        return
    parts = ("checkpoint.folder must exist", f"up to step {last_step}", "{dump}/checkpoint")
    assert_refused(place, (*parts, "move metrics.jsonl away"), args)
    # A run without checkpoints saves none, and must not replace a run that has some.
    parts = ("checkpoint.enable must be true", "later/step-9", "another job.dump_folder")
    assert_refused(place, parts, "--checkpoint.no_enable")
    for folder in place.dump.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    check(place, "--checkpoint.no_enable")


def test_a_tokenizer_as_large_as_the_vocabulary_passes(place, monkeypatch):
    monkeypatch.setattr(FLAVORS["debugmodel"], "vocab_size", 257)
    check(place, "")
    monkeypatch.setattr(FLAVORS["debugmodel"], "vocab_size", 256)
    assert_refused(place, ("at most 256 tokens", "got 257", "choose another"), "")


def test_float32_beyond_what_attention_on_a_gpu_can_is_refused(place, monkeypatch):
    args = "--training.seq_len 65552 --lighthouse.stage1_steps 0"
    float32 = args + " --training.mixed_precision_param float32"
    monkeypatch.setattr(cpu_device, "device_type", lambda: "cpu")
    check(place, float32)
    monkeypatch.setattr(cpu_device, "device_type", lambda: "cuda")
    check(place, args)
    check(place, float32.replace("65552", "65520"))
    parts = ("training.mixed_precision_param must be bfloat16", "65535", "'float32'", "set it to")
    assert_refused(place, parts, float32)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_ends_the_program_well(flag, capsys):
    with pytest.raises(SystemExit) as end:
        load_config([flag])
    assert not end.value.code
    assert "--lighthouse.stage1" in capsys.readouterr().out
