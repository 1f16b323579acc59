# SPDX-License-Identifier: Apache-2.0
"""Registration of kernels as torch operators, and the one place that allocates their outputs.

Kernels are entered with ``Library.define`` + ``impl`` + a fake kernel (measured cheaper per call than
``torch.library.custom_op``); autograd stays outside, in a ``torch.autograd.Function`` per op, so that
torch.compile(fullgraph=True) and torch.export see one opaque operator each way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ctxfast", "DEF")
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order") if hasattr(torch.Tag, name)
)

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def allocate(size: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor. Launchers and fake kernels both allocate here, so they cannot drift."""
    return torch.empty(tuple(size), dtype=like.dtype if dtype is None else dtype, device=like.device)


@contextmanager
def launching(tensor: Tensor) -> Iterator[int]:
    """The tensor's device made current; the handle of its stream."""
    if not tensor.is_cuda:  # tests run the kernels on the CPU
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def is_watched() -> bool:
    """Whether something must see the registered operators of a call: a compiler, a tracer, a dispatch mode, a
    transform or a profiler. Where nothing does, and no input is a tensor subclass, a kernel may be called directly."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def is_direct(*inputs: Tensor | None) -> bool:
    """Whether a kernel may be called on these CPU tensors without going through its operator: see ``is_watched``."""
    return not is_watched() and all([type(each) in _PLAIN for each in inputs])


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], device: str) -> Any:
    """Register ``ctxfast::<name><schema>`` for one dispatch key ("CPU" or "CUDA") and return the callable operator.

    The operator is not differentiable and says so: called with an input that requires a gradient while autograd
    records, it refuses instead of returning a result that silently breaks the chain.
    """

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            if any(isinstance(item, Tensor) and item.requires_grad for item in flat):
                raise RuntimeError(
                    f"ctxfast::{name} is the raw kernel and has no gradient of its own. Call the function in "
                    f"ctxfast.functional, or wrap the call in torch.no_grad()."
                )
        return kernel(*args)

    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"ctxfast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ctxfast, name).default
