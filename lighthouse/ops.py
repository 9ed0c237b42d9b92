"""Registration of the library's operations with PyTorch.

An operation is a plain PyTorch function, its reference, and a Triton kernel for CUDA. Registered
under `lighthouse::name` it is opaque to torch.compile and can be named by activation checkpointing.
"""

import functools
import importlib
from collections.abc import Callable

import torch

OPS_TO_SAVE: list[torch._ops.OpOverload] = []
"""Operations whose outputs activation checkpointing must keep: the selection, and the scores that
are expensive to compute. See `lighthouse.LighthouseAttention`."""


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
        reference: the operation in PyTorch, annotated with types. It runs on the CPU, and on any
            device in fp64.
        fake: returns empty outputs with the shapes, dtypes and strides of the real ones.
        kernels: module of `lighthouse.kernels` whose function `name` runs on CUDA. It is imported
            on first use, so that a machine without a GPU need not have triton. None: the
            reference runs there, too.
        backward, setup_context: as `torch.library.register_autograd` takes them. Without them the
            operation refuses to be differentiated.
        save: whether activation checkpointing must keep the outputs (`OPS_TO_SAVE`). Running the
            operation again in a backward pass then raises RuntimeError.
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
    """`function`, with an error in place of its recomputation by activation checkpointing."""

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
