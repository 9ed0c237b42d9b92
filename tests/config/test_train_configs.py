"""Every TOML in train_configs parses, is legal, and trains with small sizes."""

from pathlib import Path

import pytest
import torch
from runs import RANKS, losses_of, trainer_of
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.preflight import check_config

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
IDS = [path.stem for path in CONFIGS]


def elsewhere(tmp_path: Path) -> list[str]:
    """Overrides for a machine without the assets and outputs of the configuration."""
    return [
        "--job.dump_folder", str(tmp_path / "run"),
        "--model.hf_assets_path", "torchtitan/experiments/lighthouse/assets/byte_tokenizer",
        "--checkpoint.no_enable",
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_it_is_legal(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    config = load_config(["--job.config_file", str(path), *elsewhere(tmp_path)])
    if config.training.dataset == "jsonl":
        # Make the documents as the header of the configuration says.
        config.training.dataset_path = str(tmp_path / "documents.jsonl")
        Path(config.training.dataset_path).write_text('{"text": "a document"}\n')
    check_config(config, RANKS.get(path.stem, 1))


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_it_trains_two_steps_made_small(path, tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    torch._dynamo.reset()
    config = load_config(["--job.config_file", str(path), *elsewhere(tmp_path)])
    lighthouse = config.lighthouse
    lighthouse.pooling_factor, lighthouse.topk = 2, 128
    seq_len = 128 * lighthouse.pooling_factor ** (lighthouse.num_levels - 1)
    lighthouse.full_attn_layers = [layer for layer in lighthouse.full_attn_layers if layer == 0]
    lighthouse.stage1_steps = min(1, lighthouse.stage1_steps)
    if lighthouse.stage2_seq_len:
        # One step on pieces, then none or one at full length.
        lighthouse.stage2_seq_len, lighthouse.stage2_full_steps = seq_len // 2, 0
    config.model.flavor = "quickstart"
    config.parallelism.context_parallel_degree = 1
    config.training.steps = config.lr_scheduler.warmup_steps = 2
    config.training.global_batch_size = -1
    config.optimizer.implementation = "foreach"
    # Tracing takes ten seconds, and compiling kernels takes longer.
    config.compile.enable = config.compile.enable and path.stem == "1m_context"
    config.compile.backend = "aot_eager"
    config.metrics.log_freq = 1
    for section in (config.training, config.validation):
        section.dataset, section.dataset_path, section.seq_len = "text", str(corpus), seq_len
    config.validation.freq, config.validation.steps = 1, 1
    with trainer_of(config) as trainer:
        trainer.train()
        assert trainer.stage == 2
    losses = losses_of(tmp_path / "run")
    assert list(losses) == [1, 2]
    assert all(4 < loss < 8 for loss in losses.values())
