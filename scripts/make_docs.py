#!/usr/bin/env python3
"""Write the generated page of the documents: docs/configuration.md.

    scripts/make_docs.py            # write it
    scripts/make_docs.py --check    # exit code 1 if it is out of date

Fields, types and defaults come from the dataclasses, their text from the docstrings below the
fields, and the rules from the tables that check a run.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from torchtitan.config import job_config as titan
from torchtitan.experiments.lighthouse.checkpoint.compatibility import FIELDS
from torchtitan.experiments.lighthouse.config import job_config, parallel_rules, rules
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.rule_helpers import Rule, leaves, value_of
from torchtitan.experiments.lighthouse.flavors import FLAVORS, sizes_of

from lighthouse import LighthouseConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
EXAMPLE = "c4_530m_98k.toml"
WORLD_SIZE = 32
RULES = [
    rule
    for module in (rules, parallel_rules)
    for rules_of_module in vars(module).values()
    if isinstance(rules_of_module, list)
    for rule in rules_of_module
    if isinstance(rule, Rule)
] + parallel_rules.process_rules(WORLD_SIZE)
"""All tables of rules, and those for a number of processes."""

SECTIONS = {
    "lighthouse": job_config.Lighthouse,
    "model": job_config.Model,
    "model.override": job_config.Sizes,
    "training": job_config.Training,
    "validation": job_config.Validation,
    "checkpoint": job_config.Checkpoint,
}
"""Sections with fields of our own."""

INTRO = """\
# Configuration

A run is one TOML file. This page lists every field that Lighthouse adds, with its type, default and
rule. `scripts/make_docs.py` writes it from the code, and a test checks that it is up to date.

```toml
[model]
flavor = "268M"

[training]
dataset = "c4"
seq_len = 98304
steps = 16000

[lighthouse]
topk = 1536
full_attn_layers = [0, 1, -2, -1]
stage1_steps = 10000
```

- `lighthouse init --list` shows the shipped files, and `lighthouse init debug` copies one.
- Any field can be overridden on the command line: `--training.steps 100 --lighthouse.topk 256`.
- All other sections and fields are those of torchtitan 0.2.2. `python -m
  torchtitan.experiments.lighthouse.train --help` lists them all.
- All rules are checked before a process group, data or a GPU is touched. A broken rule ends the run
  with exit code 2 and one line: the field, the rule, the value, the remedy.
- `lighthouse plan` checks the same rules on any machine. [The planner](planner.md) describes it.

A rule marked with `*` depends on other fields. The table shows what it is for
`train_configs/{example}` on {world_size} GPUs. The lengths that fit the
levels, the factor and `topk` follow from the method: see [legal shapes](method.md#legal-shapes).
"""


def docstrings(section: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, in one line."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def own_fields(section: type) -> list[str]:
    """Fields that torchtitan's class does not have."""
    parent = section.__mro__[1]
    inherited = {f.name for f in dataclasses.fields(parent)} if parent is not object else set()
    return [f.name for f in dataclasses.fields(section) if f.name not in inherited]


def type_name(hint: type) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(toml(choice) for choice in get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint}`"


def toml(value: object) -> str:
    """A value as TOML writes it."""
    if value is None:
        return "not set"
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return f"`{text}`"


def rule_texts(name: str, example: JobConfig) -> list[str]:
    """The rules of a field. One that looks at other fields is shown for `example`."""
    return list(dict.fromkeys(rule_text(rule, example) for rule in RULES if rule.field == name))


def rule_text(rule: Rule, example: JobConfig) -> str:
    if rule.field == "compile.backend":
        # They differ between versions of torch.
        return "a backend of torch.compile"
    if isinstance(rule.rule, str):
        return rule.rule
    try:
        return rule.rule(None)
    except AttributeError:
        return f"{rule.rule(example)} `*`"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def section_table(name: str, section: type, example: JobConfig) -> str:
    texts, hints = docstrings(section), get_type_hints(section)
    if name == "lighthouse":
        texts |= docstrings(LighthouseConfig)
    defaults = JobConfig()
    rows = []
    for field in own_fields(section):
        if dataclasses.is_dataclass(hints[field]):
            continue
        full = f"{name}.{field}"
        rules = ". ".join(rule_texts(full, example))
        row = [f"`{field}`", type_name(hints[field])]
        rows.append([*row, toml(value_of(defaults, full)), texts.get(field, ""), rules])
    return table(["field", "type", "default", "what it does", "must be"], rows)


def changed_defaults() -> str:
    """Fields of torchtitan with a default of ours."""
    ours, theirs = JobConfig(), titan.JobConfig()
    rows = [
        [f"`{name}`", toml(value_of(ours, name)), toml(value_of(theirs, name))]
        for name, _ in leaves(titan.JobConfig)
        # A path of this installation.
        if name != "model.hf_assets_path" and value_of(ours, name) != value_of(theirs, name)
    ]
    rows.append(["`model.hf_assets_path`", "the byte tokenizer", toml(theirs.model.hf_assets_path)])
    return table(["field", "default here", "default in torchtitan"], rows)


def other_rules(example: JobConfig) -> str:
    """Rules of torchtitan's own fields."""
    own = {f"{name}.{field}" for name, cls in SECTIONS.items() for field in own_fields(cls)}
    names = dict.fromkeys(rule.field for rule in RULES if rule.field not in own)
    rows = [[f"`{name}`", ". ".join(rule_texts(name, example))] for name in names]
    return table(["field", "must be"], rows)


def flavor_table() -> str:
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_theta"]
    rows = []
    for flavor, args in FLAVORS.items():
        sizes = sizes_of(args)
        rows.append([f"`{flavor}`", *(str(sizes[name]) for name in names)])
    return table(["`model.flavor`", *(f"`{name}`" for name in names)], rows)


def page() -> str:
    example = load_config(["--job.config_file", str(ROOT / "train_configs" / EXAMPLE)])
    parts = [INTRO.format(example=EXAMPLE, world_size=WORLD_SIZE)]
    for name, section in SECTIONS.items():
        parts.append(f"## `[{name}]`\n\n{section_table(name, section, example)}\n")
    parts.append(f"## Sizes of the flavors\n\n{flavor_table()}\n")
    parts.append(f"## Changed defaults\n\n{changed_defaults()}\n")
    parts.append(f"## Rules of torchtitan's fields\n\n{other_rules(example)}\n")
    fields = "\n".join(f"- `{name}`" for name in FIELDS)
    text = "## Fields compared on resume\n\n`checkpoint.accept_changes` may name these fields."
    parts.append(f"{text}\n[Checkpoints](checkpoints.md) explains it.\n\n{fields}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(
            f"error: {PAGE} must be what the code says, got an older text; scripts/make_docs.py"
        )


if __name__ == "__main__":
    main()
