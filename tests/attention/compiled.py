"""Compare a layer compiled in one graph with the same layer in eager mode."""

from collections.abc import Callable

import torch

from lighthouse.sdpa import causal_sdpa


class GroupedSdpa(torch.nn.Module):
    """Causal attention as a module."""

    def forward(self, q, k, v, *, enable_gqa):
        return causal_sdpa(q, k, v, enable_gqa=enable_gqa)


def assert_compiles_in_one_graph(
    module: torch.nn.Module, dynamic: bool, *inputs_of: Callable[[], list[torch.Tensor]]
) -> None:
    """Check that outputs and gradients are close to the eager ones, for each input in turn."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for make in inputs_of:
        results = []
        for run in (module, compiled):
            q, k, v = make()
            out = run(q, k, v)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)
