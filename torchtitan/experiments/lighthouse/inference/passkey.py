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

Train the model with the tokenizer of --tokenizer (default: the byte tokenizer).

Writes passkey.png and passkey.json to --output. The last printed line is the same JSON.
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
    ModelSource,
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
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="checkpoint or exported folder")
    add("--make-data", nargs=2, metavar=("N", "FILE"), help="write N documents and stop")
    add("--lengths", type=int, nargs="+", help="lengths of documents in tokens")
    words = "with --make-data: different words in a filler; 0: each is new"
    add("--filler-words", type=int, nargs="+", default=[0], help=words)
    questions = "with --make-data: maximum number of questions in a document"
    add("--questions", type=int, default=1, help=questions)
    add("--lighthouse", metavar="FIELD=VALUE", nargs="*", help="Lighthouse instead of dense")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    add("--output", type=Path, help="folder for the figures; default: inside the run's folder")
    add_arguments(parser)
    options = parser.parse_args()
    if (options.model is None) == (options.make_data is None):
        parser.error("name either MODEL or --make-data N FILE")
    with exit_on_value_error():
        if options.make_data is not None:
            make_data(options)
            return
        options.output = options.output or output_folder(options.model, "eval_passkey")
        result = evaluate(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "passkey.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.output / "passkey.png")
    print(table(result))
    print(f"  {options.output / 'passkey.png'}")
    print(json.dumps(result))


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
    ) -> Document:
        """Make a document. `key` is the seed of its filler.

        Args:
            length: tokens of the document, including the digit and the end.
            depth: share of the filler before the needle, 0 to 1.
            filler_words: number of different words in the filler. 0: each word is new.
            questions: number of questions, or fewer if they do not fit. All but the last are at
                random places after the needle, each with its answer.
        """
        needle, dice = self._needles[digit], random.Random(key)
        # The digit and the end are not in the prompt.
        num_filler = length - 2 - len(self._start) - len(needle) - len(self._question)
        if num_filler < 0:
            raise ValueError(
                f"--lengths must be at least {length - num_filler}, the tokens of the needle and "
                f"the question, got {length}; use longer ones"
            )
        answered = [*self._question, self.digit_ids[digit], *self._encode("\n")]
        num_answered = min(questions - 1, num_filler // len(answered))
        filler = self.filler(num_filler - num_answered * len(answered), filler_words, dice)
        before = round(depth * len(filler))
        prompt = [*self._start, *filler[:before], *needle]
        for place in sorted(dice.choices(range(before, len(filler) + 1), k=num_answered)):
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


def make_data(options: argparse.Namespace) -> None:
    """Write documents for training. Raises ValueError for illegal options."""
    num_documents, file = options.make_data
    if not num_documents.isdecimal() or int(num_documents) < 1 or not options.lengths:
        raise ValueError(
            "--make-data must be followed by a number and a file, and needs --lengths, got "
            f"{num_documents!r} and lengths {options.lengths}; give both"
        )
    if min(options.filler_words) < 0:
        raise ValueError(
            f"--filler-words must be at least 0, got {min(options.filler_words)}; use 0 for a new "
            "word each time"
        )
    if options.questions < 1:
        raise ValueError(
            f"--questions must be at least 1, got {options.questions}; use 1 for the form that is "
            "evaluated"
        )
    tokenizer_path = options.tokenizer or BYTE_TOKENIZER_PATH
    open_tokenizer("--tokenizer", tokenizer_path)
    check_output_folder("the folder of --make-data FILE", Path(file).parent)
    if Path(file).is_dir():
        raise ValueError(
            f"--make-data must be followed by a number and a file, got the folder {file!r}; name a "
            "file in it"
        )
    maker = DocumentMaker(HuggingFaceTokenizer(tokenizer_path))
    # Check that all lengths fit before writing the file.
    maker.make(min(options.lengths), 0, 0, "")
    dice = random.Random(f"train {options.seed}")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with Path(file).open("w") as lines:
        for i in range(int(num_documents)):
            length, depth, digit = dice.choice(options.lengths), dice.random(), dice.randrange(10)
            filler_words = dice.choice(options.filler_words)
            questions = dice.randint(1, options.questions)
            key = f"train {options.seed} {i}"
            document = maker.make(length, depth, digit, key, filler_words, questions)
            lines.write(json.dumps({"text": maker.text(document)}) + "\n")
    print(f"{num_documents} documents in {file}")


def evaluate(options: argparse.Namespace) -> dict:
    """Measure all lengths. Raises ValueError for illegal options."""
    check_output_folder("--output", options.output)
    check_device(options.device)
    trained = open_trained(options.model, options.flavor, options.max_seq_len, options.tokenizer)
    maker = DocumentMaker(trained.tokenizer())
    lengths = sorted({*(options.lengths or default_lengths(trained, options.device))})
    maker.make(lengths[0], 0, 0, "")
    window = 0
    if options.lighthouse is not None:
        window = max(trained.args.max_seq_len, lengths[-1])
        lighthouse = given_fields(trained, options.lighthouse, window)
    model = trained.load(options.device, TORCH_DTYPE_MAP[options.dtype], max(window, lengths[-1]))
    if options.lighthouse is not None:
        use_stage_1(model, lighthouse, trained.args.n_layers)
    answers = {}
    for length in lengths:
        try:
            answers[length] = [
                [
                    answer(model, maker, length, depth, digit, options.seed, window)
                    for digit in range(10)
                ]
                for depth in DEPTHS
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
        "model": str(trained.folder),
        "attention": "dense" if options.lighthouse is None else "Lighthouse",
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
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


def answer(
    model, maker: DocumentMaker, length: int, depth: int, digit: int, seed: int, window: int = 0
) -> int:
    """The model's answer for a document with the key `digit`, in a window of `window` tokens."""
    key = f"{seed} {length} {depth} {digit}"
    prompt = maker.make(length, depth / 100, digit, key).prompt
    rest = maker.filler(max(0, window - len(prompt)), 0, random.Random(f"rest {key}"))
    return int(next_logits(model, prompt, rest)[maker.digit_ids].argmax())


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


def plot(result: dict, path: Path) -> None:
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
    save(figure, path)
