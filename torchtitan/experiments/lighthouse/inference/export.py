"""Export a checkpoint to a folder that transformers loads as a Llama, and check the export.

    lighthouse export outputs/debug/checkpoint/step-40 --output exported
    lighthouse export outputs/debug/checkpoint/step-40 --output exported --dtype bfloat16

The checkpoint may be of either stage. The exported model is dense. The check loads the folder with
transformers and compares its logits on real text with ours. The exit code is 1 if the difference is
larger than rounding explains.
"""

import importlib.util
import sys
from pathlib import Path

from torchtitan.experiments.lighthouse.inference.hf_export import TOLERANCE, check_export, export
from torchtitan.experiments.lighthouse.inference.load_model import add_arguments, open_trained
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_output_folder,
    exit_on_value_error,
)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="the folder .../checkpoint/step-N")
    add("--output", type=Path, required=True, help="a new folder")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the weights")
    add("--no-verify", action="store_true", help="do not compare with transformers")
    add_arguments(parser)
    options = parser.parse_args()
    out = options.output
    with exit_on_value_error():
        check_output_folder("--output", out)
        trained = open_trained(
            options.checkpoint, options.flavor, options.max_seq_len, options.tokenizer
        )
        export(trained, out, options.dtype)
    # A folder in Hugging Face's format has no flavor.
    name = trained.flavor or "Llama"
    print(f"{name}, {trained.args.max_seq_len:,} tokens, {options.dtype}, in {out}:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:<34} {path.stat().st_size:>15,} bytes")
    if options.no_verify:
        print("Not compared with transformers.")
    elif importlib.util.find_spec("transformers") is None:
        print(
            "Not compared with transformers: not installed; pip install 'lighthouse-attention[hf]'"
        )
    else:
        verify(trained, out)


def verify(trained, out: Path) -> None:
    """Print how both models differ. Exit with code 1 if they do."""
    from transformers.utils import logging

    # transformers warns falsely about a model trained on fewer tokens than its RoPE scaling covers.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = check_export(trained, out)
    print(
        f"Largest difference of logits over {result.num_tokens:,} tokens, in fp32: "
        f"{result.logit_difference:.1e} (limit {TOLERANCE:.0e}, largest logit "
        f"{result.logit_magnitude:.1f}); tokenizers {'agree' if result.same_tokens else 'differ'}."
    )
    if not result.is_equal:
        print(f"error: {out} is not the model of the checkpoint; do not use it", file=sys.stderr)
        raise SystemExit(1)
    print("transformers computes the same.")
