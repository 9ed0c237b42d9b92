"""Two-stage training of Llama 3 with Lighthouse Attention, for torchtitan 0.2.2.

    launch.py             `lighthouse train`: one process, or one for each GPU
    train.py              TwoStageTrainer and the entry point
    preflight.py          checks a configuration before anything expensive starts
    apply_lighthouse.py   wraps a model's attention in Lighthouse and removes the wrapper
    flavors.py            model sizes
    context_parallel.py   batches and attention for sequences shared by several ranks
    loss.py               cross-entropy in chunks of tokens
    validate.py           held-out loss
    metrics.py            metrics.jsonl, and the stage in TensorBoard and W&B
    selection_metrics.py  statistics of the selection in stage 1

Subpackages. Each imports only from those listed below it:

    analysis    reports on the metrics of a run, comparison of runs
    planner     predictions of what a run does and needs
    inference   trained models: loading, generation, export
    checkpoint  saving, retention, comparison and loading; the stage switch
    config      the configuration fields of a run and their rules
    data        resumable corpora, packed to seq_len; tokenized corpora
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
from torchtitan.experiments.lighthouse.metrics import StagedMetricsProcessor
from torchtitan.experiments.lighthouse.validate import HeldOutValidator
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
        build_validator_fn=HeldOutValidator,
        build_metrics_processor_fn=StagedMetricsProcessor,
        state_dict_adapter=Llama3Adapter,
    ),
)
