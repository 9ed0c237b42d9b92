"""Prepared data: windows, their order, ranks, resuming with another degree, and errors."""

import hashlib
import itertools
import json
import math
import pickle
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import launch
from refusals import refused
from runs import command_line, losses_of, train, write_corpus
from test_data import (
    SEQ_LEN,
    TOKENIZER,
    assert_same,
    make_config,
    make_corpus,
    make_texts,
    take,
)
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data import tokenized
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import is_held_out
from torchtitan.experiments.lighthouse.data.loaders import (
    build_dataloader,
    build_validation_dataloader,
    check_data,
)
from torchtitan.experiments.lighthouse.data.manifest import (
    Manifest,
    Shard,
    read_manifest,
    tokenizer_digest,
)
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.data.tokenized import (
    TokenizedDataloader,
    TokenizedDataset,
    check_tokenized,
    shuffled,
)
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.models.llama3 import Transformer


def write_tokenized(
    folder: Path, num_tokens: int, shards: int = 3, split: str = "train", first_id: int = 0
) -> str:
    """Write tokens whose ids are their positions, so that windows show their position."""
    (folder / split).mkdir(parents=True)
    entries = []
    parts = np.array_split(np.arange(first_id, first_id + num_tokens, dtype="<u2"), shards)
    for i, tokens in enumerate(parts):
        file = f"{i:05d}.bin"
        tokens.tofile(folder / split / file)
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        entries.append(Shard(file, 1, len(tokens), int(tokens.max()), sha256, [1, 0]))
    manifest = Manifest(
        format=1,
        dataset="text",
        split=split,
        tokenizer_sha256=tokenizer_digest(BYTE_TOKENIZER_PATH),
        vocab_size=257,
        dtype="<u2",
        shard_size=1,
        sources={"a.txt": 1},
        shards=entries,
    )
    (folder / split / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return str(folder)


def make_loaders(path: str, dp_world_size: int, batch_size: int = 1) -> list[TokenizedDataloader]:
    """A loader for each rank."""
    return [
        TokenizedDataloader(TokenizedDataset(path, SEQ_LEN), rank, dp_world_size, batch_size)
        for rank in range(dp_world_size)
    ]


def read_order(loaders: list[TokenizedDataloader], num_rounds: int) -> list[list[int]]:
    """The windows [S + 1] that all ranks read in some rounds, in global order."""
    batches = [take(loader, num_rounds) for loader in loaders]
    order = []
    for one_of_each in zip(*batches, strict=True):
        for samples in zip(*(zip(x["input"], y, strict=True) for x, y in one_of_each), strict=True):
            for inputs, labels in samples:
                assert inputs.dtype == labels.dtype == torch.int64
                assert torch.equal(inputs[1:], labels[:-1])
                order.append([*inputs.tolist(), int(labels[-1])])
    return order


# ---- windows and their order


@pytest.mark.parametrize("dp_world_size", [1, 2, 3, 4])
def test_every_token_is_a_label_once_an_epoch(tmp_path, dp_world_size):
    num_tokens = 1000
    path = write_tokenized(tmp_path, num_tokens)
    # Two epochs are a whole number of windows. The first one ends inside a window.
    num_windows = 2 * num_tokens // SEQ_LEN
    order = read_order(make_loaders(path, dp_world_size), math.ceil(num_windows / dp_world_size))
    order = order[:num_windows]
    for window in order:
        assert window == [(window[0] + i) % num_tokens for i in range(SEQ_LEN + 1)]
    labels = Counter(token for window in order for token in window[1:])
    assert labels == dict.fromkeys(range(num_tokens), 2)
    first_epoch = order[: math.ceil(num_tokens / SEQ_LEN)]
    starts = [window[0] for window in first_epoch]
    assert sorted(starts) == list(range(0, num_tokens, SEQ_LEN)) != starts
    # The second epoch begins inside the window in which the first one ended.
    starts = [window[0] for window in order[len(first_epoch) :]]
    assert sorted(starts) == list(range(SEQ_LEN - num_tokens % SEQ_LEN, num_tokens, SEQ_LEN))


@pytest.mark.parametrize("num_tokens", [1, 10, 16, 17, 33])
def test_a_corpus_of_a_window_or_less_is_read_again_and_again(tmp_path, num_tokens):
    (loader,) = make_loaders(write_tokenized(tmp_path, num_tokens, shards=1), 1)
    order = read_order([loader], 3 * num_tokens)
    labels = Counter(token for window in order for token in window[1:])
    assert labels == dict.fromkeys(range(num_tokens), 3 * SEQ_LEN)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    path = write_tokenized(tmp_path, 50 * SEQ_LEN)

    def order(seed, epoch):
        dataset = TokenizedDataset(path, SEQ_LEN, seed=seed)
        return [int(dataset[50 * epoch + i][0]["input"][0]) for i in range(50)]

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(-3, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert all(sorted(each) == list(range(0, 50 * SEQ_LEN, SEQ_LEN)) for each in orders)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 255, 1000])
def test_shuffled_is_a_permutation(count):
    for seed, epoch in ((0, 0), (-1, 7)):
        places = [shuffled(i, count, seed, epoch) for i in range(count)]
        assert sorted(places) == list(range(count))


