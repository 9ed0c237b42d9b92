"""Pass key retrieval: does a model find one digit hidden in a long context?

    lighthouse eval-passkey outputs/debug/checkpoint/step-40
    lighthouse eval-passkey --make-data 20000 passkey.jsonl --lengths 256 512

A document has n tokens, including its end, so that it fills a window of training.seq_len n:

    [BOS] filler, needle, filler, question, digit, [EOS]

    filler      random words of five letters and digits: "x7Qp0 4mZrB ..."
    needle      "\\nThe pass key is #7. Keep it in mind.\\n"
    question    "\\nWhat is the pass key? The pass key is #"

The depth is the share of the filler before the needle. The model reads everything up to the
question, with dense attention. Its answer is the likeliest of the ten digits. Each cell of length
and depth has ten documents, one per digit, each with its own filler. Chance is 0.1. --seed, length,
depth and digit determine a document. The head is applied to the last position only.

--lighthouse measures with Lighthouse Attention instead, as in stage 1. Its fields are those of the
run, changed by --lighthouse. It needs a whole window, so more filler follows the question.

--make-data writes training documents of the same form, as JSON lines for training.dataset =
"jsonl". Lengths, depths and digits are random. No evaluated document is among them. Windows of
training.seq_len cut documents of other lengths. Set --lengths to training.seq_len to keep the digit
and its questions in the same window.

One digit in a thousand tokens teaches a small model little. Two options help:

    --filler-words 1 2 4 0    Each document draws how many different words its filler repeats. 0 is
                              a new word each time. Repetitions teach the model to copy.
    --questions 32            A document asks up to 32 times after the needle.

With --min-distance 512, at least 512 tokens stand between the needle and every question, both in
training documents and in the evaluation. Training on shorter windows cannot teach the task then.
The depth is then the share of the filler that leaves room for this.

Train the model with the tokenizer of --tokenizer (default: the byte tokenizer).

Writes passkey.png and passkey.json to --output. The last printed line is the same JSON.
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
from torchtitan.experiments.lighthouse.inference.load_model import ModelSource, open_trained
from torchtitan.experiments.lighthouse.inference.synthetic import (
    description_of,
    load_evaluated,
    parser_of,
    run,
)
from torchtitan.experiments.lighthouse.runtime.plots import subplots
from torchtitan.models.llama3 import Transformer

LENGTHS = [4096, 8192, 16384, 32768, 65536, 98304]
"""Default lengths in tokens, up to the length of training."""

LONGEST_ON_CPU = 8192
"""Longest default length on a CPU. Longer ones take hours."""

DEPTHS = [0, 15, 30, 50, 70, 85, 100]
"""Depths in percent of the filler (paper)."""

CHANCE = 0.1
NEEDLE = "\nThe pass key is #{}. Keep it in mind.\n"
QUESTION = "\nWhat is the pass key? The pass key is #"
WORD_LENGTH = 5


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    words = "with --make-data: different words in a filler; 0: each is new"
    add("--filler-words", type=int, nargs="+", default=[0], help=words)
    questions = "with --make-data: maximum number of questions in a document"
    add("--questions", type=int, default=1, help=questions)
    distance = "fewest tokens between the needle and a question; default: 0"
    add("--min-distance", type=int, default=0, help=distance)
    run(parser, "passkey", texts, evaluate, table, plot)


@dataclass(frozen=True)
class Document:
    prompt: list[int]
    """Tokens up to the answer."""

    digit: int


class DocumentMaker:
    """Makes documents with the tokens of `tokenizer`.

    Raises:
        ValueError: the tokenizer has no separate token for each digit.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self.tokenizer = tokenizer
        self._needles = [self._encode(NEEDLE.format(digit)) for digit in range(10)]
        questions = [self._encode(QUESTION + str(digit)) for digit in range(10)]
        # The # may be part of the digit's token. The question is the common prefix of all ten.
        num_common = next(
            (i for i, tokens in enumerate(zip(*questions, strict=False)) if len({*tokens}) > 1), 0
        )
        self._question = questions[0][:num_common]
        self.digit_ids = [question[num_common] for question in questions]
        """The token of each digit, 0 to 9."""
        if len({*self.digit_ids}) < 10 or {*map(len, questions)} != {num_common + 1}:
            raise ValueError(
                "--tokenizer must have a separate token for each digit, got "
                f"{tokenizer.tokenizer_path!r}, which has not; use a model with another tokenizer"
            )
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def make(
        self,
        length: int,
        depth: float,
        digit: int,
        key: str,
        filler_words: int = 0,
        questions: int = 1,
        min_distance: int = 0,
    ) -> Document:
        """Make a document. `key` is the seed of its filler.

        Args:
            length: tokens of the document, including the digit and the end.
            depth: share of the filler before the needle, 0 to 1. With min_distance, of the filler
                that leaves room for it.
            filler_words: number of different words in the filler. 0: each word is new.
            questions: number of questions, or fewer if they do not fit. All but the last are at
                random places after the needle, each with its answer.
            min_distance: fewest tokens between the needle and a question.
        """
        needle, dice = self._needles[digit], random.Random(key)
        # The digit and the end are not in the prompt.
        num_filler = length - 2 - len(self._start) - len(needle) - len(self._question)
        remedy = "use 0 for any distance"
        require(min_distance >= 0, "--min-distance", "at least 0", min_distance, remedy)
        if num_filler < min_distance:
            raise ValueError(
                f"--lengths must be at least {length - num_filler + min_distance}, the tokens of "
                f"the needle, --min-distance and the question, got {length}; use longer ones"
            )
        answered = [*self._question, self.digit_ids[digit], *self._encode("\n")]
        num_answered = min(questions - 1, (num_filler - min_distance) // len(answered))
        filler = self.filler(num_filler - num_answered * len(answered), filler_words, dice)
        before = round(depth * (len(filler) - min_distance))
        prompt = [*self._start, *filler[:before], *needle]
        places = range(before + min_distance, len(filler) + 1)
        for place in sorted(dice.choices(places, k=num_answered)):
            prompt += [*filler[before:place], *answered]
            before = place
        return Document([*prompt, *filler[before:], *self._question], digit)

    def text(self, document: Document) -> str:
        """The text of the document with its answer, for training. The loader adds start and end."""
        tokens = [*document.prompt[len(self._start) :], self.digit_ids[document.digit]]
        return self.tokenizer.decode(tokens)

    def filler(self, num_tokens: int, num_words: int, dice: random.Random) -> list[int]:
        """`num_tokens` tokens made of `num_words` different words. 0: each word is new."""
        words, tokens = random_words(num_words, dice), []
        while len(tokens) < num_tokens:
            chosen = dice.choices(words, k=64) if num_words else random_words(64, dice)
            tokens += self._encode("".join(f"{word} " for word in chosen))
        return tokens[:num_tokens]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def random_words(count: int, dice: random.Random) -> list[str]:
    letters = dice.choices(string.ascii_letters + string.digits, k=WORD_LENGTH * count)
    return ["".join(letters[i::count]) for i in range(count)]


def texts(
    options: argparse.Namespace, num_documents: int, tokenizer: HuggingFaceTokenizer
) -> Iterator[str]:
    """Yield documents for training. Raises ValueError for illegal options."""
    fewest, remedy = min(options.filler_words), "use 0 for a new word each time"
    require(fewest >= 0, "--filler-words", "at least 0", fewest, remedy)
    most, remedy = options.questions, "use 1 for the form that is evaluated"
    require(most >= 1, "--questions", "at least 1", most, remedy)
    maker = DocumentMaker(tokenizer)
    # Check that all lengths fit before the first document.
    maker.make(min(options.lengths), 0, 0, "", min_distance=options.min_distance)
    dice = random.Random(f"train {options.seed}")
    for i in range(num_documents):
        length, depth, digit = dice.choice(options.lengths), dice.random(), dice.randrange(10)
        filler_words = dice.choice(options.filler_words)
        questions = dice.randint(1, most)
        key = f"train {options.seed} {i}"
        yield maker.text(
            maker.make(length, depth, digit, key, filler_words, questions, options.min_distance)
        )


def evaluate(options: argparse.Namespace) -> dict:
    """Measure all lengths. Raises ValueError for illegal options."""
    trained = open_trained(options.model, options.flavor, options.max_seq_len, options.tokenizer)
    maker = DocumentMaker(trained.tokenizer())
    lengths = sorted({*(options.lengths or default_lengths(trained, options.device))})
    maker.make(lengths[0], 0, 0, "", min_distance=options.min_distance)
    window = 0 if options.lighthouse is None else max(trained.args.max_seq_len, lengths[-1])
    model = load_evaluated(options, trained, [window or lengths[-1]])

    def answer(length: int, depth: int, digit: int) -> int:
        """The model's answer for a document with the key `digit`, in a window of `window`."""
        key = f"{options.seed} {length} {depth} {digit}"
        document = maker.make(length, depth / 100, digit, key, min_distance=options.min_distance)
        prompt = document.prompt
        rest = maker.filler(max(0, window - len(prompt)), 0, random.Random(f"rest {key}"))
        return int(next_logits(model, prompt, rest)[maker.digit_ids].argmax())

    answers = {}
    for length in lengths:
        try:
            answers[length] = [
                [answer(length, depth, digit) for digit in range(10)] for depth in DEPTHS
            ]
        except torch.OutOfMemoryError:
            break
        print(f"{length:,} tokens: {sum(accuracies(answers[length])) / len(DEPTHS):.2f}")
    if not answers:
        raise ValueError(
            f"--lengths must fit into the memory of {options.device}, got {lengths[0]}, which does "
            "not; use shorter ones"
        )
    accuracy = [accuracies(cells) for cells in answers.values()]
    return {
        **description_of(options, trained),
        "min_distance": options.min_distance,
        "depths": DEPTHS,
        "lengths": list(answers),
        "out_of_memory": [length for length in lengths if length not in answers],
        "accuracy": accuracy,
        "answers": list(answers.values()),
        "mean": sum(map(sum, accuracy)) / (len(accuracy) * len(DEPTHS)),
        "chance": CHANCE,
    }


def default_lengths(trained: ModelSource, device: str) -> list[int]:
    """The lengths of `LENGTHS` up to the model's length, or the model's length if there is none."""
    longest = trained.args.max_seq_len
    if torch.device(device).type == "cpu":
        longest = min(longest, LONGEST_ON_CPU)
    return [length for length in LENGTHS if length <= longest] or [longest]


@torch.inference_mode()
def next_logits(model: Transformer, prompt: list[int], rest: list[int]) -> torch.Tensor:
    """Logits [V] of the token after `prompt`. `rest` follows the prompt in the window."""
    tokens = torch.tensor([[*prompt, *rest]], device=model.freqs_cis.device)
    return model.output(hidden_states(model, tokens)[0, len(prompt) - 1])


def accuracies(cells: list[list[int]]) -> list[float]:
    """Share of right answers for each depth. The i-th answer of a cell is for digit i."""
    return [sum(a == digit for digit, a in enumerate(cell)) / len(cell) for cell in cells]


def table(result: dict) -> str:
    lines = [
        f"Pass key retrieval, {result['model']}, {result['attention']} attention, "
        f"{result['dtype']} on {result['device']}",
        "",
        f"{'length':>10}" + "".join(f"{f'{depth} %':>8}" for depth in result["depths"]),
    ]
    for length, row in zip(result["lengths"], result["accuracy"], strict=True):
        lines.append(f"{length:>10,}" + "".join(f"{value:>8.1f}" for value in row))
    for length in result["out_of_memory"]:
        lines.append(f"{length:>10,}  out of memory")
    lines += ["", f"mean {result['mean']:.3f}, chance {result['chance']:.1f}"]
    return "\n".join(lines)


def plot(result: dict) -> Figure:
    """Plot the accuracy, with lengths on the x-axis and depths on the y-axis."""
    lengths, depths = result["lengths"], result["depths"]
    figure, axes = subplots(figsize=(5 + len(lengths), 5.5))
    columns = list(zip(*result["accuracy"], strict=True))
    image = axes.imshow(columns, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, row in enumerate(columns):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.grid(False)
    axes.set(xlabel="context (tokens)", ylabel="depth of the key")
    axes.set_title(
        f"Pass key, {result['attention']}: mean {result['mean']:.2f}, chance {result['chance']:.1f}"
    )
    figure.colorbar(image, label="right answers")
    return figure
