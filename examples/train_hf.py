"""Train a Hugging Face Llama in two stages with Trainer, on the text of Python's standard library.

    python examples/train_hf.py --output outputs/hf

It takes less than two minutes on a CPU. The same command resumes from the last checkpoint, in the
right stage. The result in OUTPUT/model is an ordinary Llama: `LlamaForCausalLM.from_pretrained`
loads it. Needs the extra `hf`.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.trainer_utils import get_last_checkpoint

from lighthouse import LighthouseConfig
from lighthouse.huggingface import (
    LighthouseSwitch,
    gradient_checkpointing_kwargs,
    register_lighthouse,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte; the id is the byte."""
    tokenizer = Tokenizer(models.BPE({x: byte for byte, x in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def windows(seq_len: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Whole sequences of `seq_len` bytes, without padding."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: seq_len * count]
    tokens = torch.tensor(list(text))[: len(text) // seq_len * seq_len].view(-1, seq_len)
    return [{"input_ids": x, "labels": x} for x in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/hf", help="folder for checkpoints and model")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in all")
    parser.add_argument("--stage1-steps", type=int, default=45, help="steps under Lighthouse")
    parser.add_argument("--save-steps", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seq-len", type=int, default=2048, help="bytes of a sequence")
    options = parser.parse_args()

    lighthouse = LighthouseConfig(num_levels=3, pooling_factor=2, topk=128)
    lighthouse.check_seq_len(options.seq_len)
    register_lighthouse(lighthouse)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=256, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=options.seq_len, bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    arguments = TrainingArguments(
        options.output, max_steps=options.steps, save_steps=options.save_steps, logging_steps=5,
        learning_rate=2e-3, per_device_train_batch_size=1, report_to="none",
    )  # fmt: skip
    set_seed(arguments.seed)
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs())
    trainer = Trainer(
        model,
        arguments,
        data_collator=default_data_collator,
        train_dataset=windows(options.seq_len, 1000),
        processing_class=byte_tokenizer(),
        callbacks=[LighthouseSwitch(options.stage1_steps)],
    )
    Path(options.output).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output))
    trainer.save_model(f"{options.output}/model")


if __name__ == "__main__":
    main()
