"""Train a byte-pair tokenizer on a corpus.

    lighthouse tokenizer --dataset text \\
        --dataset-path FOLDER --output my_tokenizer --vocab-size 16384

Any text can be encoded, because the 256 bytes are tokens. `<|endoftext|>` ends a document and
`<|pad|>` fills a batch. Both are in the vocabulary. Set `model.hf_assets_path` to the output
folder. `transformers.AutoTokenizer` also loads it. Set `model.override.vocab_size` to the size of
the vocabulary, or a little more.

The text is that of the training split, in the order of the first epoch, up to `--max-bytes`.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from torchtitan.experiments.lighthouse.data.byte_tokenizer import EOS_TOKEN, save_tokenizer
from torchtitan.experiments.lighthouse.data.datasets import DATASETS, check_dataset
from torchtitan.experiments.lighthouse.data.documents import open_documents
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_output_folder,
    exit_on_value_error,
)

PAD_TOKEN = "<|pad|>"
VOCAB_SIZE = 16384
MAX_BYTES = 10**9
"""Bytes of text to train on. More text hardly changes the merges of common words."""

LEAST_VOCAB_SIZE = 256 + 2


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> int:
    """Train a byte-pair tokenizer and write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        texts: documents.
        vocab_size: maximum size of the vocabulary, at least 258.
        folder: output folder, created if missing.

    Returns:
        The size of the vocabulary. It is less than `vocab_size` if no further pair occurs twice in
        the texts.

    Raises:
        ValueError: `vocab_size` is too small, or the texts are empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < LEAST_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {LEAST_VOCAB_SIZE}, for the bytes and two special "
            f"tokens, got {vocab_size}; 8192 to 32768 are common"
        )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise ValueError(
            "texts must hold a document, got none; name another corpus, or raise --max-bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    save_tokenizer(folder, tokenizer, pad_token=PAD_TOKEN)
    return tokenizer.get_vocab_size()


def corpus_texts(
    dataset: str, dataset_path: str | None, max_bytes: int, text_field: str = "text"
) -> Iterator[str]:
    """The documents of a training split, up to `max_bytes` of UTF-8."""
    left = max_bytes
    documents = open_documents(dataset, dataset_path, "train", 0, 1, text_field)
    for text, _ in documents.read(0, 0, 0, None):
        left -= len(text.encode())
        if left < 0:
            return
        yield text


def main(args: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    known = [name for name in DATASETS if name != "tokenized"]
    add("--dataset", required=True, choices=known, help="the corpus, as training.dataset")
    add("--dataset-path", help="its folder or file, as training.dataset_path")
    add("--text-field", default="text", help="key or column of the text; default: text")
    add("--output", required=True, help="folder for the tokenizer")
    add("--vocab-size", type=int, default=VOCAB_SIZE, help=f"tokens; default: {VOCAB_SIZE}")
    add("--max-bytes", type=int, default=MAX_BYTES, help="bytes of text to train on; default: 1e9")
    options = parser.parse_args(args)
    with exit_on_value_error():
        check_output_folder("--output", options.output)
        corpus = (options.dataset, options.dataset_path)
        check_dataset(*corpus, text_field=options.text_field)
        texts = corpus_texts(*corpus, options.max_bytes, options.text_field)
        size = train_tokenizer(texts, options.vocab_size, options.output)
    print(f"{size:,} tokens in {options.output}")
