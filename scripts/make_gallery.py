#!/usr/bin/env python3
"""Write docs/gallery.md and its figures from a run of debug.toml that this script trains.

    scripts/make_gallery.py outputs/passkey/checkpoint/step-1500 outputs/recall/checkpoint/step-240

The arguments are checkpoints of passkey_cpu.toml and recall_cpu.toml. The rest takes about three
minutes on two cores.
"""

import argparse
import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torchtitan.experiments.lighthouse.metrics import LOSS, read_metrics

ROOT = Path(__file__).parents[1]
RUN = "outputs/gallery"
FIGURES = ROOT / "docs" / "gallery"
TRAIN = (
    "lighthouse train train_configs/debug.toml --lighthouse.telemetry_freq 20 "
    f"--job.dump_folder {RUN} --metrics.disable_color_printing"
)
CHECKPOINT = f"{RUN}/checkpoint/step-60"

TELEMETRY = "telemetry/layer_2/"

PAGE = """\
# What a run leaves

The outputs of a small run and of the commands that look at it. `scripts/make_gallery.py` wrote this
page on {date}, with torch {torch} on a CPU. The model has 1.1M parameters and trains for
60 steps, so its losses mean nothing.

## Console

```bash
{train}
```

The log has one line for a logged step. Around the stage switch after step 40:

```
{console}
```

## Metrics

`metrics.jsonl` has a line for every logged step. TensorBoard and W&B use the same names. The line
of step 45:

```json
{metrics}
```

`lighthouse.telemetry_freq = 20` measures every 20 steps of stage 1 what three layers select. One of
them at step 20:

```json
{telemetry}
```

## Stage switch

`handover.json` shows that the switch changed neither parameters nor optimizer state:

```json
{handover}
```

## Report

```bash
{report}
```

{report_text}

![Loss over steps, tokens and time](gallery/loss.png)

## Held-out loss by position

```bash
{eval_loss}
```

```
{eval_loss_text}
```

![Held-out loss by position](gallery/eval_loss.png)

## Pass key retrieval

```bash
lighthouse eval-passkey outputs/passkey/checkpoint/{passkey_step} {lengths}
```

A model of `passkey_cpu.toml`, 250 dense steps after the switch. Its mean share of right answers is
{passkey}. Chance is 0.1.

![Share of right answers by length and depth](gallery/passkey.png)

## Recall by distance

```bash
lighthouse eval-recall outputs/recall/checkpoint/{recall_step} --documents 8
```

A model of `recall_cpu.toml`. Its mean share of right answers is {recall}. Chance is 0.1.

![Share of right answers by distance](gallery/recall.png)

## Plan

```bash
{plan}
```

```
{plan_text}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("passkey", type=Path, help="checkpoint of passkey_cpu.toml")
    parser.add_argument("recall", type=Path, help="checkpoint of recall_cpu.toml")
    options = parser.parse_args()
    FIGURES.mkdir(exist_ok=True)
    log = output_of(TRAIN)
    report = f"lighthouse report {RUN} --output {RUN}/report"
    output_of(report)
    eval_loss = f"lighthouse eval-loss {CHECKPOINT} --windows 8 --lighthouse"
    losses = output_of(eval_loss).split(f"\n  {ROOT}")[0]
    plan = "lighthouse plan train_configs/c4_530m_98k.toml --world-size 32 --gpu B200"
    shutil.copy(ROOT / RUN / "report/loss.png", FIGURES)
    shutil.copy(ROOT / RUN / "eval_loss/step-60/eval_loss.png", FIGURES)
    lengths = "--lengths 128 256 512 1024"
    output_of(f"lighthouse eval-passkey {options.passkey} {lengths} --output {RUN}/passkey")
    shutil.copy(ROOT / RUN / "passkey/passkey.png", FIGURES)
    passkey = json.loads((ROOT / RUN / "passkey/passkey.json").read_text())
    output_of(f"lighthouse eval-recall {options.recall} --documents 8 --output {RUN}/recall")
    shutil.copy(ROOT / RUN / "recall/recall.png", FIGURES)
    recall = json.loads((ROOT / RUN / "recall/recall.json").read_text())
    text = PAGE.format(
        date=datetime.date.today(),
        torch=torch.__version__,
        train=TRAIN,
        console=around_the_switch(log),
        metrics=shown(metrics_of(45, LOSS)),
        telemetry=shown(metrics_of(20, TELEMETRY + "attention_on_level_0", TELEMETRY)),
        handover=shown(json.loads((ROOT / RUN / "handover.json").read_text())),
        report=report,
        report_text=report_table(),
        eval_loss=eval_loss,
        eval_loss_text=losses.strip(),
        lengths=lengths,
        passkey_step=options.passkey.name,
        passkey=f"{passkey['mean']:.2f}",
        recall_step=options.recall.name,
        recall=f"{recall['mean']:.2f}",
        plan=plan,
        plan_text=output_of(plan).strip(),
    )
    (ROOT / "docs" / "gallery.md").write_text(text)


def output_of(command: str) -> str:
    """Run a command of `lighthouse` in the checkout and return what it prints."""
    words = [Path(sys.executable).parent / "lighthouse", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def report_table() -> str:
    lines = (ROOT / RUN / "report/report.md").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def around_the_switch(log: str) -> str:
    """Lines of the steps from 35 to 50, without the time in front."""
    lines = [line.partition(" INFO - ")[2] for line in log.splitlines()]
    first, last = (
        next(i for i, line in enumerate(lines) if line.startswith(f"step {step}/"))
        for step in (35, 50)
    )
    kept = (line for line in lines[first : last + 1] if re.match("step|Stage", line))
    return "\n".join(kept)


def metrics_of(step: int, name: str, start: str = "") -> dict:
    """The line of a step that has the metric `name`, or its metrics whose names start so."""
    line = next(line for line in read_metrics(ROOT / RUN, name) if line["step"] == step)
    return {key: value for key, value in line.items() if key.startswith(start)}


def shown(value: dict) -> str:
    """JSON with numbers of four digits."""
    return re.sub(r"\d+\.\d+(e-?\d+)?", lambda n: f"{float(n[0]):.4g}", json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
