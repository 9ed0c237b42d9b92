"""Recall by distance: does a model use what it read thousands of tokens earlier?

    lighthouse eval-recall outputs/recall/checkpoint/step-2000
    lighthouse eval-recall --make-data 20000 recall.jsonl --lengths 2048 --min-distance 1024

A document of n tokens fills a window of training.seq_len n:

    [BOS] filler, sources, filler, questions, filler, [EOS]

Two tasks, named by --task:

    pairs    Each source is a letter and a digit: "k7..Q2.a9". The questions repeat the letters in
             another order, and the digit behind each is the answer. Chance is 0.1. This is
             multi-query associative recall (Arora et al., 2024).
    copy     The source is a passage of different letters and digits in random order. It stands
             there a second time, and each of its symbols but the first is an answer.

A letter stands once among the sources and once among the questions, so an answer can be found at
one distance only. With --min-distance no shorter window holds both a question and its source, and
training on short windows cannot teach the task.

Evaluation asks at exact distances, --distances, in --documents documents of each length. The
distance of an answer is the number of tokens between it and its source. The model must name the
right symbol among the ten digits (pairs) or all letters and digits (copy). Attention is dense, or
with --lighthouse that of stage 1, with the fields of the run and those given.

--make-data writes documents to train on, as JSON lines for training.dataset = "jsonl". Distances
are drawn at random from --min-distance to the longest that fits. The tokenizer is that of bytes, or
--tokenizer.

Writes recall.png and recall.json into --output; the last line printed is the same JSON.
"""

import argparse
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import use_stage_1
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.inference.generate import hidden_states
from torchtitan.experiments.lighthouse.inference.load_model import (
    add_arguments,
    given_fields,
    open_trained,
    output_folder,
)
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_device,
    check_output_folder,
    exit_on_value_error,
    open_tokenizer,
)
from torchtitan.experiments.lighthouse.runtime.plots import save, subplots
from torchtitan.models.llama3 import Transformer

TASKS = ("pairs", "copy")
FILLERS = ".,;:-_+*"


