"""Recall by distance: does a model use what it read thousands of tokens earlier?

    lighthouse eval-recall outputs/recall/checkpoint/step-1000
    lighthouse eval-recall --make-data 9000 recall.jsonl --lengths 2048

A document of n tokens fills a window of training.seq_len n:

    [BOS] sources and questions between filler ... [EOS]

Two tasks, named by --task:

    pairs    A source is a letter and a digit: "k7". The question repeats the letter, and the digit
             behind it is the answer. Each letter has one source and one question. Chance is 0.1.
             This is multi-query associative recall (Arora et al., 2024).
    copy     A source is a passage of 32 random letters and digits. It stands there a second time,
             and each of its symbols behind the first four is an answer. Chance is 1/62.

The distance of an answer is the number of tokens between it and its source. No answer has a second
source.

Evaluation asks at exact distances, --distances, in --documents documents of each length. The model
must name the right symbol among the ten digits (pairs) or all letters and digits (copy). Attention
is dense, or with --lighthouse that of stage 1, with the fields of the run and those given.

--make-data writes documents to train on, as JSON lines for training.dataset = "jsonl". Distances
are drawn from --min-distance to the longest that fits, as many between 64 and 128 as between 128
and 256. With --min-distance no shorter window holds both an answer and its source, so training on
short windows cannot teach the task. The tokenizer is that of bytes, or --tokenizer.

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

ITEMS = {"pairs": 48, "copy": 16}
"""Tasks, and their default number of pairs or passages."""

PASSAGE = 32
"""Symbols of a passage."""

CUE = 4
"""Symbols of a passage that identify it. The others are asked for."""

FILLERS = ".,;:-_+*"

TRIES = 64
"""Places that are tried for a source and its question."""


def main() -> None:
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="checkpoint or exported folder")
    add("--make-data", nargs=2, metavar=("N", "FILE"), help="write N documents and stop")
    add("--task", choices=list(ITEMS), default="pairs")
    add("--lengths", type=int, nargs="+", help="tokens of a document; default: training.seq_len")
    add("--items", type=int, help="pairs (default: 48) or passages (default: 16)")
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
        items: pairs or passages in a document; None: `ITEMS` of the task. Fewer where they do not
            fit.
        fillers: number of different filler symbols.

    Raises:
        ValueError: an argument is out of range, or a symbol has no token of its own.
    """

    def __init__(
        self,
        tokenizer: HuggingFaceTokenizer,
        task: str,
        items: int | None = None,
        fillers: int = 1,
    ):
        letters, digits = string.ascii_letters, string.digits
        items = ITEMS[task] if items is None else items
        for name, value, highest in (
            ("--items", items, len(letters) if task == "pairs" else 10_000),
            ("--fillers", fillers, len(FILLERS)),
        ):
            if not 1 <= value <= highest:
                raise ValueError(
                    f"{name} must be from 1 to {highest} for the task {task}, got {value}; choose "
                    "another"
                )
        self.tokenizer, self.task, self.items = tokenizer, task, items
        self._letters, self._digits = self._single(letters), self._single(digits)
        self._fillers = self._single(FILLERS[:fillers])
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.choices = self._digits if task == "pairs" else [*self._letters, *self._digits]
        """The tokens that an answer is chosen from."""
        self.span, self.cue = (2, 1) if task == "pairs" else (PASSAGE, CUE)
        """Tokens of a source, and how many of them precede the first answer."""

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
        return length - 1 - len(self._start) - self.span

    def check_distance(self, name: str, length: int, distance: int) -> None:
        """Raise ValueError unless documents of `length` tokens can have this distance."""
        if not self.span <= distance <= self.farthest(length):
            raise ValueError(
                f"{name} for {length} tokens must be from {self.span} to {self.farthest(length)}, "
                f"got {distance}; choose another, or longer --lengths"
            )

    def make(self, length: int, nearest: int, farthest: int, key: str) -> Document:
        """The document that follows from the arguments alone.

        Args:
            length: tokens of the whole, with the end.
            nearest, farthest: limits of the distances, in tokens. Their logarithm is uniform.
            key: seed of everything that is drawn.
        """
        dice = random.Random(f"{self.task} {key}")
        tokens = [*self._start]
        tokens += dice.choices(self._fillers, k=length - 1 - len(tokens))
        free, answers = [False] * len(self._start), []
        free += [True] * (len(tokens) - len(free))
        for source in self._sources(dice):
            distance = round(nearest * (farthest / nearest) ** dice.random())
            for _ in range(TRIES):
                place = dice.randint(len(self._start), len(tokens) - distance - self.span)
                spans = [slice(at, at + self.span) for at in (place, place + distance)]
                if all(free[spans[0]]) and all(free[spans[1]]):
                    for span in spans:
                        tokens[span], free[span] = source, [False] * self.span
                    answers += range(spans[1].start + self.cue, spans[1].stop)
                    break
        return Document(tokens, sorted(answers))

    def _sources(self, dice: random.Random) -> list[list[int]]:
        if self.task == "copy":
            return [dice.choices(self.choices, k=PASSAGE) for _ in range(self.items)]
        letters = dice.sample(self._letters, self.items)
        return [[letter, dice.choice(self._digits)] for letter in letters]


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
    nearest = max(options.min_distance, maker.span)
    for length in options.lengths:
        maker.check_distance("--min-distance", length, nearest)
    dice = random.Random(f"train {options.seed}")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with Path(file).open("w") as lines:
        for i in range(int(num_documents)):
            length = dice.choice(options.lengths)
            key = f"train {options.seed} {i}"
            document = maker.make(length, nearest, maker.farthest(length), key)
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
        "items": maker.items,
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
    if not given:
        # The shortest distance fits at least; otherwise the check below says what is wrong.
        limits = range(2 * maker.span, maker.farthest(length) + 1)
        given = [2**i for i in range(32) if 2**i in limits] or [maker.span]
    for distance in given:
        maker.check_distance("--distances", length, distance)
    return sorted({*given})


@torch.inference_mode()
def measure(
    model: Transformer, maker: DocumentMaker, length: int, distance: int, documents: int, seed: int
) -> float:
    """Share of right answers in `documents` documents."""
    right = total = 0
    device = model.freqs_cis.device
    choices = torch.tensor(maker.choices, device=device)
    for i in range(documents):
        document = maker.make(length, distance, distance, f"{seed} {length} {distance} {i}")
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
