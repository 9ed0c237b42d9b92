"""Statistics of the selections of a model in stage 1, measured in a separate forward pass.

The pass takes one sequence, without gradients and without compiled code, which keeps existing
compilations unchanged. Under FSDP all ranks take part. Training is bitwise the same with and
without the measurement. The statistics are those of a rank's own sequence and heads.
"""

import torch
from torch import nn
from torchtitan.experiments.lighthouse.validate import reshard

from lighthouse import LighthouseAttention
from lighthouse.selection_stats import measure

NUM_LAYERS = 3
"""Number of measured layers: the first, the last and one in between, of those with Lighthouse."""


@torch.no_grad()
def measure_layers(model: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """Statistics of the sampled layers, with names such as `telemetry/layer_1/coverage/level_0`.

    Args:
        model: a Transformer in stage 1.
        inputs: token ids, [B, N]; the first sequence is used.
    """
    figures, handles = {}, []
    for name, attention in sampled_layers(model).items():

        def look(module, args, name=name):
            for key, value in measure(*args, module.config).items():
                figures[f"telemetry/layer_{name}/{key}"] = value

        handles.append(attention.register_forward_pre_hook(look))
    try:
        with torch.compiler.set_stance("force_eager"):
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    reshard(model)
    return figures


def sampled_layers(model: nn.Module) -> dict[str, LighthouseAttention]:
    """`NUM_LAYERS` of the layers with Lighthouse by name, or all if there are fewer."""
    attentions = {name: block.attention.inner_attention for name, block in model.layers.items()}
    names = [name for name, x in attentions.items() if isinstance(x, LighthouseAttention)]
    num_sampled = min(NUM_LAYERS, len(names))
    places = torch.linspace(0, len(names) - 1, num_sampled).round().long().tolist()
    return {names[place]: attentions[names[place]] for place in places}
