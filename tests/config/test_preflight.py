"""Each wrong configuration raises one line that names field, value and remedy."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.metrics import LOSS
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime import cpu_device
from torchtitan.models.llama3 import Transformer

# A legal shape for two ranks of context parallelism.
CP2 = (
    "--parallelism.context_parallel_degree 2 --lighthouse.num_levels 2 "
    "--lighthouse.pooling_factor 2 --lighthouse.topk 256"
)

RING4 = (
    "--parallelism.context_parallel_degree 4 --lighthouse.context_parallel ring "
    "--lighthouse.stage1_steps 0 "
)


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
    """Paths for {dump}, {corpus}, {empty} and other placeholders in the cases."""
    empty, dump = tmp_path / "empty", tmp_path / "dump"
    empty.mkdir()
    dump.mkdir()
    whole, torn = dump / "whole" / "step-8", dump / "torn" / "step-8"
    for path in (whole, torn):
        shutil.copytree(checkpoint, path)
    (torn / ".metadata").unlink()
    for step in (8, 9):
        shutil.copytree(checkpoint, dump / "later" / f"step-{step}")
    (dump / "empty").mkdir()
    big = tmp_path / "big"
    big.mkdir()
    tokenizer = json.loads((Path(BYTE_TOKENIZER_PATH) / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"word{i}": len(vocab) + 1 + i for i in range(100)}
    (big / "tokenizer.json").write_text(json.dumps(tokenizer))
    return SimpleNamespace(
        dump=dump,
        corpus=corpus,
        empty=empty,
        nowhere=tmp_path / "nowhere",
        whole=whole,
        torn=torn,
        big=big,
    )


def check(place: SimpleNamespace, args: str, world_size: int = 1, toml: str | None = None) -> None:
    """Load and check a small run with more arguments."""
    defaults = (
        "--job.dump_folder {dump} --model.flavor debugmodel --lighthouse.topk 128 "
        "--lighthouse.stage1_steps 40 --training.local_batch_size 1 --training.steps 60 "
        "--training.dataset text --training.dataset_path {corpus} "
        "--validation.dataset text --validation.dataset_path {corpus} "
    )
    # Fields that the TOML sets must not be overridden.
    line = "--job.config_file {dump}.toml" if toml is not None else defaults + args
    if toml is not None:
        place.dump.with_suffix(".toml").write_text(toml.replace("{corpus}", str(place.corpus)))
    check_config(load_config(line.format(**vars(place)).split()), world_size)


def assert_refused(place: SimpleNamespace, parts: tuple[str, ...], *args, **options) -> None:
    with pytest.raises(ValueError) as error:
        check(place, *args, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        part = part.format(**vars(place))
        assert part in message, f"{part!r} is not in {message!r}"


TOML = """
[job]
dump_folder = "unused"

[model]
flavor = "debugmodel"

[lighthouse]
topk = 128

