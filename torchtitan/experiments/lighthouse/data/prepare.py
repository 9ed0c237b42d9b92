"""Tokenize a corpus once, for training with `training.dataset = "tokenized"`.

    lighthouse prepare --dataset c4_local --dataset-path FOLDER --output OUT --workers 16
    lighthouse prepare --output OUT --verify

After a stop or a kill, the same command resumes from the last whole shard. `--verify` compares
every shard with its checksum. `tokenized.py` describes the files.
"""

import argparse
import os
import sys
from collections.abc import Iterator

from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.manifest import Manifest, verify
from torchtitan.experiments.lighthouse.data.tokenize import (
    SHARD_SIZE,
    SOURCES,
    prepare,
    source_files,
)
from torchtitan.experiments.lighthouse.runtime.command_line import Parser, exit_on_value_error


def main(args: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", help=f"dataset to prepare: {', '.join(SOURCES)}")
    add("--dataset-path", help="folder or file of the dataset")
    add("--output", required=True, help="folder for the shards")
    add("--text-field", default="text", help="key or column of the text; default: text")
    add("--tokenizer", default=BYTE_TOKENIZER_PATH, help="folder of tokenizer.json")
    add("--split", choices=["train", "validation", "both"], default="both")
    add("--shard-size", type=int, default=SHARD_SIZE, help="tokens per shard")
    add("--workers", type=int, default=1, help="number of processes that tokenize")
    add("--verify", action="store_true", help="only check the shards in --output")
    options = parser.parse_args(args)
    # Unlike Path.expanduser, it leaves the name of an unknown user, which is then refused.
    options.output = os.path.expanduser(options.output)
    try:
        with exit_on_value_error():
            for manifest in run(options):
                documents = sum(shard.documents for shard in manifest.shards)
                print(
                    f"{manifest.split}: {manifest.tokens:,} tokens of {documents:,} documents in "
                    f"{len(manifest.shards)} shards" + ", as they were written" * options.verify
                )
    except KeyboardInterrupt:
        print("stopped: start the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None


def run(options: argparse.Namespace) -> Iterator[Manifest]:
    """Prepare or verify the splits, and yield the manifest of each."""
    if options.verify:
        yield from verify(options.output)
        return
    splits = ["train", "validation"] if options.split == "both" else [options.split]
    for split in splits:
        # Check all splits first. The second one starts hours later.
        source_files(options.dataset, options.dataset_path, split)
    for split in splits:
        yield prepare(
            options.dataset,
            options.dataset_path,
            options.output,
            options.tokenizer,
            split=split,
            shard_size=options.shard_size,
            workers=options.workers,
            text_field=options.text_field,
        )
