"""Llama 3 with Lighthouse Attention, trained in two stages, for torchtitan 0.2.2.

    job_config.py   the [lighthouse] section of the TOML, and our defaults for the others
    checks.py       every rule of a configuration, checked before anything expensive starts
    backend.py      puts Lighthouse around a model's attention and takes it away again
    context_parallel.py  batches and attention over a sequence that several ranks share
    train.py        TwoStageTrainer and the entry point
    handover.py     the record written at the stage switch
    checkpoint.py   which checkpoints are saved, kept and loaded
    interruption.py stopping on a signal, with a checkpoint
    data.py         text corpora, packed to seq_len, resumable
    corpora.py      where the documents lie, and whose they are
    readers.py      the rows of their files
    faults.py       what goes wrong while they are read: tried again, or told in one line
    prepared.py     corpora tokenized beforehand, read under any data-parallel degree
    prepare.py      tokenizes them, for scripts/prepare_data.py
    validate.py     held-out loss
    loss.py         cross-entropy in chunks of tokens
    metrics.py      metrics.jsonl, and the stage in TensorBoard and W&B
    telemetry.py    what the layers select in stage 1
    report.py       what the metrics of a run say, and how two runs compare
    plan.py         what a run will do and need, counted before it starts, from
    sizes.py        its sizes,
    memory.py       the tensors it holds,
    gpus.py         and rates of GPUs
    trained.py      what lies in a checkpoint or in a folder of Hugging Face's, and loading it
    hugging_face.py configuration and weights in Hugging Face's format, both ways
    export.py       a trained model as a folder for transformers, compared with it
    generate.py     text from the dense model, with a key-value cache
    cpu.py          the CPU as a device for torchtitan

Importing this package registers the model `llama3_lighthouse`.
"""

import torch
from torchtitan.experiments.lighthouse import cpu

_accelerator = torch.accelerator.current_accelerator(check_available=True)
if _accelerator is None or _accelerator.type == "mps":
    # Before the imports below: torchtitan binds its device when it is imported.
    cpu.install()

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.experiments.lighthouse.data import build_dataloader
from torchtitan.experiments.lighthouse.hugging_face import Llama3Adapter
from torchtitan.experiments.lighthouse.loss import build_loss
from torchtitan.experiments.lighthouse.metrics import build_metrics_processor
from torchtitan.experiments.lighthouse.validate import build_validator
from torchtitan.models.llama3 import (
    Transformer,
    TransformerModelArgs,
    llama3_args,
    parallelize_llama,
)
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

MODEL_NAME = "llama3_lighthouse"

BYTE_VOCAB_SIZE = 320
"""256 bytes and the end of text, padded to a multiple of 64."""

# torchtitan takes 2/3 of 4*dim, times the multiplier, up to a multiple of 256: 1536.
_PAPER_BODY = {
    "dim": 1024,
    "n_layers": 30,
    "n_heads": 8,
    "ffn_dim_multiplier": 0.5625,
    "multiple_of": 256,
    "rope_theta": 500000,
}

FLAVORS = {
    "debugmodel": TransformerModelArgs(
        dim=128, n_layers=4, n_heads=2, vocab_size=BYTE_VOCAB_SIZE, rope_theta=500000
    ),
    # Small enough to learn something from a million bytes, in minutes on two CPU cores.
    "quickstart": TransformerModelArgs(
        dim=128,
        n_layers=2,
        n_heads=2,
        vocab_size=BYTE_VOCAB_SIZE,
        multiple_of=128,
        rope_theta=10000,
    ),
    # Long contexts on a CPU: 10.1M parameters, most of them where they cost no attention.
    "10M": TransformerModelArgs(
        dim=256,
        n_layers=2,
        n_heads=4,
        vocab_size=BYTE_VOCAB_SIZE,
        ffn_dim_multiplier=9,
        multiple_of=256,
        rope_theta=500000,
    ),
    # The paper's model: 530.1M parameters, 262.7M of them for its vocabulary.
    "530M": TransformerModelArgs(vocab_size=128256, **_PAPER_BODY),
    # The same body with the vocabulary of the byte tokenizer: 268.0M parameters.
    "268M": TransformerModelArgs(vocab_size=BYTE_VOCAB_SIZE, **_PAPER_BODY),
    "8B": llama3_args["8B"],
}

register_train_spec(
    MODEL_NAME,
    TrainSpec(
        model_cls=Transformer,
        model_args=FLAVORS,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_hf_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=Llama3Adapter,
    ),
)
