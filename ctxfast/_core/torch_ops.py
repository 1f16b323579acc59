# SPDX-License-Identifier: Apache-2.0
"""Registration of kernels as torch operators, and the one place that allocates their outputs.

Kernels are entered with ``Library.define`` + ``impl`` + a fake kernel (measured cheaper per call than
``torch.library.custom_op``); autograd stays outside, in a ``torch.autograd.Function`` per op, so that
torch.compile(fullgraph=True) and torch.export see one opaque operator each way.

What no kernel can answer, its op's definition does, in plain PyTorch: calls under a torch.func transform, forward-mode
differentiation or torch.jit.trace, calls that torch.export records with gradients, and calls on tensors that keep no
values at an address (``why_definition``); gradients that are to be differentiated again (``needs_definition``,
``definition_gradients``).
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from . import capability

_LIBRARY = torch.library.Library("ctxfast", "DEF")
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order") if hasattr(torch.Tag, name)
)

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_DISPATCH = vars(Tensor)["__torch_dispatch__"]


def allocate(size: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor."""
    return torch.empty(tuple(size), dtype=like.dtype if dtype is None else dtype, device=like.device)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off for a device type, also for one that has none (meta)."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def without_tracer_warnings() -> Iterator[None]:
    """For checks of arguments: torch.jit.trace would warn of every comparison of sizes, which are not part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


@contextmanager
def launching(tensor: Tensor) -> Iterator[int]:
    """The tensor's device made current; the handle of its stream."""
    if not tensor.is_cuda:  # tests run the kernels on the CPU
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def must_dispatch() -> bool:
    """Whether something must see the registered operators of a call: a compiler, a tracer, a dispatch mode, a
    transform or a profiler. Where nothing does, and no input is a tensor subclass, a kernel may be called directly."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or is_transformed()
        or torch.autograd._profiler_enabled()
    )


def is_direct(*inputs: Tensor | None) -> bool:
    """Whether a kernel may be called on these CPU tensors without going through its operator: see ``must_dispatch``."""
    if must_dispatch() or not all([type(each) in _PLAIN for each in inputs]):
        return False
    # A view of an imaginary part may hold its values with the other sign; the operator's dispatch puts that right.
    return not any([type(each) is Tensor and each.is_neg() for each in inputs])


def is_transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace runs. (Documented under this name, but not in a list of public ones.)"""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def is_traced() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records what is called, for a reader that knows torch alone."""
    return is_jit_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def is_exporting() -> bool:
    """Whether torch.export records what is called. torch before 2.7 does not tell."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def exports_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether torch.export records a call on these tensors that a gradient goes through: it keeps the operators of the
    forward alone, not the ``torch.autograd.Function`` around them, so that only torch's own operations have a gradient
    in the exported program."""
    return is_exporting() and torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


@capability.constant  # torch.export would refuse to trace the warning
def warn_of_export() -> bool:
    """Say that an exported program has no kernels, and how it would."""
    warnings.warn(
        "ctxfast: torch.export was called with gradients enabled and records PyTorch's own operations, which can be "
        "differentiated. Call it under torch.no_grad() to record ctxfast's kernels, for inference.",
        stacklevel=2,
    )
    return True


def is_foreign(tensor: Tensor) -> bool:
    """Whether only operations of torch know a tensor's values: a subclass with its own dispatch, or no strided one."""
    kind: Any = type(tensor)
    if kind in _PLAIN:
        return tensor.layout is not torch.strided
    # Compilers' own, which take the operators as they are: there are fake kernels for them.
    if issubclass(kind, (torch._subclasses.FakeTensor, FunctionalTensor)):
        return False
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    usual = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return function not in usual or kind.__torch_dispatch__ is not _DISPATCH


def why_definition(tensors: Iterable[Tensor]) -> str | None:
    """None, or why only its definition, made of torch's own operations, can run a call on these tensors."""
    if is_transformed():
        return "a torch.func transform or forward-mode differentiation is active: the definition is differentiated."
    if is_traced():
        return "torch.jit.trace or torch.onnx.export is to record torch's own operations: the definition's."
    tensors = list(tensors)
    if exports_gradient(tensors):
        return "torch.export records no gradient of a kernel. Export under torch.no_grad() for inference."
    for tensor in tensors:
        if is_foreign(tensor):
            what = type(tensor).__name__ if type(tensor) not in _PLAIN else f"tensor of layout {tensor.layout}"
            return f"a {what} is among its tensors, whose values only torch's own operations can read."
    return None


