"""Recall by distance: does a model use what it read thousands of tokens earlier?

    lighthouse eval-recall outputs/recall/checkpoint/step-240
    lighthouse eval-recall --make-data 9000 recall.jsonl --lengths 2048

A document of n tokens fills a window of training.seq_len n:

    [BOS] sources and questions between filler ... [EOS]

Two tasks, named by --task:

    pairs    A source is a letter and a digit: "k7". The question repeats the letter, and the digit
             behind it is the answer. Each letter has one source. Chance is 0.1.
             This is multi-query associative recall (Arora et al., 2024).
    copy     A source is a passage of 32 random letters and digits. It stands there a second time,
             and each of its symbols behind the first four is an answer. Chance is 1/62.

The distance of an answer is the number of tokens between it and its source. In evaluation each
source is asked for once, so that no answer stands nearer.

Evaluation asks at exact distances, --distances, in --documents documents of each length. The model
must name the right symbol among the ten digits (pairs) or all letters and digits (copy). Attention
is dense. --lighthouse measures with Lighthouse Attention instead, as in stage 1. Its fields are
those of the run, changed by --lighthouse.

--make-data writes documents to train on, as JSON lines for training.dataset = "jsonl". Distances
are drawn from --min-distance to the longest that fits, as many between 64 and 128 as between 128
and 256. --questions says how often each source is asked for. Of several numbers, every document
draws one. Repeated questions make the task much easier to learn. With --min-distance no shorter
window holds a source and its answer, nor the same answer twice, so training on short windows cannot
teach the task. The tokenizer is that of --tokenizer (default: bytes).

Writes recall.png and recall.json to --output. The last printed line is the same JSON.
"""

import argparse
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.config.rule_helpers import require
from torchtitan.experiments.lighthouse.inference.generate import hidden_states
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.inference.synthetic import (
    description_of,
    load_evaluated,
    parser_of,
    run,
)
from torchtitan.experiments.lighthouse.runtime.plots import subplots
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
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--task", choices=list(ITEMS), default="pairs")
    add("--items", type=int, help="pairs (default: 48) or passages (default: 16)")
    add("--fillers", type=int, default=1, help="different symbols of the filler; default: 1")
    add("--min-distance", type=int, default=0, help="with --make-data: smallest distance")
    add("--questions", type=int, nargs="+", default=[1], help="with --make-data: default: 1")
    add("--distances", type=int, nargs="+", help="evaluated; default: powers of 2 that fit")
    add("--documents", type=int, default=16, help="for each length and distance; default: 16")
    run(parser, "recall", texts, evaluate, table, plot)


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    """All of the window but the end-of-text token."""

    answers: list[int]
    """Positions of the tokens that an earlier source or question determines."""


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
            rule = f"from 1 to {highest} for the task {task}"
            require(1 <= value <= highest, name, rule, value, "choose another")
        self.tokenizer, self.task, self.items = tokenizer, task, items
        self._letters, self._digits = self._single(letters), self._single(digits)
        self._fillers = self._single(FILLERS[:fillers])
        self.start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        """Tokens before every document."""
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
        return length - 1 - len(self.start) - self.span

    def check_distance(self, name: str, length: int, distance: int) -> None:
        """Raise ValueError unless documents of `length` tokens can have this distance."""
        if not self.span <= distance <= self.farthest(length):
            raise ValueError(
                f"{name} for {length} tokens must be from {self.span} to {self.farthest(length)}, "
                f"got {distance}; choose another, or longer --lengths"
            )

    def make(
        self, length: int, nearest: int, farthest: int, key: str, questions: int = 1
    ) -> Document:
        """The document that follows from the arguments alone.

        Args:
            length: tokens of the whole, with the end.
            nearest, farthest: limits of the distances, in tokens. Their logarithm is uniform.
            key: seed of everything that is drawn.
            questions: for each source, at least `nearest` tokens apart. Fewer where they do not
                fit.
        """
        dice = random.Random(f"{self.task} {key}")
        tokens = [*self.start]
        tokens += dice.choices(self._fillers, k=length - 1 - len(tokens))
        free, answers = [False] * len(self.start), []
        free += [True] * (len(tokens) - len(free))
        last = len(tokens) - self.span

        def fits(place: int) -> bool:
            return place <= last and all(free[place : place + self.span])

        def distance() -> int:
            return round(nearest * (farthest / nearest) ** dice.random())

        for source in self._sources(dice):
            places, first = [], distance()
            for _ in range(TRIES):
                place = dice.randint(len(self.start), last - first)
                if fits(place) and fits(place + first):
                    places = [place, place + first]
                    break
            for _ in range(TRIES * (questions - 1) if places else 0):
                if len(places) > questions:
                    break
                place = places[0] + distance()
                if fits(place) and all(abs(place - other) >= nearest for other in places):
                    places.append(place)
            for place in places:
                span = slice(place, place + self.span)
                tokens[span], free[span] = source, [False] * self.span
            for place in places[1:]:
                answers += range(place + self.cue, place + self.span)
        return Document(tokens, sorted(answers))

    def _sources(self, dice: random.Random) -> list[list[int]]:
        if self.task == "copy":
            return [dice.choices(self.choices, k=PASSAGE) for _ in range(self.items)]
        letters = dice.sample(self._letters, self.items)
        return [[letter, dice.choice(self._digits)] for letter in letters]


def texts(
    options: argparse.Namespace, num_documents: int, tokenizer: HuggingFaceTokenizer
) -> Iterator[str]:
    """Yield documents for training. Raises ValueError for illegal options."""
    maker = DocumentMaker(tokenizer, options.task, options.items, options.fillers)
    for number in options.questions:
        require(number >= 1, "--questions", "at least 1", number, "use 1 or more")
    nearest = options.min_distance or maker.span
    for length in options.lengths:
        maker.check_distance("--min-distance", length, nearest)
    dice = random.Random(f"train {options.seed}")
    for i in range(num_documents):
        length, key = dice.choice(options.lengths), f"train {options.seed} {i}"
        questions = random.Random(key).choice(options.questions)
        tokens = maker.make(length, nearest, maker.farthest(length), key, questions).tokens
        # The loader adds the start and the end.
        tokens = tokens[len(maker.start) :]
        text = tokenizer.decode(tokens)
        if tokenizer.tokenizer.encode(text, add_special_tokens=False).ids != tokens:
            raise ValueError(
                "--tokenizer must keep the symbols of a document apart, got "
                f"{tokenizer.tokenizer_path!r}, which joins some; use the byte tokenizer"
            )
        yield text


def evaluate(options: argparse.Namespace) -> dict:
    """Measure all lengths and distances. Raises ValueError for illegal options."""
    if options.documents < 1:
        raise ValueError(f"--documents must be at least 1, got {options.documents}; use 1 or more")
    trained = open_trained(options.model, options.flavor, options.max_seq_len, options.tokenizer)
    maker = DocumentMaker(trained.tokenizer(), options.task, options.items, options.fillers)
    lengths = sorted({*(options.lengths or [trained.args.max_seq_len])})
    distances = {length: distances_of(maker, length, options.distances) for length in lengths}
    model = load_evaluated(options, trained, lengths)
    accuracy = {}
    for length in lengths:
        accuracy[length] = {
            distance: measure(model, maker, length, distance, options.documents, options.seed)
            for distance in distances[length]
        }
        print(f"{length:,} tokens: {mean(accuracy[length]):.2f}", flush=True)
    return {
        **description_of(options, trained),
        "task": options.task,
        "items": maker.items,
        "fillers": options.fillers,
        "documents": options.documents,
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


def plot(result: dict) -> Figure:
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
    return figure
