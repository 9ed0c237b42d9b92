"""`lighthouse eval-passkey`: the form of the documents, and the count of right answers."""

import json
import re
import string
import sys
from pathlib import Path

import pytest
import torch
from models import last_json, random_model, save
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.apply_lighthouse import use_lighthouse
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH, EOS_ID
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference import passkey as eval_passkey

from lighthouse import LighthouseConfig

MAX_SEQ_LEN = 300
WINDOW = 512
NEEDLE = "\nThe pass key is #7. Keep it in mind.\n"
QUESTION = "\nWhat is the pass key? The pass key is #"


@pytest.fixture
def maker():
    return eval_passkey.DocumentMaker(HuggingFaceTokenizer(BYTE_TOKENIZER_PATH))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(FLAVORS["quickstart"], MAX_SEQ_LEN)
    return save(model, tmp_path_factory.mktemp("run"), "quickstart")


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Run the script on the checkpoint and return its JSON."""

    def main(*args) -> dict:
        options = [checkpoint, "--output", tmp_path, *args]
        return last_json(monkeypatch, capsys, eval_passkey.main, *options)

    return main


@pytest.mark.parametrize("depth", [0, 0.15, 0.5, 1])
@pytest.mark.parametrize("length", [100, 1000])
def test_a_document_is_what_it_claims(maker, length, depth):
    document = maker.make(length, depth, 7, "key")
    assert len(document.prompt) == length - 2
    text = bytes(document.prompt).decode()
    filler, asked = text.split(QUESTION)
    assert asked == ""
    before, after = filler.split(NEEDLE)
    assert abs(len(before) - depth * len(before + after)) <= 1
    assert {*before, *after} <= {*string.ascii_letters, *string.digits, " "}
    assert maker.text(document) == text + "7"
    if length == 1000:
        # Letters and digits are equally frequent, and no word is frequent.
        num_digits = len(re.findall(r"\d", before + after))
        assert 0.08 < num_digits / (length - 81) < 0.2
        assert len({*(before + after).split()}) > 140


@pytest.mark.parametrize("num_words", [1, 4])
def test_filler_of_few_words(maker, num_words):
    text = bytes(maker.make(1000, 0.5, 7, "key", num_words).prompt).decode()
    before, after = text.split(QUESTION)[0].split(NEEDLE)
    # A word may be cut at both ends and at the needle.
    words = (before + after).split()[:-1]
    assert len({*words}) == num_words and {*map(len, words)} == {5}
    counts = [words.count(word) for word in {*words}]
    assert min(counts) > 0.5 * max(counts)


def test_documents_that_ask_more_than_once(maker):
    text = bytes(maker.make(1000, 0.5, 7, "key", questions=5).prompt).decode()
    assert len(text) == 998 and text.count(QUESTION) == 5 and text.endswith(QUESTION)
    before, after = text.split(NEEDLE)
    assert QUESTION not in before and after.count(QUESTION + "7\n") == 4
    filler = after.replace(QUESTION + "7\n", "").removesuffix(QUESTION)
    assert abs(len(before) - len(filler)) <= 1
    # As many questions as fit.
    short = bytes(maker.make(130, 0.5, 7, "key", questions=5).prompt).decode()
    assert len(short) == 128 and short.count(QUESTION) == 2


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_no_question_is_nearer_than_the_distance(maker, depth):
    document = maker.make(1000, depth, 7, "key", questions=8, min_distance=300)
    text = bytes(document.prompt).decode()
    assert len(text) == 998
    end = text.index(NEEDLE) + len(NEEDLE)
    places = [found.start() for found in re.finditer(re.escape(QUESTION), text)]
    assert len(places) == 8 and places[0] - end >= 300
    # The needle stands at the share `depth` of the filler that leaves room for the distance.
    assert end == pytest.approx(38 + depth * (998 - 38 - 40 - 7 * 42 - 300), abs=8)


def test_documents_follow_from_their_key_alone(maker):
    first = maker.make(400, 0.3, 4, "0 400 30 4")
    maker.make(400, 0.3, 5, "another")
    assert maker.make(400, 0.3, 4, "0 400 30 4") == first
    assert maker.make(400, 0.3, 4, "1 400 30 4").prompt != first.prompt


def test_a_document_too_short_for_its_parts(maker):
    for distance in (0, 50):
        fits = len(NEEDLE) + len(QUESTION) + 2 + distance
        assert len(maker.make(fits, 0.5, 7, "key", min_distance=distance).prompt) == fits - 2
        with pytest.raises(ValueError, match=rf"^--lengths must be at least {fits}, .*; use long"):
            maker.make(fits - 1, 0.5, 7, "key", min_distance=distance)


def test_a_sign_may_belong_to_the_digit(tmp_path):
    words = ["What", "is", "the", "pass", "key", "The", "Keep", "it", "in", "mind", "?", "."]
    vocab = ["<unk>", *words, *(f"▁#{i}" for i in range(10)), *(f"▁{word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    maker = eval_passkey.DocumentMaker(HuggingFaceTokenizer(str(tmp_path)))
    assert maker.digit_ids == [vocab.index(f"▁#{i}") for i in range(10)]
    assert maker.make(40, 0.5, 0, "key").prompt[-1] == vocab.index("▁is")


def test_a_tokenizer_without_digits(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^--tokenizer must have a separate token for each digit"):
        eval_passkey.DocumentMaker(HuggingFaceTokenizer(str(tmp_path)))


def test_right_answers_are_counted(run, monkeypatch):
    def finds_it_near_the_start(model, prompt, rest):
        assert not rest
        text = bytes(prompt).decode()
        needle = re.search(r"is #(\d)\. Keep", text)
        found = needle[1] if needle.start() < 0.4 * len(text) else "3"
        logits = torch.zeros(320)
        logits[ord(found)] = 1
        # This token is not a digit, so it does not count.
        logits[ord("x")] = 2
        return logits

    monkeypatch.setattr(eval_passkey, "next_logits", finds_it_near_the_start)
    result = run("--lengths", 400, 300, 400)
    assert result["lengths"] == [300, 400] and result["out_of_memory"] == []
    # If the answer is always 3, it is right for one key of ten.
    assert result["accuracy"] == [[1, 1, 1, 0.1, 0.1, 0.1, 0.1]] * 2
    assert result["answers"][0][0] == list(range(10)) and result["answers"][0][6] == [3] * 10
    assert result["mean"] == pytest.approx((3 + 0.4) / 7) and result["chance"] == 0.1


def test_the_model_answers_by_its_last_position(run, checkpoint, maker, tmp_path):
    result = run("--lengths", 120, "--seed", 5)
    model = random_model(FLAVORS["quickstart"], MAX_SEQ_LEN)
    for depth, answers in zip(result["depths"], result["answers"][0], strict=True):
        for digit in (0, 9):
            prompt = maker.make(120, depth / 100, digit, f"5 120 {depth} {digit}").prompt
            logits = model(torch.tensor([prompt]))[0, -1]
            assert answers[digit] == logits[48:58].argmax()
    assert json.loads((tmp_path / "passkey.json").read_text()) == result
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_under_lighthouse_attention(run, maker, monkeypatch):
    found = []

    def recorded(model, prompt, rest, next_logits=eval_passkey.next_logits):
        found.append((prompt, rest, next_logits(model, prompt, rest)))
        return found[-1][2]

    monkeypatch.setattr(eval_passkey, "next_logits", recorded)
    fields = ["num_levels=2", "pooling_factor=2", "topk=128"]
    result = run("--lengths", 120, "--max-seq-len", WINDOW, "--lighthouse", *fields)
    assert result["attention"] == "Lighthouse"
    model = random_model(FLAVORS["quickstart"], WINDOW)
    prompt, rest, logits = found[4]
    assert prompt == maker.make(120, 0, 4, "0 120 0 4").prompt
    # The window is full, with new words only.
    assert len(prompt + rest) == WINDOW and {*bytes(rest).split()[:-1]}.isdisjoint(
        bytes(prompt).split()
    )
    tokens = torch.tensor([prompt + rest])
    dense = model(tokens)[0, 117]
    use_lighthouse(model, LighthouseConfig(2, 2, 128), [], 2)
    torch.testing.assert_close(logits, model(tokens)[0, 117])
    assert (logits - dense).abs().max() > 1e-3


def test_lengths_that_do_not_fit_are_named(run, monkeypatch, capsys):
    def fails(model, prompt, rest):
        if len(prompt) > 100:
            raise torch.OutOfMemoryError
        return torch.zeros(320)

    monkeypatch.setattr(eval_passkey, "next_logits", fails)
    result = run("--lengths", 100, 200, 300)
    assert (result["lengths"], result["out_of_memory"]) == ([100], [200, 300])
    with pytest.raises(SystemExit) as exit:
        run("--lengths", 200)
    assert exit.value.code == 2
    assert "error: --lengths must fit into the memory of cpu, got 200" in capsys.readouterr().err


def test_lengths_go_as_far_as_the_model_and_the_cpu():
    def lengths(max_seq_len, device):
        trained = type("Trained", (), {"args": type("Args", (), {"max_seq_len": max_seq_len})})
        return eval_passkey.default_lengths(trained, device)

    assert lengths(98304, "cuda") == [4096, 8192, 16384, 32768, 65536, 98304]
    assert lengths(20000, "cuda") == [4096, 8192, 16384]
    assert lengths(98304, "cpu") == [4096, 8192]
    assert lengths(1000, "cpu") == [1000]


def test_data_to_train_on(maker, tmp_path, monkeypatch):
    def make(path: Path) -> list[str]:
        args = ["--make-data", 40, path, "--lengths", 128, "--seed", 3, "--filler-words", 1, 0]
        monkeypatch.setattr(sys, "argv", ["lighthouse eval-passkey", *map(str, args)])
        eval_passkey.main()
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    texts = make(tmp_path / "passkey.jsonl")
    assert make(tmp_path / "again.jsonl") == texts
    (tmp_path / "again.jsonl").unlink()
    assert len({*texts}) == 40
    repeats = [len({*text.split()}) < 18 for text in texts]
    assert 10 < sum(repeats) < 30
    for text in texts:
        assert len(text) == 127
        assert re.search(r"pass key is #(\d)\. Keep", text)[1] == text[-1]
    assert {text[-1] for text in texts} == {*string.digits}
    depths = [text.index("\nThe pass") for text in texts]
    assert min(depths) < 10 and max(depths) > 37

    # Each document fills a window, so the answer is the last but one label.
    dataset = PackedTextDataset(
        "jsonl",
        str(tmp_path / "passkey.jsonl"),
        HuggingFaceTokenizer(BYTE_TOKENIZER_PATH),
        seq_len=128,
        infinite=False,
    )
    windows = list(dataset)
    assert len(windows) > 30
    for inputs, labels in windows:
        tokens = bytes(x if x != EOS_ID else 0 for x in inputs["input"].tolist()).decode()
        assert tokens.endswith("\0") and tokens.count("\0") == 1
        assert chr(labels[-3]) == tokens[-2] and labels[-2] == EOS_ID


@pytest.mark.parametrize(
    "args, words",
    [
        (["--lighthouse", "topk=128"], ("--lighthouse for", "seq_len")),
        (["--flavor", "8B"], ("--flavor", "use quickstart")),
    ],
)
def test_a_mistake_is_one_line(args, words, run, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
