"""The data path: packing, ranks, held-out split, resuming at every step, and errors."""

import gzip
import itertools
import json
import math
import pickle
import sysconfig
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from refusals import refused
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH, EOS_ID
from torchtitan.experiments.lighthouse.data.datasets import (
    check_dataset,
    find_files,
    is_held_out,
)
from torchtitan.experiments.lighthouse.data.documents import permutation
from torchtitan.experiments.lighthouse.data.loaders import (
    build_dataloader,
    build_validation_dataloader,
    check_data,
)
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.data.tokenize import prepare

TOKENIZER = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
SEQ_LEN = 16

# Two ranks split two shards by file. They split three shards or one by row.
KINDS = ["text", "jsonl", "jsonl-2shards", "parquet", "c4_local"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that looks up a host. An exception alone could be caught on its way."""
    hosts = []

    def refuse(host, *args, **options):
        hosts.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    yield
    assert not hosts


def make_texts(count: int, held_out: bool = False) -> list[str]:
    """`count` different short documents, all in the same split."""
    candidates = (f"{i} " + "né\n"[: i % 4] * (i % 11) for i in itertools.count())
    return list(itertools.islice((t for t in candidates if is_held_out(t) == held_out), count))


def write_shards(folder: Path, name: str, texts: list[str], num_shards: int) -> None:
    """Write gzipped JSON lines with the fields and file names of C4."""
    for shard in range(num_shards):
        path = folder / f"c4-{name}.{shard:05d}-of-{num_shards:05d}.json.gz"
        with gzip.open(path, "wt", encoding="utf-8") as lines:
            for text in texts[shard::num_shards]:
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/"}
                lines.write(json.dumps(row) + "\n")


def write_parquet(path: Path, column: str, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def make_corpus(
    folder: Path, kind: str, train: list[str], validation: list[str] | None = None
) -> tuple[str, str]:
    """Write a corpus. Returns its name and its path."""
    folder.mkdir(exist_ok=True)
    name = kind.split("-")[0]
    validation = validation if validation is not None else make_texts(3, held_out=True)
    texts = [*train, *validation]
    if name == "text":
        for i, text in enumerate(texts):
            (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    elif name == "jsonl":
        num_shards = 2 if kind.endswith("2shards") else 3
        for shard in range(num_shards):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::num_shards]]
            (folder / f"{shard}.jsonl").write_text("".join(lines), encoding="utf-8")
    elif name == "parquet":
        write_parquet(folder / "rows.parquet", "text", texts)
    else:
        write_shards(folder, "train", train, 3)
        write_shards(folder, "validation", validation, 1)
    return name, str(folder)


def make_dataset(
    name, path, state=None, *, tokenizer=TOKENIZER, seq_len=SEQ_LEN, **options
) -> PackedTextDataset:
    """A dataset at its beginning, or at the position of a saved state."""
    dataset = PackedTextDataset(name, path, tokenizer, seq_len, **options)
    if state is not None:
        dataset.load_state_dict(pickle.loads(pickle.dumps(state)))
    return dataset


def make_config(name, path, num_workers=0, section="training", **options) -> JobConfig:
    config = JobConfig()
    options_of_section = getattr(config, section)
    options = {"dataset": name, "dataset_path": path, "seq_len": SEQ_LEN, **options}
    for key, value in {"local_batch_size": 2, **options}.items():
        setattr(options_of_section, key, value)
    options_of_section.dataloader.num_workers = num_workers
    return config


def stream_of(windows) -> list[int]:
    """The tokens that windows [S] cover. Checks that each window continues the last one."""
    tokens = []
    for inputs, labels in windows:
        inputs = inputs["input"]
        assert inputs.shape == labels.shape == (SEQ_LEN,)
        assert inputs.dtype == labels.dtype == torch.int64
        assert torch.equal(inputs[1:], labels[:-1])
        assert not tokens or tokens[-1] == inputs[0]
        tokens += labels.tolist() if tokens else [int(inputs[0]), *labels.tolist()]
    return tokens


def documents_of(tokens: list[int]) -> list[str]:
    """The texts of a byte stream that consists of whole documents."""
    documents = bytes(token if token < 256 else 0xFF for token in tokens).split(b"\xff")
    return [document.decode() for document in documents[:-1]]


def take(iterable, count: int) -> list:
    return list(itertools.islice(iterable, count))


def assert_same(windows, expected):
    for window, same in zip(windows, expected, strict=True):
        assert torch.equal(window[0]["input"], same[0]["input"])
        assert torch.equal(window[1], same[1])


# ---- packing and ranks


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_corpus_without_its_first_token(tmp_path, kind):
    train = make_texts(40)
    name, path = make_corpus(tmp_path, kind, train)
    dataset = make_dataset(name, path, infinite=False)
    windows = list(dataset)

    num_tokens = sum(len(text.encode()) + 1 for text in train)
    assert len(windows) == (num_tokens - 1) // SEQ_LEN
    tokens = stream_of(windows)
    assert Counter(documents_of(tokens)) <= Counter(train)
    # The rest is less than a window, and the position counts it.
    left = num_tokens - (len(tokens) - 1)
    assert left <= SEQ_LEN
    position = {"epoch": 0, "documents": len(train), "tokens_buffered": left}
    assert dataset.position() == position

    if name == "parquet":
        corpus = [token for text in train for token in [*text.encode(), EOS_ID]]
        assert tokens == corpus[: len(tokens)]


def test_an_epoch_goes_on_in_the_buffer_of_the_last(tmp_path):
    train = make_texts(10)
    name, path = make_corpus(tmp_path, "parquet", train)
    corpus = [token for text in train for token in [*text.encode(), EOS_ID]]
    count = 3 * len(corpus) // SEQ_LEN
    tokens = stream_of(take(make_dataset(name, path), count))
    assert tokens == (corpus * 4)[: count * SEQ_LEN + 1]


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    train = make_texts(30)
    name, path = make_corpus(tmp_path, "text", train)

    def order(seed, epoch):
        documents = make_dataset(name, path, seed=seed)._documents
        return [text for text, _ in documents.read(seed, epoch, 0, None)]

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 0)
    assert sorted(order(0, 1)) == sorted(order(1, 0)) == sorted(train)


def test_the_order_is_the_same_on_every_machine():
    assert sorted(permutation(8, -1, 2)) == list(range(8))
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_a_document_longer_than_many_windows(tmp_path):
    train = [text * 200 for text in make_texts(200)[100:110]]
    train = [text for text in train if not is_held_out(text)]
    name, path = make_corpus(tmp_path, "jsonl", train, [])
    tokens = stream_of(make_dataset(name, path, infinite=False))
    assert len(tokens) > 100 * SEQ_LEN
    assert Counter(documents_of(tokens)) <= Counter(train)


def test_paths_with_glob_characters_nested_folders_and_empty_files(tmp_path):
    train = make_texts(9)
    folder = tmp_path / "a[b]* {c}"
    name, path = make_corpus(folder, "text", train[:6], [])
    (folder / "sub").mkdir()
    for i, text in enumerate(train[6:]):
        (folder / "sub" / f"{i}.md").write_text(text, encoding="utf-8")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text("")
    documents = make_dataset(name, path)._documents.read(0, 0, 0, None)
    assert sorted(text for text, _ in documents) == sorted(train)


def test_json_lines_with_other_fields_null_texts_and_half_surrogates(tmp_path):
    rows = [{"text": "a", "id": 1}, {"text": None}, {"id": [2], "text": "b\ud800"}, {"text": ""}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n")
    documents = make_dataset("jsonl", str(tmp_path))._documents.read(0, 0, 0, None)
    assert [text for text, _ in documents] == ["a", "b?"]


# ---- resuming


@pytest.mark.parametrize("dp_world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_every_step_of_several_epochs(tmp_path, kind, dp_world_size):
    train = make_texts(12)
    name, path = make_corpus(tmp_path, kind, train)
    num_epochs = 3
    num_tokens = sum(len(text.encode()) + 1 for text in train)
    for dp_rank in range(dp_world_size):

        def make(state=None, dp_rank=dp_rank):
            return make_dataset(name, path, state, dp_rank=dp_rank, dp_world_size=dp_world_size)

        dataset = make()
        states, expected = [pickle.dumps(dataset.state_dict())], []
        num_steps = num_epochs * num_tokens // dp_world_size // SEQ_LEN + 3
        for window in itertools.islice(dataset, num_steps):
            expected.append(window)
            states.append(pickle.dumps(dataset.state_dict()))
        assert dataset.position()["epoch"] >= num_epochs - 1
        assert max(map(len, states)) < 2000

        resumed = make()
        for step, state in enumerate(states[:-3]):
            resumed.load_state_dict(pickle.loads(state))
            assert resumed.state_dict() == pickle.loads(state)
            assert_same(take(resumed, 3), expected[step : step + 3])

        # Resume again for every window, each time with a new dataset.
        state = states[0]
        for same in expected:
            dataset = make(pickle.loads(state))
            assert_same(take(dataset, 1), [same])
            state = pickle.dumps(dataset.state_dict())


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_dataloader_resumes_across_epochs(tmp_path, kind, num_workers):
    name, path = make_corpus(tmp_path, kind, make_texts(12))
    config = make_config(name, path, num_workers)

    def load(state=None) -> ParallelAwareDataloader:
        loader = build_dataloader(2, 1, TOKENIZER, config)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    num_steps, every = (20, 1) if num_workers == 0 else (12, 4)
    loader = load()
    states, expected = [loader.state_dict()], []
    batches = iter(loader)
    for _ in range(num_steps):
        expected.append(next(batches))
        states.append(loader.state_dict())
    assert expected[0][1].shape == (2, SEQ_LEN)
    dataset = make_dataset(name, path, dp_rank=1, dp_world_size=2)
    take(dataset, 2 * num_steps)
    assert dataset.position()["epoch"] >= 2
    if num_workers == 0:
        assert loader.dataset.position() == dataset.position()

    for step in range(0, num_steps, every):
        following = expected[step : step + 2]
        assert_same(take(load(states[step]), len(following)), following)
        # Save directly after a resume, and resume from that.
        again = load(load(states[step]).state_dict())
        assert_same(take(again, 1), following[:1])


def test_resume_within_the_last_document_of_a_finite_pass(tmp_path):
    (tmp_path / "long.txt").write_text("abcdefghij" * 20)
    dataset = make_dataset("text", str(tmp_path), infinite=False)
    expected = list(dataset)
    assert len(expected) == 12
    take(dataset, 3)
    resumed = make_dataset("text", str(tmp_path), dataset.state_dict(), infinite=False)
    assert_same(list(resumed), expected[3:])


def test_a_resume_keeps_the_seed_of_the_position(tmp_path):
    name, path = make_corpus(tmp_path, "text", make_texts(12))
    dataset = make_dataset(name, path, seed=3)
    expected = take(dataset, 20)
    take(dataset, 2)
    resumed = make_dataset(name, path, dataset.state_dict(), seed=4)
    assert_same(take(resumed, 18), expected[2:])


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_resume_refuses_other_documents(tmp_path, kind):
    name, path = make_corpus(tmp_path / "a", kind, make_texts(12))
    _, other = make_corpus(tmp_path / "b", kind, make_texts(13)[1:])
    _, copy = make_corpus(tmp_path / "c", kind, make_texts(12))
    dataset = make_dataset(name, path)
    expected = take(dataset, 5)
    next(iter(dataset))
    state = dataset.state_dict()
    assert_same(take(make_dataset(name, copy, state), 1), expected[1:2])
    with refused("training.dataset", other, "exclude_from_loading"):
        make_dataset(name, other, state)


# ---- the held-out split


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_reads_a_held_out_document(tmp_path, kind):
    train, validation = make_texts(30), make_texts(6, held_out=True)
    # A copy of a held-out document is also held out.
    name, path = make_corpus(tmp_path, kind, train, [*validation, validation[0]])
    read = {}
    for split in ("train", "validation"):
        documents = make_dataset(name, path, split=split)._documents
        read[split] = sorted(text for text, _ in documents.read(0, 0, 0, None))
    assert read["train"] == sorted(train)
    assert read["validation"] == sorted([*validation, validation[0]])


def test_held_out_is_a_function_of_the_bytes():
    text = make_texts(1, held_out=True)[0]
    assert zlib.crc32(text.encode()) % 32 == 0
    share = sum(is_held_out(str(i)) for i in range(32000)) / 32000
    assert 0.9 / 32 < share < 1.1 / 32


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["text", "c4_local"])
def test_each_evaluation_sees_the_same_windows(tmp_path, kind, num_workers):
    # The text is much shorter than requested, so it is repeated.
    name, path = make_corpus(tmp_path, kind, make_texts(5), make_texts(3, held_out=True))
    config = make_config(name, path, num_workers, section="validation", steps=8)
    loader = build_validation_dataloader(1, 0, TOKENIZER, config)
    first, second = take(loader, 8), take(loader, 8)
    assert len(first) == 8
    assert_same(second, first)


def test_evaluation_over_the_whole_split_stops(tmp_path):
    validation = make_texts(20, held_out=True)
    name, path = make_corpus(tmp_path, "text", make_texts(5), validation)
    config = make_config(name, path, section="validation", steps=-1)
    batches = list(build_validation_dataloader(1, 0, TOKENIZER, config))
    num_tokens = sum(len(text.encode()) + 1 for text in validation)
    assert sum(len(labels) for _, labels in batches) == (num_tokens - 1) // SEQ_LEN


# ---- the standard library


def test_python_stdlib_is_text_enough():
    files = find_files("python_stdlib", None)
    root = Path(sysconfig.get_path("stdlib"))
    assert all(file.suffix == ".py" for file in files)
    assert not {"site-packages", "test", "tests", "idle_test"} & {
        part for file in files for part in file.relative_to(root).parts
    }
    train = make_dataset("python_stdlib", None)._documents.read(0, 0, 0, None)
    held_out = make_dataset("python_stdlib", None, split="validation")
    train = {text for text, _ in train}
    held_out = {text for text, _ in held_out._documents.read(0, 0, 0, None)}
    assert sum(len(text.encode()) for text in train) > 5e6
    assert sum(len(text.encode()) for text in held_out) > 5e4
    assert train.isdisjoint(held_out)
    # Text has about 3.2 nats per byte by frequency alone, unlike noise or a constant.
    counts = Counter("".join(train).encode())
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert 2.5 < entropy < 4


# ---- refusals


def test_data_for_a_later_run_need_not_be_there_but_what_is_there_must_be_right(tmp_path):
    config = make_config("jsonl", str(tmp_path / "nowhere"))
    config.validation.enable = True
    config.validation.dataset, config.validation.dataset_path = "jsonl", str(tmp_path)
    with refused("validation.dataset_path", "*.jsonl", str(tmp_path)):
        check_data(config, must_exist=False)
    config.validation.dataset_path = str(tmp_path / "nowhere")
    check_data(config, must_exist=False)
    config.training.dataset = "jsonlines"
    with refused("training.dataset", "'jsonlines'", "did you mean 'jsonl'?"):
        check_data(config, must_exist=False)


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "c4_local"])
def test_refuses_files_that_are_all_empty(tmp_path, name):
    make_corpus(tmp_path, name, [], [])
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('\n{"text": null}\n')
    with refused("training.dataset_path", str(tmp_path), "empty", "fill them"):
        check_dataset(name, str(tmp_path))


def test_refuses_validation_on_c4_shards_of_the_training_split(tmp_path):
    write_shards(tmp_path, "train", make_texts(3), 1)
    check_dataset("c4_local", str(tmp_path))
    with refused("validation.dataset_path", "c4-validation.*.json.gz", str(tmp_path), "add the"):
        check_dataset("c4_local", str(tmp_path), "validation")


def test_refuses_files_that_cannot_be_read(tmp_path):
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:15])
    (tmp_path / "a.parquet").write_text("PAR")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, file in (("jsonl", "torn.jsonl.gz"), ("parquet", "a.parquet")):
        with refused("training.dataset_path", file, "replace or remove"):
            check_dataset(name, str(tmp_path / file))
    with refused("training.dataset_path", "latin.txt", "0xe9 at 0", "convert or remove"):
        make_dataset("text", str(tmp_path))
    with refused("--dataset-path", "latin.txt", "0xe9 at 0", "convert or remove"):
        prepare("text", str(tmp_path), tmp_path.with_suffix(".out"), BYTE_TOKENIZER_PATH)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_refuses_fewer_documents_than_ranks(tmp_path, kind):
    name, path = make_corpus(tmp_path, kind, make_texts(2))
    with refused("training.dataset ", name, "add documents or lower"):
        list(make_dataset(name, path, dp_rank=7, dp_world_size=8))


def test_refuses_a_corpus_without_a_token(tmp_path):
    class Mute:
        def encode(self, text, add_bos, add_eos):
            return []

    name, path = make_corpus(tmp_path, "text", make_texts(2))
    with refused("training.dataset ", "no token", name, "fill the documents"):
        next(iter(make_dataset(name, path, tokenizer=Mute())))


def test_refuses_an_evaluation_without_a_window(tmp_path):
    name, path = make_corpus(tmp_path, "text", make_texts(5))
    options = {"split": "validation", "seq_len": 4096}
    assert len(take(make_dataset(name, path, **options), 2)) == 2
    with refused("validation.seq_len", "4096", "validation.steps"):
        list(make_dataset(name, path, infinite=False, **options))


@pytest.mark.parametrize("section", ["training", "validation"])
def test_refuses_several_workers(tmp_path, section):
    name, path = make_corpus(tmp_path, "text", make_texts(5))
    config = make_config(name, path, section=section, num_workers=2)
    build = {"training": build_dataloader, "validation": build_validation_dataloader}[section]
    with refused(f"{section}.dataloader.num_workers", "got 2", "set it to 1"):
        build(1, 0, TOKENIZER, config)


def test_config_check_covers_validation_where_it_is_enabled():
    config = make_config("python_stdlib", None)
    check_data(config)
    config.validation.enable, config.validation.dataset = True, "c4_validation"
    with refused("validation.dataset must be one of"):
        check_data(config)
    config.validation.dataset = "python_stdlib"
    check_data(config)
