"""`lighthouse eval-recall`: the documents are what they claim, and right answers are counted."""

import itertools
import json
import re
import string
import sys
from pathlib import Path

import pytest
import torch
from models import last_json, random_model, save
from tokenizers import Tokenizer, models
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.apply_lighthouse import use_lighthouse
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH, EOS_ID
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference import recall

from lighthouse import LighthouseConfig

SEQ_LEN = 512


def maker_of(task: str, items: int | None = 8, fillers: int = 1) -> recall.DocumentMaker:
    return recall.DocumentMaker(HuggingFaceTokenizer(BYTE_TOKENIZER_PATH), task, items, fillers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(FLAVORS["quickstart"], SEQ_LEN)
    return save(model, tmp_path_factory.mktemp("run"), "quickstart")


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the command on the checkpoint and returns its JSON."""

    def main(*args) -> dict:
        options = [checkpoint, "--output", tmp_path, "--max-seq-len", SEQ_LEN, *args]
        return last_json(monkeypatch, capsys, recall.main, *options)

    return main


@pytest.mark.parametrize("farthest", [100, 350])
@pytest.mark.parametrize("task, cue", [("pairs", 1), ("copy", recall.CUE)])
def test_every_answer_has_one_source_at_its_distance(task, cue, farthest):
    maker, distances = maker_of(task, fillers=3), []
    for i in range(40):
        document = maker.make(400, 100, farthest, f"{i}")
        text = bytes(document.tokens).decode()
        assert len(text) == 399
        assert {*text} <= {*string.ascii_letters, *string.digits, *".,;"}
        for answer in document.answers:
            # What precedes the answer stands once before, and the same symbol follows it there.
            asked = answer - cue
            (source,) = [m.start() for m in re.finditer(text[asked:answer], text[:asked])]
            assert text[source + cue] == text[answer]
            distances.append(asked - source)
    assert min(distances) >= 100 and max(distances) <= farthest
    if farthest == 350:
        # Uniform in the logarithm: half of them are below the geometric mean of the limits.
        near = sum(distance < 187 for distance in distances) / len(distances)
        assert 0.4 < near < 0.7


@pytest.mark.parametrize("nearest", [2, 30])
def test_repeated_questions_keep_their_distance(nearest):
    maker, asked = maker_of("pairs", items=4), []
    for i in range(20):
        document = maker.make(400, nearest, 390, f"{i}", questions=6)
        text = bytes(document.tokens).decode()
        for source in {*re.findall("[a-zA-Z]", text)}:
            places = [m.start() for m in re.finditer(source, text)]
            # The same answer everywhere, and every place but the first is a question.
            assert len({text[place + 1] for place in places}) == 1
            assert {place + 1 for place in places[1:]} <= {*document.answers}
            assert all(later - place >= nearest for place, later in itertools.pairwise(places))
            asked.append(len(places) - 1)
        assert len(document.answers) == sum(asked[-4:])
    assert max(asked) == 6 and sum(asked) / len(asked) > 3


def test_the_number_of_answers():
    assert len(maker_of("pairs").make(400, 100, 100, "key").answers) == 8
    assert len(maker_of("pairs", None).make(900, 300, 800, "key").answers) == 48
    assert len(maker_of("copy", None).make(2048, 300, 1500, "key").answers) == 16 * 28
    # As many as fit.
    assert 2 <= len(maker_of("copy", 100).make(400, 100, 300, "key").answers) / 28 <= 6


@pytest.mark.parametrize("task", [*recall.ITEMS])
def test_documents_follow_from_their_arguments_alone(task):
    maker = maker_of(task)
    first = maker.make(400, 100, 300, "0")
    maker.make(400, 100, 300, "another")
    assert maker.make(400, 100, 300, "0") == first
    assert maker.make(400, 100, 300, "1") != first
    # Answers stand in all parts of the context.
    starts = [maker.make(400, 64, 64, f"{i}").answers[0] for i in range(50)]
    assert min(starts) < 120
    assert max(maker.make(400, 64, 64, f"{i}").answers[-1] for i in range(50)) > 380


@pytest.mark.parametrize("distance", [1, 398])
def test_a_distance_that_does_not_fit(distance):
    maker = maker_of("pairs")
    for fits in (2, 397):
        maker.check_distance("--distances", 400, fits)
        assert maker.make(400, fits, fits, "").answers
    with pytest.raises(ValueError, match=rf"^--distances .* from 2 to 397, got {distance}; "):
        maker.check_distance("--distances", 400, distance)


@pytest.mark.parametrize(
    "task, items, fillers, words",
    [
        ("pairs", 53, 1, "--items must be from 1 to 52"),
        ("copy", 0, 1, "--items must be from 1 to 10000"),
        ("copy", 8, 9, "--fillers must be from 1 to 8"),
    ],
)
def test_sizes_out_of_range(task, items, fillers, words):
    with pytest.raises(ValueError, match=words):
        maker_of(task, items, fillers)


def test_a_tokenizer_without_the_symbols(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^--tokenizer must have a token for each letter"):
        recall.DocumentMaker(HuggingFaceTokenizer(str(tmp_path)), "pairs", 8)


def test_right_answers_are_counted(run, monkeypatch):
    def sees_100_tokens(model, tokens):
        hidden = torch.zeros(1, tokens.shape[1], 128)
        text = bytes(tokens[0].tolist()).decode()
        for i in range(4, len(text)):
            asked = i + 1 - cue
            source = text.find(text[asked : i + 1], max(0, asked - 100), i)
            if source >= 0:
                hidden[0, i, tokens[0, source + cue]] = 1
        return hidden

    monkeypatch.setattr(recall, "hidden_states", sees_100_tokens)
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, hidden: pad(hidden, (0, 192)))
    # Otherwise it says 0, or a for the passage.
    cue = 4
    result = run("--task", "copy", "--distances", 100, 101, 400)
    near, just_too_far, far = result["accuracy"]["512"].values()
    assert near == 1 and just_too_far < 0.1 and far < 0.1
    assert result["chance"] == 1 / 62 and result["attention"] == "dense"
    cue = 1
    result = run("--distances", 64, 400, "--documents", 40)
    assert result["accuracy"]["512"]["64"] == 1
    assert result["accuracy"]["512"]["400"] == pytest.approx(0.1, abs=0.04)
    assert result["mean"] == pytest.approx((1 + result["accuracy"]["512"]["400"]) / 2)


def test_the_model_answers(run, tmp_path):
    result = run("--items", 4, "--documents", 2, "--seed", 5)
    assert [*result["accuracy"]["512"]] == ["4", "8", "16", "32", "64", "128", "256"]
    model, maker = random_model(FLAVORS["quickstart"], SEQ_LEN), maker_of("pairs", 4)
    right = []
    for i in range(2):
        document = maker.make(512, 64, 64, f"5 512 64 {i}")
        logits = model(torch.tensor([document.tokens]))[0]
        for answer in document.answers:
            right.append(48 + int(logits[answer - 1, 48:58].argmax()) == document.tokens[answer])
    assert result["accuracy"]["512"]["64"] == sum(right) / 8
    assert json.loads((tmp_path / "recall.json").read_text()) == result
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_under_lighthouse_attention(run, monkeypatch):
    found = []

    def recorded(model, tokens, hidden_states=recall.hidden_states):
        found.append((tokens, hidden_states(model, tokens)))
        return found[-1][1]

    monkeypatch.setattr(recall, "hidden_states", recorded)
    fields = ["num_levels=2", "pooling_factor=2", "topk=128"]
    result = run("--documents", 1, "--distances", 256, "--lighthouse", *fields)
    assert result["attention"] == "Lighthouse"
    ((tokens, hidden),) = found
    assert tokens.shape == (1, SEQ_LEN)
    model = random_model(FLAVORS["quickstart"], SEQ_LEN)
    dense = recall.hidden_states(model, tokens)
    use_lighthouse(model, LighthouseConfig(2, 2, 128), [], 2)
    torch.testing.assert_close(hidden, recall.hidden_states(model, tokens))
    assert (hidden - dense).abs().max() > 1e-3


@pytest.mark.parametrize("task", [*recall.ITEMS])
def test_data_to_train_on(task, tmp_path, monkeypatch):
    def make(path: Path, *more) -> list[str]:
        args = ["--make-data", 60, path, "--lengths", 256, "--min-distance", 128]
        args += ["--seed", 3, "--items", 2, "--task", task, *more]
        monkeypatch.setattr(sys, "argv", ["lighthouse eval-recall", *map(str, args)])
        recall.main()
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    texts = make(tmp_path / "recall.jsonl")
    assert make(tmp_path / "again.jsonl") == texts
    (tmp_path / "again.jsonl").unlink()
    assert len({*texts}) == 60 and {*map(len, texts)} == {255}
    distances = []
    for text in texts:
        pattern = "[a-zA-Z]" if task == "pairs" else r"[^.]{32}"
        for source in {*re.findall(pattern, text)}:
            assert text.count(source) == 2
            distances.append(text.rindex(source) - text.index(source))
    assert min(distances) >= 128 and max(distances) > 200

    # Each document draws one of the numbers of questions.
    repeated = make(tmp_path / "repeated.jsonl", "--questions", 1, 2, "--min-distance", 32)
    (tmp_path / "repeated.jsonl").unlink()
    asked = [max(map(text.count, re.findall(pattern, text))) - 1 for text in repeated]
    assert {*asked} == {1, 2}

    # Each document fills a window.
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    path = str(tmp_path / "recall.jsonl")
    dataset = PackedTextDataset("jsonl", path, tokenizer, seq_len=256, infinite=False)
    windows = [inputs["input"].tolist() for inputs, _ in dataset]
    assert len(windows) > 50
    assert all(window[-1] == EOS_ID and EOS_ID not in window[:-1] for window in windows)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--distances", "600"], ("--distances", "from 2 to 509", "got 600")),
        (["--lengths", "2"], ("--distances", "for 2 tokens")),
        (["--documents", "0"], ("--documents must be at least 1", "got 0")),
        (["--items", "0"], ("--items", "got 0")),
        (["--lighthouse", "topk=129"], ("--lighthouse for", "topk")),
    ],
)
def test_a_mistake_is_one_line(args, words, run, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "args, words",
    [
        (["5", "FILE"], ("--make-data must", "--lengths")),
        (
            ["5", "FILE", "--lengths", "256", "--min-distance", "300"],
            ("--min-distance for 256", "got 300"),
        ),
        (["5", "FILE", "--lengths", "256", "--questions", "2", "0"], ("--questions", "got 0")),
    ],
)
def test_data_that_cannot_be_made(args, words, tmp_path, monkeypatch, capsys):
    args = [str(tmp_path / "x.jsonl") if arg == "FILE" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["lighthouse eval-recall", "--make-data", *args])
    with pytest.raises(SystemExit):
        recall.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "x.jsonl").exists()