[training]
dataset = "text"
dataset_path = "{corpus}"
"""


@pytest.mark.parametrize(
    "args",
    [
        "",
        "--lighthouse.stage1_steps 0",
        "--lighthouse.stage1_steps -1",
        "--lighthouse.stage1_steps 60",
        "--lighthouse.stage2_seq_len 2048",
        "--lighthouse.stage2_seq_len 1 --lighthouse.stage2_full_steps 20",
        "--lighthouse.stage2_seq_len 512 --lighthouse.stage1_steps -1",
        "--lighthouse.stage1-steps=60",
        "--lighthouse.full_attn_layers -4 0 3",
        "--training.global_batch_size 3",
        "--checkpoint.enable --checkpoint.keep_latest_k 0",
        "--checkpoint.enable --checkpoint.last_save_model_only",
        "--checkpoint.enable --checkpoint.initial_load_path {whole}",
        "--checkpoint.no_enable --checkpoint.interval 0",
        "--validation.enable --validation.seq_len 2048",
        # Without Lighthouse, its rules about lengths do not apply.
        "--training.seq_len 6 --lighthouse.stage1_steps 0",
        "--validation.enable --validation.seq_len 2047 --lighthouse.stage1_steps 0",
    ],
)
def test_what_is_right_passes(place, args):
    check(place, args)


def test_a_right_file_passes(place):
    check(place, "", toml=TOML)


def test_the_command_line_overrides_the_file(place):
    path = place.dump.with_suffix(".toml")
    path.write_text(TOML)
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


COMMAND_LINES = [
    # The command line itself.
    ("--lighthouse.top_k=4", ("--lighthouse.top_k is not a field", "mean --lighthouse.topk?")),
    ("--quux.a 4", ("--quux.a is not a field", "--help")),
    ("--training 4", ("--training is not a field",)),
    ("--debug.seed x", ("--debug.seed", "'x'", "--help")),
    ("stray", ("stray", "--help")),
    ("--job.config_file", ("--job.config_file must be followed by a file", "name one")),
    # Training and validation.
    ("--training.loss_chunk_size -1", ("training.loss_chunk_size", "got -1", "use 0 or more")),
    ("--validation.enable --validation.steps -1", ("validation.steps", "got -1", "use 1 or more")),
    (
        "--validation.enable --validation.local_batch_size 0",
        ("validation.local_batch_size", "got 0", "use 1 or more"),
    ),
    # Parallelism.
    ("--parallelism.context_parallel_degree 0", ("context_parallel_degree", "got 0", "use 1")),
    (
        "--parallelism.data_parallel_replicate_degree 0",
        ("data_parallel_replicate_degree", "got 0", "use 1"),
    ),
    # These rules also apply to a dense run.
    (
        "--lighthouse.stage1_steps 0 --lighthouse.topk 200",
        ("lighthouse.topk", "got 200", "nearest: 256"),
    ),
    ("--training.seq_len 2047", ("training.seq_len", "= 16", "got 2047", "topk 128: 2048")),
    ("--training.seq_len 1024", ("lighthouse.topk", "seq_len 1024", "or seq_len 2048")),
    ("--validation.enable --validation.seq_len 1024", ("lighthouse.topk", "seq_len 1024")),
    (
        "--lighthouse.stage2_seq_len 500",
        ("stage2_seq_len must be 0 or a divisor of training.seq_len, 2048, got 500", "256 or 512"),
    ),
    ("--lighthouse.stage2_seq_len -1", ("lighthouse.stage2_seq_len", "got -1", "nearest: 1")),
    ("--lighthouse.stage2_seq_len 4096", ("stage2_seq_len", "got 4096", "nearest: 2048")),
    (
        "--lighthouse.stage2_full_steps 1",
        ("stage2_full_steps must be 0 unless lighthouse.stage2_seq_len", "got 1", "set it to 0"),
    ),
    (
        "--lighthouse.stage2_full_steps 1 --lighthouse.stage2_seq_len 2048",
        ("stage2_full_steps must be 0 unless", "training.seq_len, 2048", "got 1"),
    ),
    (
        "--lighthouse.stage2_full_steps 21 --lighthouse.stage2_seq_len 512",
        ("stage2_full_steps must be from 0 to the steps of stage 2, 20, got 21", "use 20"),
    ),
    (
        "--lighthouse.stage2_full_steps 1 --lighthouse.stage2_seq_len 512 "
        "--lighthouse.stage1_steps -1",
        ("stage2_full_steps must be from 0 to the steps of stage 2, 0, got 1", "use 0"),
    ),
    (
        "--lighthouse.stage2_full_steps -1 --lighthouse.stage2_seq_len 512",
        ("lighthouse.stage2_full_steps", "got -1", "use 0"),
    ),
    ("--lighthouse.full_attn_layers -5", ("full_attn_layers must be from -4 to 3", "got -5")),
    # Checkpoints.
    ("--checkpoint.enable --checkpoint.keep_latest_k -1", ("keep_latest_k", "got -1", "use 2")),
    (
        "--checkpoint.enable --checkpoint.last_save_model_only --lighthouse.stage1_steps -1",
        ("checkpoint.last_save_model_only must be false", "optimizer", "got true", "set it to"),
    ),
    (
        "--checkpoint.enable --checkpoint.last_save_model_only --lighthouse.stage1_steps 60",
        ("checkpoint.last_save_model_only must be false", "optimizer", "got true", "set it to"),
    ),
    (
        "--checkpoint.enable --checkpoint.exclude_from_loading optimizer,dataloader",
        ("checkpoint.exclude_from_loading must be without", "'optimizer'", "remove it"),
    ),
    (
        "--checkpoint.enable --checkpoint.exclude_from_loading lr_scheduler",
        ("checkpoint.exclude_from_loading must be without", "'lr_scheduler'", "remove it"),
    ),
    (
        "--checkpoint.enable --checkpoint.exclude_from_loading train_state",
        ("checkpoint.exclude_from_loading must be without", "'train_state'", "remove it"),
    ),
    (
        "--checkpoint.enable --checkpoint.last_save_in_hf",
        (
            "checkpoint.last_save_model_only must be true with checkpoint.last_save_in_hf",
            "got false",
        ),
    ),
    (
        "--checkpoint.enable --checkpoint.initial_load_in_hf",
        ("initial_load_model_only must be true with checkpoint.initial_load_in_hf", "got false"),
    ),
    (
        "--checkpoint.enable --checkpoint.folder whole --checkpoint.load_step 7",
        ("checkpoint.load_step must be -1", "got 7", "use -1"),
    ),
    (
        "--checkpoint.enable --checkpoint.folder later --checkpoint.load_step 8",
        ("checkpoint.load_step must be the newest in {dump}/later, 9", "got 8", "move newer"),
    ),
    (
        "--checkpoint.enable --checkpoint.folder torn",
        (
            "checkpoint.folder must hold a whole",
            "only torn checkpoints (step-8: .metadata, which",
            "move the folder",
        ),
    ),
    (
        "--checkpoint.enable --checkpoint.folder empty",
        ("checkpoint.folder must hold a whole", "with no checkpoint", "move the folder"),
    ),
    (
        # Such a folder would be ignored.
        "--checkpoint.enable --checkpoint.folder torn --checkpoint.initial_load_path {whole}",
        (
            "checkpoint.folder must hold a whole",
            "only torn checkpoints (step-8: .metadata, which",
            "move the folder",
        ),
    ),
    (
        "--checkpoint.enable --checkpoint.initial_load_path {nowhere}",
        ("checkpoint.initial_load_path", "step number", "{nowhere}", "correct the path"),
    ),
    (
        "--checkpoint.enable --checkpoint.initial_load_path {torn}",
        ("initial_load_path must hold a whole", "{torn}", ".metadata", "name an older one"),
    ),
    # Tokenizer.
    (
        "--model.hf_assets_path {big}",
        ("model.hf_assets_path", "at most 320 tokens", "got 357", "choose another"),
    ),
    # Data.
    (
        "--validation.enable --validation.dataset_path {nowhere}",
        ("validation.dataset_path", "{nowhere}", "correct"),
    ),
]


@pytest.mark.parametrize(("args", "parts"), COMMAND_LINES, ids=[case[0] for case in COMMAND_LINES])
def test_a_wrong_command_line_is_refused(place, args, parts):
    assert_refused(place, parts, args)


@pytest.mark.parametrize(
    ("world_size", "args", "parts"),
    [
        (
            1,
            "--parallelism.data_parallel_shard_degree 2",
            ("the 1 processes divided by the other degrees, 1", "got 2;", "-1 or 1"),
        ),
        (
            4,
            "--parallelism.data_parallel_shard_degree 3",
            ("the 4 processes divided by the other degrees, 1", "got 3;", "-1 or 4"),
        ),
        (
            4,
            "--parallelism.data_parallel_shard_degree 0",
            ("the 4 processes divided by the other degrees, 1", "got 0;", "-1 or 4"),
        ),
        (
            3,
            "--parallelism.tensor_parallel_degree 2",
            ("the 3 processes", "degrees, 2,", "got -1;", "a multiple of 2"),
        ),
        (
            1,
            "--parallelism.data_parallel_replicate_degree 2",
            ("the 1 processes", "degrees, 2,", "got -1;", "a multiple of 2"),
        ),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused(place, world_size, args, parts):
    field = "parallelism.data_parallel_shard_degree must be the"
    assert_refused(place, (field, *parts), args, world_size=world_size)


@pytest.mark.parametrize(
    ("world_size", "args"),
    [
        (2, ""),
        (2, "--parallelism.data_parallel_shard_degree 2"),
        (4, "--parallelism.tensor_parallel_degree 2"),
        (4, "--parallelism.data_parallel_replicate_degree 2 --training.global_batch_size 8"),
        (2, "--parallelism.context_parallel_degree 2 --lighthouse.stage1_steps 0"),
        (2, CP2),
        (2, CP2 + " --lighthouse.scorer gla --lighthouse.stage1_steps 0"),
        (2, CP2 + " --lighthouse.context_parallel ring --lighthouse.topk 512"),
        (2, CP2 + " --lighthouse.stage2_seq_len 1024 --lighthouse.stage2_full_steps 1"),
        # Two batches of two pieces give one piece per rank.
        (4, RING4 + "--lighthouse.stage2_seq_len 1024 --training.local_batch_size 2"),
    ],
)
def test_a_number_of_processes_that_fits_passes(place, world_size, args):
    check(place, args, world_size)


@pytest.mark.parametrize(
    ("world_size", "args", "parts"),
    [
        (
            4,
            "--parallelism.tensor_parallel_degree 4",
            (
                "tensor_parallel_degree must be a divisor of the 2 key/value heads",
                "got 4",
                "use 1 or 2",
            ),
        ),
        (
            2,
            "--parallelism.context_parallel_degree 2",
            ("lighthouse.topk must be a multiple of 256", "2 chunks", "got 128", "fewer levels"),
        ),
        (
            2,
            CP2 + " --lighthouse.context_parallel ring",
            ("lighthouse.topk must be a multiple of 512", "4 chunks", "got 256", "topk 512"),
        ),
        (
            4,
            "--parallelism.context_parallel_degree 4 --lighthouse.stage1_steps 0",
            ("context_parallel_degree must be a divisor", "got 4", "use 1 or 2, or 'ring'"),
        ),
        (
            4,
            CP2 + " --parallelism.tensor_parallel_degree 2",
            ("context_parallel_degree must be a divisor", "rank, 1,", "got 2", "use 1, or 'ring'"),
        ),
        (
            4,
            RING4 + "--lighthouse.stage2_seq_len 1024",
            ("stage2_seq_len", "batch of 1 into whole pieces for 4", "got 1024", "512 or 2048"),
        ),
        (
            2,
            "--parallelism.tensor_parallel_degree 2 --lighthouse.stage2_seq_len 1",
            (
                "stage2_seq_len",
                "a multiple of the tensor-parallel degree, 2",
                "got 1",
                "nearest: 2",
            ),
        ),
        (
            2,
            CP2 + " --training.seq_len 2050 --lighthouse.stage1_steps 0",
            ("training.seq_len must be a multiple of twice", "4, got 2050", "nearest: 2048"),
        ),
        (
            2,
            CP2 + " --lighthouse.scorer dilated",
            ("lighthouse.scorer must be norm", "got 'dilated'", "context_parallel_degree to 1"),
        ),
        (
            2,
            CP2 + " --lighthouse.telemetry_freq 10",
            ("lighthouse.telemetry_freq must be 0", "got 10", "context_parallel_degree to 1"),
        ),
        (
            2,
            CP2 + " --lighthouse.context_parallel rings",
            ("context-parallel", "'rings'", "'ulysses', 'ring'"),
        ),
        (
            2,
            CP2 + " --parallelism.context_parallel_rotate_method gather",
            ("rotate", "gather", "allgather"),
        ),
        (
            2,
            CP2 + " --parallelism.context_parallel_load_balancer ptrr",
            ("context_parallel_load_balancer must be 'headtail'", "'ptrr'", "leave it out"),
        ),
        (
            2,
            "--checkpoint.enable --checkpoint.initial_load_path {whole}",
            ("data-parallel degree must be that of {whole}, 1", "got 2", "start 1 processes"),
        ),
        (
            4,
            "--checkpoint.enable --checkpoint.folder whole " + CP2,
            ("the data-parallel degree", "step-8, 1", "got 2", "start 2 processes", "dataloader"),
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(place, world_size, args, parts):
    assert_refused(place, parts, args, world_size=world_size)


def test_a_ring_in_float32_is_refused_on_a_gpu(place, monkeypatch):
    ring = CP2 + " --lighthouse.context_parallel ring --lighthouse.topk 512"
    args = ring + " --training.mixed_precision_param "
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


def test_a_loss_in_chunks_is_refused_with_tensor_parallelism(place):
    parts = ("training.loss_chunk_size must be 0 with tensor", "got 64", "tensor_parallel_degree")
    args = "--training.loss_chunk_size 64 --parallelism.tensor_parallel_degree"
    check(place, args + " 1", world_size=2)
    assert_refused(place, parts, args + " 2", world_size=2)


def test_a_global_batch_that_does_not_fit_the_processes_is_refused(place):
    parts = ("training.global_batch_size must be a multiple", ", 2, got 3", "nearest: ", "or -1")
    args = "--training.global_batch_size 3 --parallelism.tensor_parallel_degree 2"
    assert_refused(place, parts, args, world_size=4)


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


def test_the_program_ends_with_one_line_and_code_2(tmp_path):
    args = ["--job.dump_folder", str(tmp_path / "dump"), "--lighthouse.topk", "200"]
    result = subprocess.run(
        [
            *[sys.executable, "-m", "torchtitan.experiments.lighthouse.train"],
            *["--model.flavor", "debugmodel", *args],
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == [lines[-1]] and "lighthouse.topk" in errors[0] and "got 200" in errors[0]
    assert "Traceback" not in result.stdout + result.stderr
    # Nothing was written.
    assert not (tmp_path / "dump").exists()
