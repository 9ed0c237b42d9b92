"""Registration of the library's operations with PyTorch.

An operation has a plain PyTorch reference and a Triton kernel for CUDA. It is registered as
`lighthouse::name`. torch.compile treats it as opaque, and activation checkpointing can select it
by name.
"""

import functools
import importlib
from collections.abc import Callable

import torch

OPS_TO_SAVE: list[torch._ops.OpOverload] = []
"""Operations whose outputs activation checkpointing must save: the selection and the expensive
scores. See `lighthouse.LighthouseAttention`."""


def register(
    name: str,
    reference: Callable,
    fake: Callable,
    kernels: str | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    save: bool = False,
) -> torch.library.CustomOpDef:
    """Register `reference` as the operation `lighthouse::name`.

    Args:
        reference: the operation in PyTorch, with type annotations. It runs on the CPU, and on any
            device in fp64.
        fake: returns empty outputs with the shapes, dtypes and strides of the real ones.
        kernels: module of `lighthouse.kernels` whose function `name` runs on CUDA. It is imported
            on first use, so that a machine without a GPU does not need triton. With None, the
            reference also runs on CUDA.
        backward, setup_context: as for `torch.library.register_autograd`. Without them,
            differentiating the operation raises NotImplementedError.
        save: whether activation checkpointing must save the outputs (`OPS_TO_SAVE`). Recomputing
            the operation in a backward pass then raises RuntimeError.
    """
    if save:
        reference = _once_a_step(reference)
    op = torch.library.custom_op(f"lighthouse::{name}", reference, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward or _refuse_derivative, setup_context=setup_context)
    if kernels is not None:

        def run_on_cuda(*args):
            if args[0].dtype == torch.float64:
                return reference(*args)
            module = importlib.import_module(f"lighthouse.kernels.{kernels}")
            kernel = getattr(module, name)
            return (_once_a_step(kernel) if save else kernel)(*args)

        op.register_kernel("cuda", run_on_cuda)
    if save:
        OPS_TO_SAVE.append(getattr(torch.ops.lighthouse, name).default)
    return op


def _once_a_step(function: Callable) -> Callable:
    """Wrap `function` so that recomputation by activation checkpointing raises RuntimeError."""

    @functools.wraps(function)
    def run(*args):
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "activation checkpointing must keep the selections, which may come out differently "
                "a second time, got a recomputation in the backward pass; checkpoint with "
                "use_reentrant=False and a context_fn that saves lighthouse.OPS_TO_SAVE (for "
                "transformers: lighthouse.huggingface.gradient_checkpointing_kwargs())"
            )
        return function(*args)

    return run


def _refuse_derivative(ctx, *grads):
    raise NotImplementedError(
        "Lighthouse Attention has first derivatives only; differentiate once, without "
        "create_graph, or use dense attention where second derivatives are needed"
    )