def test_shuffled_is_the_same_on_every_machine():
    assert [shuffled(i, 8, 0, 0) for i in range(8)] == [5, 0, 4, 3, 7, 6, 1, 2]
    assert shuffled(123_456_789, 10**9, 1, 2) == 718938247


def test_shuffled_takes_every_index_everywhere_equally_often():
    count, draws = 7, 2000
    hits = np.zeros((count, count))
    for seed in range(draws):
        for i in range(count):
            hits[i, shuffled(i, count, seed, 0)] += 1
    # Chi-squared with 36 degrees of freedom. 99.99 % of draws are below 76.
    assert ((hits - draws / count) ** 2 / (draws / count)).sum() < 76
    neighbours = np.array([shuffled(i, 5000, 0, 0) for i in range(5000)])
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.06


# ---- ranks


def test_a_global_batch_does_not_depend_on_the_data_parallel_degree(tmp_path):
    path = write_tokenized(tmp_path, 1000)
    steps, global_batch = 40, 12

    def batches(dp_world_size, batch_size):
        rounds = steps * global_batch // (dp_world_size * batch_size)
        order = read_order(make_loaders(path, dp_world_size, batch_size), rounds)
        return [order[i : i + global_batch] for i in range(0, len(order), global_batch)]

    expected = batches(1, 12)
    assert len(expected) == steps
    # Gradient accumulation provides the rest of a global batch.
    for layout in ((1, 1), (1, 4), (2, 6), (2, 1), (3, 2), (4, 3), (4, 1), (12, 1)):
        assert batches(*layout) == expected


