"""Held-out loss of trained models, overall and by position in the context.

    lighthouse eval-loss outputs/debug/checkpoint/step-40
    lighthouse eval-loss outputs/debug/checkpoint/step-40 exported --lighthouse topk=128

MODEL is a checkpoint, .../checkpoint/step-N of either stage, or a folder in Hugging Face's format.
Attention is dense. With --lighthouse, the same weights are also measured with Lighthouse Attention.
Its fields are those of the run's saved configuration, changed by --lighthouse.

The text is the beginning of the validation data of the run. --dataset names other data, and must be
given if the runs of several models have different data. An exported folder keeps no data: on its
own, it is measured on the held-out part of python_stdlib.

The text is packed into windows as in training. A window may start inside a document and hold
several documents. A token's position is the number of tokens before it in the window. Buckets of
positions double in width. Losses are in nats per token, with the standard error of the mean over
windows. Only compare models with the same tokenizer. For several results the difference from the
first is paired: it is taken window by window, and its standard error is that of the differences.

Writes eval_loss.png and eval_loss.json to --output. The last printed line is the same JSON.
"""

import argparse
import itertools
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import use_stage_1
from torchtitan.experiments.lighthouse.config.job_config import JobConfig, Validation
from torchtitan.experiments.lighthouse.config.rule_helpers import require
from torchtitan.experiments.lighthouse.data.datasets import DATASETS, check_dataset
from torchtitan.experiments.lighthouse.data.loaders import build_validation_dataloader
from torchtitan.experiments.lighthouse.data.tokenized import check_tokenized
from torchtitan.experiments.lighthouse.inference.generate import hidden_states
from torchtitan.experiments.lighthouse.inference.load_model import (
    LIGHTHOUSE_FIELDS,
    HeldOutText,
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
)
from torchtitan.experiments.lighthouse.runtime.plots import save, subplots
from torchtitan.models.llama3 import Transformer

FIRST_BUCKET = 64
"""Width of the first bucket, in tokens."""

CHUNK_SIZE = 1024
"""Number of tokens whose logits are in memory at the same time."""