def needs_definition(*grads: Tensor) -> bool:
    """Whether a backward that is given ``grads`` must answer with ``definition_gradients``: something will
    differentiate its answer (``create_graph``), or a transform looks into it."""
    if torch.compiler.is_compiling():  # a graph of its own, which nothing looks into
        return False
    if torch.is_grad_enabled() or is_transformed():
        return True
    # is_grads_batched, by which torch.autograd.functional vectorises, has a vmap of its own.
    return any([is_legacy_batchedtensor(grad) for grad in grads])


def definition_gradients(
    definition: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``definition(*inputs)`` for the ``wanted`` inputs, None for the others.

    ``grads`` are those of its outputs. Where gradients are recorded, they can be differentiated as often as the
    definition's operations can.
    """
    is_recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input that another one was made from takes no more than its own share.
        leaves = [
            each if each is None or not wants else each.view_as(each) if is_recorded else each.detach().requires_grad_()
            for each, wants in zip(inputs, wanted)
        ]
        # The inputs have the dtypes that autocast gave them in the forward.
        with without_autocast(grads[0].device.type):
            outputs = definition(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    reached = [(output, grad.to(output.dtype)) for output, grad in zip(outputs, grads) if output.requires_grad]
    sources = [leaf for leaf, wants in zip(leaves, wanted) if wants and leaf is not None]
    if not reached or not sources:
        return [None] * len(leaves)
    outputs, grads = zip(*reached)
    found = iter(torch.autograd.grad(outputs, sources, grads, create_graph=is_recorded, allow_unused=True))
    return [next(found) if wants else None for wants in wanted]


# Annotations of kernels -> types of an operator's schema.
_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", Sequence[Tensor]: "Tensor[]", Sequence[Tensor | None]: "Tensor?[]",
    list[Tensor]: "Tensor[]", int: "SymInt", float: "float", bool: "bool", str: "str",
    torch.dtype | None: "ScalarType?", int | None: "SymInt?",
}  # fmt: skip


def _schema(signature: inspect.Signature, changed: str | None) -> str:
    """Of a kernel that changes ``changed`` alone of its arguments. (torch.library.infer_schema reads other annotations
    in each version of torch: those that are strings are looked up elsewhere, list[Tensor] is known or not.)"""
    kinds = {name: _KINDS[parameter.annotation] for name, parameter in signature.parameters.items()}
    if changed is not None:
        kinds[changed] += "(a!)"
    given = [f"{kind} {name}" for name, kind in kinds.items()]
    made = signature.return_annotation
    kinds = [_KINDS[each] for each in (typing.get_args(made) if typing.get_origin(made) is tuple else [made])]
    return f"({', '.join(given)}) -> {kinds[0] if len(kinds) == 1 else '(' + ', '.join(kinds) + ')'}"


def define(
    name: str, kernel: Callable[..., Any], outputs: Callable[..., Any], device: str, *, changed: str | None = None
) -> Any:
    """Register ``ctxfast::<name>`` for one dispatch key ("CPU" or "CUDA") and return the callable operator.

    ``outputs`` takes those of the kernel's parameters that it names and returns, uninitialised, what the kernel
    returns: the kernel allocates by it, and compilers take the outputs' shapes from it (a fake kernel, in torch's
    words). The schema is that of the kernel's annotations. ``changed`` names the tensor among the arguments that the
    kernel writes to; the others it leaves alone.

    The operator is not differentiable and says so: called with an input that requires a gradient while autograd
    records, it refuses instead of returning a result that silently breaks the chain.
    """
    signature = inspect.signature(kernel, eval_str=True)
    at = [list(signature.parameters).index(each) for each in inspect.signature(outputs).parameters]

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            if any(isinstance(item, Tensor) and item.requires_grad for item in flat):
                raise RuntimeError(
                    f"ctxfast::{name} is the raw kernel and has no gradient of its own. Call the function in "
                    f"ctxfast.functional, or wrap the call in torch.no_grad(). A program that was exported under "
                    f"torch.no_grad() is called under it, too; exported with gradients enabled it has gradients."
                )
        return kernel(*args)

    _LIBRARY.define(name + _schema(signature, changed), tags=_TAGS)
    _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"ctxfast::{name}", lambda *args: outputs(*[args[i] for i in at]), lib=_LIBRARY)
    return getattr(torch.ops.ctxfast, name).default