# ---- resuming


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_resume_at_every_step_under_any_degree(tmp_path, before, after):
    path = write_tokenized(tmp_path, 200)
    # More than three epochs.
    num_rounds = 45 // before
    expected = read_order(make_loaders(path, 1), 60)
    loaders = make_loaders(path, before)
    iterators = [iter(loader) for loader in loaders]
    for step in range(num_rounds + 1):
        states = {pickle.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1
        state = pickle.loads(states.pop())
        resumed = make_loaders(path, after)
        for loader in resumed:
            loader.load_state_dict(state)
            assert loader.state_dict() == state
        done = step * before
        assert read_order(resumed, 2) == expected[done : done + 2 * after]
        for iterator in iterators:
            next(iterator)


def test_workers_read_ahead_and_the_position_does_not(tmp_path):
    config = make_config("tokenized", write_tokenized(tmp_path, 1000))
    expected = take(build_dataloader(2, 1, TOKENIZER, config), 30)
    for num_workers in (1, 3):
        config.training.dataloader.num_workers = num_workers
        check_data(config)
        loader = build_dataloader(2, 1, TOKENIZER, config)
        assert_same(take(loader, 9), expected[:9])
        state = loader.state_dict()
        assert state["windows"] == 9 * 2 * config.training.local_batch_size
        # A run can also resume with another number of workers.
        config.training.dataloader.num_workers = 4 - num_workers
        resumed = build_dataloader(2, 1, TOKENIZER, config)
        resumed.load_state_dict(state)
        assert_same(take(resumed, 21), expected[9:])


def test_a_resume_keeps_the_seed_of_the_position(tmp_path):
    path = write_tokenized(tmp_path, 1000)
    dataset = TokenizedDataset(path, SEQ_LEN, seed=3)
    other = TokenizedDataset(path, SEQ_LEN, seed=4)
    assert any(not torch.equal(dataset[i][1], other[i][1]) for i in range(10))
    other.load_state_dict(dataset.state_dict())
    assert all(torch.equal(dataset[i][1], other[i][1]) for i in range(10))


def test_a_resume_reads_no_more_however_far_it_is(tmp_path, monkeypatch):
    path = write_tokenized(tmp_path, 60000, shards=50)
    work = Counter()

    def counted(function, name):
        def call(*args, **options):
            work[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(tokenized, "open", counted(open, "reads"), raising=False)
    monkeypatch.setattr(tokenized.hashlib, "blake2b", counted(tokenized.hashlib.blake2b, "digests"))
    most = {}
    for consumed in (0, 10**4, 10**8, 10**12):
        state = {**TokenizedDataset(path, SEQ_LEN).state_dict(), "windows": consumed}
        for _ in range(10):
            work.clear()
            (loader,) = make_loaders(path, 1)
            loader.load_state_dict(state)
            next(iter(loader))
            most[consumed] = max(most.get(consumed, (0, 0)), (work["reads"], work["digests"]))
            state["windows"] += 1
    # A window is in at most two shards. Most walks of the permutation have one or two rounds.
    assert all(1 <= reads <= 2 and digests <= 10 * 8 for reads, digests in most.values()), most


@pytest.mark.parametrize("changed", ["tokens", "tokenizer", "seq_len"])
def test_resume_refuses_another_corpus_tokenizer_or_window(tmp_path, changed):
    path = write_tokenized(tmp_path / "a", 1000)
    state = TokenizedDataset(path, SEQ_LEN).state_dict()
    TokenizedDataset(write_tokenized(tmp_path / "copy", 1000), SEQ_LEN).load_state_dict(state)
    other = write_tokenized(tmp_path / "b", 1000, first_id=int(changed == "tokens"))
    parts = ("training.dataset_path", other, "restore the folder")
    if changed == "tokenizer":
        file = Path(other, "train", "manifest.json")
        file.write_text(file.read_text().replace(tokenizer_digest(BYTE_TOKENIZER_PATH), "0"))
    seq_len = SEQ_LEN
    if changed == "seq_len":
        seq_len, parts = 8, ("training.seq_len must be 16", "got 8", "set it to that")
    dataset = TokenizedDataset(other, seq_len)
    with refused(*parts, 'checkpoint.exclude_from_loading = ["dataloader"]'):
        dataset.load_state_dict(state)


# ---- validation


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_evaluation_sees_the_same_held_out_windows(tmp_path, num_workers):
    held_out = make_texts(3, held_out=True)
    name, path = make_corpus(tmp_path / "corpus", "text", make_texts(9), held_out)
    out = str(tmp_path / "out")
    prepare(name, path, out, BYTE_TOKENIZER_PATH, split="validation")
    seen = []
    for seed in (0, 5):
        config = make_config("tokenized", out, num_workers, section="validation", steps=8)
        config.debug.seed = seed
        loader = build_validation_dataloader(1, 0, TOKENIZER, config)
        seen += [take(loader, 8), take(loader, 8)]
    for batches in seen[1:]:
        assert_same(batches, seen[0])
    tokens = {token for text in held_out for token in [*text.encode(), 256]}
    assert {int(token) for _, labels in seen[0] for token in labels.flatten()} == tokens
    assert all(map(is_held_out, held_out))


@pytest.mark.parametrize("dp_world_size", [1, 2, 3])
def test_an_evaluation_over_the_whole_split_stops(tmp_path, dp_world_size):
    """Left out are a window that would continue in the next epoch, and windows that do not fill a
    round of all ranks."""
    path = write_tokenized(tmp_path, 200, split="validation")
    config = make_config("tokenized", path, section="validation", steps=-1)
    starts = []
    for rank in range(dp_world_size):
        batches = list(build_validation_dataloader(dp_world_size, rank, TOKENIZER, config))
        starts.append([int(first) for inputs, _ in batches for first in inputs["input"][:, 0]])
    num_windows = 199 // SEQ_LEN // dp_world_size * dp_world_size
    assert {len(each) for each in starts} == {num_windows // dp_world_size}
    found = {start for each in starts for start in each}
    assert len(found) == num_windows and found <= set(range(0, 200 - SEQ_LEN, SEQ_LEN))

    config.validation.seq_len = 200
    with refused("validation.seq_len", "got 200 with 200 tokens", "validation.steps"):
        build_validation_dataloader(1, 0, TOKENIZER, config)


# ---- before training


@pytest.fixture
def place(tmp_path) -> Path:
    for split in ("train", "validation"):
        write_tokenized(tmp_path, 200, split=split)
    return tmp_path


def check(path: Path, section: str = "training", vocab_size: int = 320) -> None:
    check_tokenized(str(path), section, BYTE_TOKENIZER_PATH, vocab_size)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_refuses_a_folder_without_the_whole_split(place, section):
    check(place, section)
    folder = place / {"training": "train", "validation": "validation"}[section]
    (folder / "manifest.json").rename(folder / "manifest.partial.json")
    with refused(f"{section}.dataset_path", str(place), "has not ended", "start the same"):
        check(place, section)
    (folder / "manifest.partial.json").unlink()
    with refused(f"{section}.dataset_path", f"{folder.name}/manifest.json", "--output"):
        check(place, section)


@pytest.mark.parametrize("size", [None, 3, 1000], ids=["missing", "shorter", "longer"])
@pytest.mark.parametrize("section", ["training", "validation"])
def test_refuses_a_shard_of_another_size(place, section, size):
    shard = place / {"training": "train", "validation": "validation"}[section] / "00001.bin"
    shard.unlink()
    if size:
        shard.write_bytes(bytes(size))
    found = f"got {size} bytes" if size else "got none"
    with refused(f"{section}.dataset_path", str(shard), found, "134 bytes", "restore"):
        check(place, section)
    check(place, "validation" if section == "training" else "training")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"format": 1', '"format": 2', ("format 1", "got 2", "prepare the corpus again")),
        ('"format": 1', '"format": ', ("readable manifest", "restore it")),
        ('"format"', '"formats"', ("readable manifest", "restore it")),
        ('"tokens"', '"tokenz"', ("readable manifest", "restore it")),
        ('"shards": [', '"shards": [], "x": [', ("readable manifest", "no shard", "restore it")),
    ],
)
def test_refuses_a_manifest_that_is_not_of_this_format(place, old, new, parts):
    file = place / "train" / "manifest.json"
    file.write_text(file.read_text().replace(old, new))
    with refused("training.dataset_path", str(file), *parts):
        check(place)


def test_refuses_ids_beyond_the_vocabulary(place):
    check(place, vocab_size=200)
    with refused("training.dataset_path", "less than the 199", "got 199", "flavor"):
        check(place, vocab_size=199)


# ---- the trainer


def test_refuses_the_data_position_of_streamed_text(tmp_path, place):
    whole = tmp_path / "step-8"
    state = {
        "dataloader": {"dp_rank_0": pickle.dumps({"documents": 3})},
        "train_state": {"step": 8, "ntokens_seen": 8},
    }
    model = Transformer(FLAVORS["quickstart"])
    dcp.save({**model.state_dict(), **state}, checkpoint_id=whole, no_dist=True)
    options = {
        "training__dataset": "tokenized",
        "checkpoint__initial_load_path": whole,
        "model__flavor": "quickstart",
        "lighthouse__full_attn_layers": [0],
    }
    args = command_line(tmp_path / "run", place, **options)
    parts = ("training.dataset must be a corpus of documents", str(whole), "got 'tokenized'")
    with refused(*parts, "set it back", "exclude_from_loading"):
        check_config(load_config(args), world_size=1)


def test_a_plan_compares_with_the_tokenizer_once_it_is_there(tmp_path, place):
    tokenizer = tmp_path / "tokenizer"
    options = {"training__dataset": "tokenized", "model__hf_assets_path": tokenizer}
    config = load_config(command_line(tmp_path / "run", place, **options))
    check_config(config, world_size=1, is_start=False)
    shutil.copytree(BYTE_TOKENIZER_PATH, tokenizer)
    check_config(config, world_size=1, is_start=False)
    with (tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    with refused("training.dataset_path", "model.hf_assets_path", repr(str(tokenizer)), str(place)):
        check_config(config, world_size=1, is_start=False)


STEPS, STAGE1_STEPS = 6, 3
OPTIONS = {
    "model__flavor": "quickstart",
    "lighthouse__full_attn_layers": [0],
    "training__dataset": "tokenized",
    "validation__dataset": "tokenized",
    "validation__enable": True,
    "training__global_batch_size": 2,
    "training__steps": STEPS,
    # Without it, Adam divides a difference of two roundings by its own size.
    "optimizer__eps": 1e-3,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_corpus(folder / "text")
    for split in ("train", "validation"):
        prepare("text", str(text), folder / "out", BYTE_TOKENIZER_PATH, split=split)
    return text, folder / "out"


def test_a_run_goes_on_under_another_data_parallel_degree(tmp_path, corpora):
    """One process with accumulation, then two ranks, then one, compared with one throughout."""
    text, out = corpora
    whole = train(command_line(tmp_path / "whole", out, **OPTIONS))

    def args_until(steps: int) -> list[str]:
        stage1_steps = min(steps, STAGE1_STEPS)
        options = {"training__steps": steps, "lighthouse__stage1_steps": stage1_steps}
        return command_line(tmp_path / "run", out, **{**OPTIONS, **options})

    legs = [
        [train(args_until(2))],
        launch(train, 2, tmp_path / "ranks", args_until(4)),
        [train(args_until(STEPS))],
    ]
    for step, batches in whole.batches.items():
        ranks = legs[(step - 1) // 2]
        assert sorted(batch for rank in ranks for batch in rank.batches[step]) == sorted(batches)
        assert len(set(batches)) == 2
        assert all(set(rank.batches) == set(ranks[0].batches) for rank in ranks)
    assert sum(len(ranks[0].batches) for ranks in legs) == len(whole.batches) == STEPS
    assert losses_of(tmp_path / "run") == pytest.approx(whole.losses, rel=1e-5)
    tokens = read_manifest(out, "train", "--output").tokens
    assert whole.epoch == legs[-1][0].epoch == 2 * STEPS * 768 // tokens > 1
    (position,) = json.loads((tmp_path / "whole" / "handover.json").read_text())["data"]
    assert position == {"epoch": 1, "windows": 2 * STAGE1_STEPS}
    both = json.loads((tmp_path / "run" / "handover.json").read_text())["data"]
    assert both == [position, position]

    # A change that the checkpoint does not allow ends the run before it starts.
    other = {"training__dataset": "text", "training__dataset_path": text}
    for options, parts in (
        (other, ("training.dataset must be 'tokenized'", "got 'text'", "set it back")),
        ({"training__seq_len": 1024}, ("training.seq_len must be 768", "got 1024")),
    ):
        args = command_line(tmp_path / "run", out, **{**OPTIONS, **options})
        args += ["--checkpoint.accept_changes", "training.seq_len,lighthouse.stage1_steps"]
        with refused(*parts, 'exclude_from_loading = ["dataloader"]'):
            check_config(load_config(args), world_size=1)
        args += ["--checkpoint.exclude_from_loading", "dataloader"]
        args += ["--lighthouse.stage1_steps", "0"]
        check_config(load_config(args), world_size=1)
