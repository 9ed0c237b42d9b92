"""Llama 3 with Lighthouse Attention, trained in two stages, for torchtitan 0.2.2.

    launch.py             `lighthouse train`: one process, or one for each GPU
    train.py              TwoStageTrainer and the entry point
    preflight.py          runs every check of a configuration before anything expensive starts
    apply_lighthouse.py   puts Lighthouse around a model's attention and takes it away again
    flavors.py            sizes of models
    context_parallel.py   batches and attention over a sequence that several ranks share
    loss.py               cross-entropy in chunks of tokens
    validate.py           held-out loss
    metrics.py            metrics.jsonl, and the stage in TensorBoard and W&B
    selection_metrics.py  what the layers select in stage 1

Rooms, each of which imports only from those below it:

    analysis    what the metrics of a run say, and how runs compare
    planner     what a run will do and need, counted before it starts
    inference   trained models: loading, generation, export
    checkpoint  what is saved, kept, compared and loaded; the hand-over between the stages
    config      the fields of a run and their rules
    data        corpora, packed to seq_len, resumable; tokenized corpora
    runtime     devices, signals, errors, files, command lines

Importing this package registers the model `llama3_lighthouse` and does nothing else.
"""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.experiments.lighthouse.checkpoint.hf_llama import Llama3Adapter
from torchtitan.experiments.lighthouse.data.loaders import build_dataloader
from torchtitan.experiments.lighthouse.flavors import FLAVORS, MODEL_NAME
from torchtitan.experiments.lighthouse.loss import build_loss
from torchtitan.experiments.lighthouse.metrics import build_metrics_processor
from torchtitan.experiments.lighthouse.validate import build_validator
from torchtitan.models.llama3 import Transformer, parallelize_llama
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

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