def main() -> None:
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="checkpoint or exported folder")
    add("--lighthouse", metavar="FIELD=VALUE", nargs="*", help="measure with Lighthouse as well")
    add("--dataset", choices=list(DATASETS), help="default: the validation data of the run")
    add("--dataset-path", help="folder or file of --dataset, if it needs one")
    add("--text-field", help="key or column of the text in --dataset; default: text")
    add("--seq-len", type=int, help="tokens per window; default: as trained")
    add("--windows", type=int, default=16, help="maximum number of windows; default: 16")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    add("--output", type=Path, help="folder for the figures; default: inside the run's folder")
    add_arguments(parser)
    options = parser.parse_args()
    # torchdata makes this call, and users cannot avoid it.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    options.output = options.output or output_folder(options.models[0], "eval_loss")
    with exit_on_value_error():
        result = evaluate(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "eval_loss.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.output / "eval_loss.png")
    print(table(result))
    print(f"  {options.output / 'eval_loss.png'}")
    print(json.dumps(result))


def evaluate(options: argparse.Namespace) -> dict:
    """Measure all models. Raises ValueError for illegal options."""
    check_output_folder("--output", options.output)
    check_device(options.device)
    for name, value in (("--windows", options.windows), ("--seq-len", options.seq_len)):
        require(value is None or value >= 1, name, "at least 1", value, "use 1 or more")
    trained = [
        open_trained(folder, options.flavor, options.max_seq_len, options.tokenizer)
        for folder in options.models
    ]
    seq_len = options.seq_len or min(model.args.max_seq_len for model in trained)
    fields = [None] * len(trained)
    if options.lighthouse is not None:
        fields = [given_fields(model, options.lighthouse, seq_len) for model in trained]
    text = held_out_text(trained, options)
    for model in trained:
        check_held_out(text, model)
    results, first = [], None
    for model, lighthouse in zip(trained, fields, strict=True):
        windows = held_out_windows(model, text, seq_len, options.windows)
        labels = torch.cat([labels for _, labels in windows])
        transformer = model.load(options.device, TORCH_DTYPE_MAP[options.dtype], seq_len)
        for attention in ("dense",) if lighthouse is None else ("dense", "Lighthouse"):
            entry = {"model": str(model.folder), "attention": attention}
            if attention == "Lighthouse":
                use_stage_1(transformer, lighthouse, model.args.n_layers)
                entry["fields"] = {name: getattr(lighthouse, name) for name in LIGHTHOUSE_FIELDS}
            losses = token_losses(transformer, windows)
            entry |= {"windows": len(windows), **summary(losses)}
            if first is None:
                first = labels, losses
            elif torch.equal(labels, first[0]):
                entry["minus_first"] = summary(losses - first[1])
            results.append(entry)
    return {
        **text._asdict(),
        "seq_len": seq_len,
        "device": options.device,
        "dtype": options.dtype,
        "results": results,
    }


def summary(losses: torch.Tensor) -> dict:
    """Mean of [windows, tokens] and its standard error, overall and by position."""
    by_position = [
        {"from": start, "to": end, **mean(losses[:, start:end])}
        for start, end in buckets(losses.shape[1])
    ]
    return {**mean(losses), "by_position": by_position}


def held_out_text(trained: list[ModelSource], options: argparse.Namespace) -> HeldOutText:
    """The text of --dataset, or the one that the runs of the models validated on.

    Raises:
        ValueError: the runs have different data, or only details of --dataset are given.
    """
    given = {"dataset_path": options.dataset_path, "text_field": options.text_field}
    given = {name: value for name, value in given.items() if value is not None}
    if options.dataset is not None:
        return HeldOutText(options.dataset, **given)
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        require(False, option, "given with --dataset only", value, "add --dataset")
    found = {model.held_out: model.folder for model in trained if model.held_out}
    if len(found) > 1:
        names = " and ".join(f"{text} for {folder}" for text, folder in found.items())
        raise ValueError(
            "--dataset must be given for runs with different validation data, got none with "
            f"{names}; name the data for all of them"
        )
    return next(iter(found), HeldOutText("python_stdlib"))


def check_held_out(text: HeldOutText, model: ModelSource) -> None:
    """Raise ValueError if the text is missing or was tokenized for another model."""
    try:
        check_dataset(text.dataset, text.dataset_path, "validation", text_field=text.text_field)
        if text.dataset == "tokenized":
            path = text.dataset_path
            check_tokenized(path, "validation", model.tokenizer_path, model.args.vocab_size)
    except ValueError as error:
        if text == model.held_out:
            raise ValueError(f"{error}; or name other data with --dataset") from None
        raise


def held_out_windows(
    model: ModelSource, text: HeldOutText, seq_len: int, count: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels, [1, S] each, of the first `count` or all windows of the text."""
    validation = Validation(
        **text._asdict(),
        seq_len=seq_len,
        local_batch_size=1,
        # One pass over the whole text.
        steps=-1,
    )
    config = JobConfig(validation=validation)
    loader = build_validation_dataloader(1, 0, model.tokenizer(), config)
    windows = itertools.islice(loader, count)
    return [(inputs["input"], labels) for inputs, labels in windows]


@torch.inference_mode()
def token_losses(
    model: Transformer, windows: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Loss of each token of each window, [windows, S] in fp64 on the CPU."""
    rows = []
    for inputs, labels in windows:
        device = model.freqs_cis.device
        hidden, labels = hidden_states(model, inputs.to(device))[0], labels[0].to(device)
        chunks = zip(hidden.split(CHUNK_SIZE), labels.split(CHUNK_SIZE), strict=True)
        losses = [F.cross_entropy(model.output(h).float(), y, reduction="none") for h, y in chunks]
        rows.append(torch.cat(losses).double().cpu())
    return torch.stack(rows)


def buckets(seq_len: int) -> list[tuple[int, int]]:
    """Start and end positions of the buckets. The end is exclusive."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < seq_len:
        edges.append(2 * edges[-1])
    return [(start, min(end, seq_len)) for start, end in itertools.pairwise(edges)]


def mean(losses: torch.Tensor) -> dict[str, float | None]:
    """Mean of [windows, tokens] and its standard error over windows (None for one window)."""
    by_window = losses.mean(1)
    n = len(by_window)
    error = (by_window.std() / n**0.5).item() if n > 1 else None
    return {"loss": by_window.mean().item(), "standard_error": error}


def table(result: dict) -> str:
    models = list(dict.fromkeys(r["model"] for r in result["results"]))
    columns = [f"{models.index(r['model']) + 1} {r['attention']}" for r in result["results"]]
    text = HeldOutText(*(result[name] for name in HeldOutText._fields))
    lines = [
        f"Held-out loss, {text}, {result['results'][0]['windows']} windows of "
        f"{result['seq_len']:,} tokens, {result['dtype']} on {result['device']}",
        *(f"  {i}: {model}" for i, model in enumerate(models, 1)),
        "",
        f"{'position':>17}" + "".join(f"{column:>18}" for column in columns),
    ]
    by_position = zip(*(r["by_position"] for r in result["results"]), strict=True)
    for cells in by_position:
        name = f"{cells[0]['from']:,}-{cells[0]['to'] - 1:,}"
        lines.append(f"{name:>17}" + "".join(f"{cell(c):>18}" for c in cells))
    lines.append(f"{'all':>17}" + "".join(f"{cell(r):>18}" for r in result["results"]))
    paired = [r.get("minus_first") for r in result["results"]]
    if any(paired):
        cells = "".join(f"{cell(difference) if difference else '':>18}" for difference in paired)
        lines.append(f"{'minus the first':>17}" + cells)
    return "\n".join(lines)


def cell(value: dict) -> str:
    error = value["standard_error"]
    return f"{value['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def plot(result: dict, path: Path) -> None:
    """Plot loss by position, with one line for each model and attention."""
    figure, axes = subplots(figsize=(10, 7))
    for entry in result["results"]:
        # The middle of a bucket on a logarithmic axis. The first bucket starts at 1 there.
        middles = [(max(1, b["from"]) * b["to"]) ** 0.5 for b in entry["by_position"]]
        losses = [b["loss"] for b in entry["by_position"]]
        errors = [b["standard_error"] or 0 for b in entry["by_position"]]
        label = f"{entry['model']}, {entry['attention']}: {entry['loss']:.3f}"
        axes.errorbar(middles, losses, errors, marker="o", capsize=3, label=label)
    axes.set_xscale("log")
    edges = [b["to"] for b in result["results"][0]["by_position"]]
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.minorticks_off()
    axes.set(xlabel="tokens before", ylabel="held-out loss (nats per token)")
    axes.set_title(f"Held-out loss by position, {result['dataset']}, {result['seq_len']:,} tokens")
    figure.legend(loc="outside lower left")
    save(figure, path)