def main() -> None:
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="checkpoint or exported folder")
    add("--make-data", nargs=2, metavar=("N", "FILE"), help="write N documents and stop")
    add("--task", choices=TASKS, default="pairs")
    add("--lengths", type=int, nargs="+", help="tokens of a document; default: training.seq_len")
    add("--items", type=int, default=16, help="pairs, or symbols of the passage; default: 16")
    add("--fillers", type=int, default=1, help="different symbols of the filler; default: 1")
    add("--min-distance", type=int, default=0, help="of a question to its source (data)")
    add("--distances", type=int, nargs="+", help="evaluated; default: powers of 2 that fit")
    add("--documents", type=int, default=16, help="for each length and distance; default: 16")
    add("--lighthouse", metavar="FIELD=VALUE", nargs="*", help="Lighthouse instead of dense")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    add("--output", type=Path, help="folder for the figures; default: in the folder of the run")
    add_arguments(parser)
    options = parser.parse_args()
    if (options.model is None) == (options.make_data is None):
        parser.error("name MODEL or --make-data N FILE, one of them")
    with exit_on_value_error():
        if options.make_data is not None:
            make_data(options)
            return
        options.output = options.output or output_folder(options.model, "eval_recall")
        result = evaluate(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "recall.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.output / "recall.png")
    print(table(result))
    print(f"  {options.output / 'recall.png'}")
    print(json.dumps(result))


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    """All of the window but the end-of-text token."""

    answers: list[int]
    """Positions of the tokens that can be found among the sources."""


class DocumentMaker:
    """Makes documents of one task with the tokens of `tokenizer`.

    Args:
        items: pairs at most, or symbols of the passage.
        fillers: number of different filler symbols.

    Raises:
        ValueError: an argument is out of range, or a symbol has no token of its own.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, task: str, items: int, fillers: int = 1):
        letters, digits = string.ascii_letters, string.digits
        most = len(letters) if task == "pairs" else len(letters + digits)
        for name, value, lowest, highest in (
            ("--items", items, 1 if task == "pairs" else 2, most),
            ("--fillers", fillers, 1, len(FILLERS)),
        ):
            if not lowest <= value <= highest:
                raise ValueError(
                    f"{name} must be from {lowest} to {highest} for the task {task}, got {value}; "
                    "choose another"
                )
        self.tokenizer, self.task, self.items = tokenizer, task, items
        self._letters, self._digits = self._single(letters), self._single(digits)
        self._fillers = self._single(FILLERS[:fillers])
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.choices = self._digits if task == "pairs" else [*self._letters, *self._digits]
        """The tokens that an answer is chosen from."""
        # Half of a zone is filler, so that places vary.
        self.zone = 4 * items if task == "pairs" else items
        """Tokens of the part with the sources, and of the part with the questions."""

    def _single(self, symbols: str) -> list[int]:
        ids = [self.tokenizer.tokenizer.encode(s, add_special_tokens=False).ids for s in symbols]
        if any(len(found) != 1 for found in ids) or len({found[0] for found in ids}) < len(ids):
            raise ValueError(
                "--tokenizer must have a token for each letter, digit and punctuation mark, got "
                f"{self.tokenizer.tokenizer_path!r} without; use a model with another tokenizer"
            )
        return [found[0] for found in ids]

    def farthest(self, length: int) -> int:
        """The longest distance that fits into a document of `length` tokens."""
        return length - 1 - len(self._start) - self.zone

    def make(self, length: int, distance: int, key: str, shuffled: bool = False) -> Document:
        """The document that follows from the arguments alone.

        Args:
            length: tokens of the whole, with the end.
            distance: tokens from the start of the sources to that of the questions.
            key: seed of everything that is drawn.
            shuffled: whether the questions (pairs) come in another order, at other places of their
                zone, and at a random number of them. Otherwise each answer is exactly `distance`
                behind its source.
        """
        dice = random.Random(f"{self.task} {key}")
        lowest = self.zone
        if not lowest <= distance <= self.farthest(length):
            raise ValueError(
                f"--distances of {self.items} items in {length} tokens must be from {lowest} to "
                f"{self.farthest(length)}, got {distance}; choose one of them, longer --lengths or "
                "fewer --items"
            )
        tokens = [*self._start]
        tokens += dice.choices(self._fillers, k=length - 1 - len(tokens))
        source = dice.randint(len(self._start), len(tokens) - distance - self.zone)
        if self.task == "copy":
            passage = dice.sample(self.choices, self.items)
            for place in (source, source + distance):
                tokens[place : place + self.items] = passage
            first = source + distance + 1
            return Document(tokens, list(range(first, first + self.items - 1)))
        count = dice.randint(1, self.items) if shuffled else self.items
        letters = dice.sample(self._letters, count)
        pairs = [(letter, dice.choice(self._digits)) for letter in letters]
        places = self._places(count, dice)
        for place, pair in zip(places, pairs, strict=True):
            tokens[source + place : source + place + 2] = pair
        if shuffled:
            dice.shuffle(pairs)
            places = self._places(count, dice)
        for place, pair in zip(places, pairs, strict=True):
            at = source + distance + place
            tokens[at : at + 2] = pair
        return Document(tokens, [source + distance + place + 1 for place in places])

    def _places(self, count: int, dice: random.Random) -> list[int]:
        """Where `count` pairs begin in a zone, in ascending order and without overlaps."""
        chosen = sorted(dice.sample(range(self.zone - count), count))
        return [place + i for i, place in enumerate(chosen)]


def make_data(options: argparse.Namespace) -> None:
    """Write documents to train on. Raises ValueError for impossible options."""
    num_documents, file = options.make_data
    if not num_documents.isdecimal() or int(num_documents) < 1 or not options.lengths:
        raise ValueError(
            "--make-data must be followed by a number and a file, and go with --lengths, got "
            f"{num_documents!r} and lengths {options.lengths}; give both"
        )
    tokenizer_path = options.tokenizer or BYTE_TOKENIZER_PATH
    tokenizer = open_tokenizer("--tokenizer", tokenizer_path)
    check_output_folder("the folder of --make-data FILE", Path(file).parent)
    if Path(file).is_dir():
        raise ValueError(
            f"--make-data must be followed by a number and a file, got the folder {file!r}; name a "
            "file in it"
        )
    maker = DocumentMaker(tokenizer, options.task, options.items, options.fillers)
    # Shuffled questions are up to one zone nearer to their sources.
    slack = maker.zone if options.task == "pairs" else 0
    nearest = max(options.min_distance + slack, maker.zone)
    if options.min_distance < 0 or nearest > maker.farthest(min(options.lengths)):
        raise ValueError(
            f"--min-distance must be from 0 to {maker.farthest(min(options.lengths)) - slack} with "
            f"--lengths {min(options.lengths)} and --items {options.items}, got "
            f"{options.min_distance}; lower it, or use longer documents or fewer items"
        )
    dice = random.Random(f"train {options.seed}")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with Path(file).open("w") as lines:
        for i in range(int(num_documents)):
            length = dice.choice(options.lengths)
            distance = dice.randint(nearest, maker.farthest(length))
            document = maker.make(length, distance, f"train {options.seed} {i}", shuffled=True)
            # The loader adds the start and the end.
            tokens = document.tokens[len(maker._start) :]
            text = tokenizer.decode(tokens)
            if tokenizer.tokenizer.encode(text, add_special_tokens=False).ids != tokens:
                raise ValueError(
                    "--tokenizer must keep the symbols of a document apart, got "
                    f"{tokenizer_path!r}, which joins some of them; use the tokenizer of bytes"
                )
            lines.write(json.dumps({"text": text}) + "\n")
    print(f"{num_documents} documents in {file}")


def evaluate(options: argparse.Namespace) -> dict:
    """Everything that is measured. Raises ValueError for impossible options."""
    check_output_folder("--output", options.output)
    check_device(options.device)
    if options.documents < 1:
        raise ValueError(f"--documents must be at least 1, got {options.documents}; use 1 or more")
    trained = open_trained(options.model, options.flavor, options.max_seq_len, options.tokenizer)
    tokenizer = trained.tokenizer()
    maker = DocumentMaker(tokenizer, options.task, options.items, options.fillers)
    lengths = sorted({*(options.lengths or [trained.args.max_seq_len])})
    distances = {length: distances_of(maker, length, options.distances) for length in lengths}
    if options.lighthouse is not None:
        for length in lengths:
            lighthouse = given_fields(trained, options.lighthouse, length)
    model = trained.load(options.device, TORCH_DTYPE_MAP[options.dtype], lengths[-1])
    if options.lighthouse is not None:
        use_stage_1(model, lighthouse, trained.args.n_layers)
    accuracy = {}
    for length in lengths:
        accuracy[length] = {
            distance: measure(model, maker, length, distance, options.documents, options.seed)
            for distance in distances[length]
        }
        print(f"{length:,} tokens: {mean(accuracy[length]):.2f}", flush=True)
    return {
        "model": str(trained.folder),
        "attention": "dense" if options.lighthouse is None else "Lighthouse",
        "task": options.task,
        "items": options.items,
        "fillers": options.fillers,
        "documents": options.documents,
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
        "accuracy": accuracy,
        "mean": sum(map(mean, accuracy.values())) / len(accuracy),
        "chance": 1 / len(maker.choices),
    }


def distances_of(maker: DocumentMaker, length: int, given: list[int] | None) -> list[int]:
    """The distances at which documents of `length` tokens are asked, in ascending order."""
    if given:
        for distance in sorted({*given}):
            maker.make(length, distance, "")
        return sorted({*given})
    powers = [2**i for i in range(32)]
    fitting = [d for d in powers if maker.zone <= d <= maker.farthest(length)]
    if not fitting:
        maker.make(length, maker.zone, "")
    return fitting or [maker.zone]


@torch.inference_mode()
def measure(
    model: Transformer, maker: DocumentMaker, length: int, distance: int, documents: int, seed: int
) -> float:
    """Share of right answers in `documents` documents."""
    right = total = 0
    device = model.freqs_cis.device
    choices = torch.tensor(maker.choices, device=device)
    for i in range(documents):
        document = maker.make(length, distance, f"{seed} {length} {distance} {i}")
        # Lighthouse Attention takes whole windows. No answer depends on what the last token is.
        tokens = torch.tensor([[*document.tokens, document.tokens[-1]]], device=device)
        answers = torch.tensor(document.answers, device=device)
        logits = model.output(hidden_states(model, tokens)[0, answers - 1])
        right += int((choices[logits[:, choices].argmax(-1)] == tokens[0, answers]).sum())
        total += len(answers)
    return right / total


def mean(accuracy: dict[int, float]) -> float:
    return sum(accuracy.values()) / len(accuracy)


def table(result: dict) -> str:
    accuracy = result["accuracy"]
    distances = sorted({distance for row in accuracy.values() for distance in row})
    lines = [
        f"Recall ({result['task']}), {result['model']}, {result['attention']} attention, "
        f"{result['dtype']} on {result['device']}",
        "",
        f"{'length':>10}" + "".join(f"{distance:>8,}" for distance in distances),
    ]
    for length, row in accuracy.items():
        cells = (f"{row[d]:.2f}" if d in row else "" for d in distances)
        lines.append(f"{length:>10,}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join([*lines, "", f"mean {result['mean']:.3f}, chance {result['chance']:.3f}"])


def plot(result: dict, path: Path) -> None:
    """Share of right answers over the distance, one line for each length."""
    figure, axes = subplots()
    for length, row in result["accuracy"].items():
        axes.plot(list(row), list(row.values()), marker="o", label=f"{length:,} tokens")
    axes.axhline(result["chance"], color="#888888", linestyle=":", label="chance")
    distances = sorted({distance for row in result["accuracy"].values() for distance in row})
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [f"{distance:,}" for distance in distances])
    axes.set(xlabel="distance to the source (tokens)", ylabel="right answers", ylim=(-0.03, 1.03))
    axes.set_title(f"Recall ({result['task']}), {result['attention']}: mean {result['mean']:.2f}")
    axes.legend()
    save(figure, path)
