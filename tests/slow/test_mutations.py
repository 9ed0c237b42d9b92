"""Mutated input files lead to a correct result or to an error of one line.

A mutation changes a file of a checkpoint, tokenized data, a tokenizer, a model in Hugging Face
format or a corpus. It flips, cuts, inserts or replaces bytes. It empties or removes a file, or
replaces it by a folder, a pipe or a link. It changes the type of a JSON value. The reader of the
folder must then return, or raise a `ValueError` of one line.

The quick suite runs 120 mutations. `pytest -m slow tests/slow/test_mutations.py` runs 2,000. Set
`MUTATION_SEED` to repeat or vary them.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import random_model, save
from runs import command_line, train
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.checkpoint.checksums import checksum_fault
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import check_dataset
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataset, check_tokenized
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference.hf_export import export
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.metrics import LOSS, read_metrics
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.command_line import open_tokenizer

SEED = int(os.environ.get("MUTATION_SEED", "20261124"))
SECONDS = 60
"""Timeout in seconds."""

SEQ_LEN = 64
TOKENIZER = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)

JSON_VALUES = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "\\u0000", [], [[]], {}, {"a": 1}),
    *([0] * 50, {"": None}, -0.5, "../../etc/passwd"),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, corpus) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("originals")
    options = {"training__steps": 1, "lighthouse__stage1_steps": -1, "checkpoint__interval": 1}
    train(command_line(root / "run", corpus, **options))
    shutil.copytree(BYTE_TOKENIZER_PATH, root / "tokenizer")
    shutil.copytree(corpus, root / "text")
    (root / "jsonl").mkdir()
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    for number in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::2]]
        (root / "jsonl" / f"{number}.jsonl").write_text("".join(lines))
    prepare("text", str(corpus), root / "tokenized", BYTE_TOKENIZER_PATH)
    trained = open_trained(
        save(random_model(FLAVORS["debugmodel"], 768), root / "hf_run", "debugmodel")
    )
    export(trained, root / "hf", "float32")
    return {name: root / name for name in READERS}


# ---- what reads each kind


def read_run(folder: Path, corpus: Path) -> None:
    options = {"training__steps": 2, "lighthouse__stage1_steps": -1}
    check_config(load_config(command_line(folder, corpus, **options)), world_size=1)
    if (folder / "metrics.jsonl").is_file():
        assert all(isinstance(line[LOSS], int | float) for line in read_metrics(folder, LOSS))
    checksum_fault(folder / "checkpoint" / "step-1")
    if (folder / "checkpoint" / "step-1").is_dir():
        open_trained(folder / "checkpoint" / "step-1")


def read_tokenizer(folder: Path, corpus: Path) -> None:
    ids = open_tokenizer("--tokenizer", folder).encode("text", add_bos=True, add_eos=True)
    assert all(isinstance(token, int) for token in ids)


def read_documents(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, corpus: Path) -> None:
        check_dataset(name, str(folder))
        dataset = PackedTextDataset(name, str(folder), TOKENIZER, SEQ_LEN, infinite=False)
        for window, labels in dataset:
            assert window["input"].shape == labels.shape == (SEQ_LEN,)

    return read


def read_tokenized(folder: Path, corpus: Path) -> None:
    check_tokenized(str(folder), "training", BYTE_TOKENIZER_PATH, 257)
    dataset = TokenizedDataset(str(folder), SEQ_LEN, infinite=False)
    for place in range(min(20, dataset.num_places)):
        window, _ = dataset[place]
        assert window["input"].min() >= 0 and window["input"].max() < 257


def read_hf(folder: Path, corpus: Path) -> None:
    hf_llama.check_flavor(folder, FLAVORS["debugmodel"], "debugmodel")
    open_trained(folder)


READERS = {
    "run": read_run,
    "tokenizer": read_tokenizer,
    "text": read_documents("text"),
    "jsonl": read_documents("jsonl"),
    "tokenized": read_tokenized,
    "hf": read_hf,
}


# ---- mutations


def mutate(folder: Path, dice: random.Random) -> str:
    """Change one file of a folder. Returns a description of the change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    # Small files describe the others. Choose them as often as large ones.
    path = dice.choice(files)
    kinds = [flip, cut, insert, overwrite, repeat, replace_by]
    if path.suffix in (".json", ".jsonl"):
        kinds += [change_value] * 6
    kind = dice.choice(kinds)
    return f"{path.relative_to(folder)}: {kind(path, dice)}"


def flip(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    places = (
        [dice.randrange(len(content)) for _ in range(dice.choice([1, 1, 5]))] if content else []
    )
    for place in places:
        content[place] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return f"flip at {places}"


def cut(path: Path, dice: random.Random) -> str:
    length = dice.randrange(path.stat().st_size + 1)
    path.write_bytes(path.read_bytes()[:length])
    return f"cut to {length}"


def insert(path: Path, dice: random.Random) -> str:
    content = path.read_bytes()
    place = dice.randrange(len(content) + 1)
    new = dice.choice([b"\0", b"[" * 5000, b'{"a":' * 5000, b"9" * 6000, dice.randbytes(20)])
    path.write_bytes(content[:place] + new + content[place:])
    return f"insert {new[:6]!r} at {place}"


def overwrite(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content) + 1)
    content[place : place + 16] = dice.choice([bytes(16), b"\xff" * 16, dice.randbytes(16)])
    path.write_bytes(content)
    return f"overwrite at {place}"


def repeat(path: Path, dice: random.Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "twice its content"


def replace_by(path: Path, dice: random.Random) -> str:
    kind = dice.choice(["nothing", "folder", "pipe", "loop", "empty"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "empty":
        path.touch()
    return f"{kind} in its place"


def change_value(path: Path, dice: random.Random) -> str:
    """Change the type of a value in a JSON file, or in a line of it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = dice.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError):
        return flip(path, dice)
    new = dice.choice(JSON_VALUES)
    parent, key = None, None
    here = value
    while isinstance(here, dict | list) and here and (parent is None or dice.random() < 0.7):
        parent = here
        key = dice.choice(list(here)) if isinstance(here, dict) else dice.randrange(len(here))
        here = here[key]
    if parent is None:
        value = new
    elif dice.random() < 0.15:
        del parent[key]
    else:
        parent[key] = new
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"{key!r} becomes {repr(new)[:40]}"


# ---- the test


@pytest.fixture
def no_waiting(monkeypatch):
    from torchtitan.experiments.lighthouse.data import retry

    monkeypatch.setattr(retry, "sleep", lambda seconds: None)

    def hang(number, frame):
        raise AssertionError("it hangs")

    former = signal.signal(signal.SIGALRM, hang)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(originals, corpus, tmp_path, no_waiting, count):
    read, refused = 0, 0
    names = list(originals)
    for number in range(count):
        dice = random.Random(f"{SEED} {number}")
        name = names[number % len(names)]
        mutated = tmp_path / name
        shutil.rmtree(mutated, ignore_errors=True)
        shutil.copytree(originals[name], mutated)
        done = f"mutation {number}, seed {SEED}, {name}/{mutate(mutated, dice)}"
        signal.alarm(SECONDS)
        try:
            READERS[name](mutated, corpus)
            read += 1
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError, f"{done}: {error!r}"
            assert "\n" not in message.strip() and 10 < len(message) < 1500, f"{done}: {message}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"{done}: {error!r}") from error
        finally:
            signal.alarm(0)
    # Both outcomes occur.
    assert read > count / 20 and refused > count / 5, (read, refused)
