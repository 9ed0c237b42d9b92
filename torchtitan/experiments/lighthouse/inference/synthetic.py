"""What evaluations on made-up documents share: options, training data, and the evaluated model."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import use_stage_1
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.inference.load_model import (
    ModelSource,
    add_arguments,
    given_fields,
    output_folder,
)
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_device,
    check_output_folder,
    exit_on_value_error,
    open_tokenizer,
)
from torchtitan.experiments.lighthouse.runtime.plots import save
from torchtitan.models.llama3 import Transformer


def parser_of(doc: str | None) -> Parser:
    """A parser with the options that all these evaluations have."""
    parser = Parser(doc)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="checkpoint or exported folder")
    add("--make-data", nargs=2, metavar=("N", "FILE"), help="write N documents and stop")
    add("--lengths", type=int, nargs="+", help="lengths of documents in tokens")
    add("--lighthouse", metavar="FIELD=VALUE", nargs="*", help="Lighthouse instead of dense")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    add("--output", type=Path, help="folder for the figures; default: inside the run's folder")
    add_arguments(parser)
    return parser


def run(
    parser: Parser,
    name: str,
    texts: Callable[[argparse.Namespace, int, HuggingFaceTokenizer], Iterator[str]],
    evaluate: Callable[[argparse.Namespace], dict],
    table: Callable[[dict], str],
    plot: Callable[[dict], Figure],
) -> None:
    """Write training data, or evaluate a model and write NAME.json and NAME.png.

    Args:
        texts: yields so many documents. It raises ValueError before the first for illegal options.
    """
    options = parser.parse_args()
    if (options.model is None) == (options.make_data is None):
        parser.error("name either MODEL or --make-data N FILE")
    with exit_on_value_error():
        if options.make_data is not None:
            make_data(options, texts)
            return
        options.output = options.output or output_folder(options.model, f"eval_{name}")
        check_output_folder("--output", options.output)
        check_device(options.device)
        result = evaluate(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    save(plot(result), options.output / f"{name}.png")
    print(table(result))
    print(f"  {options.output / f'{name}.png'}")
    print(json.dumps(result))


def make_data(
    options: argparse.Namespace,
    texts: Callable[[argparse.Namespace, int, HuggingFaceTokenizer], Iterator[str]],
) -> None:
    """Write documents for training as JSON lines. Raises ValueError for illegal options."""
    num_documents, file = options.make_data
    if not num_documents.isdecimal() or int(num_documents) < 1 or not options.lengths:
        raise ValueError(
            "--make-data must be followed by a number and a file, and needs --lengths, got "
            f"{num_documents!r} and lengths {options.lengths}; give both"
        )
    tokenizer = open_tokenizer("--tokenizer", options.tokenizer or BYTE_TOKENIZER_PATH)
    check_output_folder("the folder of --make-data FILE", Path(file).parent)
    if Path(file).is_dir():
        raise ValueError(
            f"--make-data must be followed by a number and a file, got the folder {file!r}; name a "
            "file in it"
        )
    documents = texts(options, int(num_documents), tokenizer)
    # An illegal option is refused before a file is written.
    first = next(documents)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with Path(file).open("w") as lines:
        for text in (first, *documents):
            lines.write(json.dumps({"text": text}) + "\n")
    print(f"{num_documents} documents in {file}")


def load_evaluated(
    options: argparse.Namespace, trained: ModelSource, seq_lens: list[int]
) -> Transformer:
    """Load the model with the attention that the options name.

    Args:
        seq_lens: lengths of the sequences that it will see, in tokens.

    Raises:
        ValueError: the fields of --lighthouse do not fit one of the lengths.
    """
    if options.lighthouse is not None:
        for seq_len in seq_lens:
            lighthouse = given_fields(trained, options.lighthouse, seq_len)
    model = trained.load(options.device, TORCH_DTYPE_MAP[options.dtype], max(seq_lens))
    if options.lighthouse is not None:
        use_stage_1(model, lighthouse, trained.args.n_layers)
    return model


def description_of(options: argparse.Namespace, trained: ModelSource) -> dict:
    """The first entries of a result: what was evaluated, and how."""
    return {
        "model": str(trained.folder),
        "attention": "dense" if options.lighthouse is None else "Lighthouse",
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
    }
