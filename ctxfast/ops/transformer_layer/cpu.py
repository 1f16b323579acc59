# SPDX-License-Identifier: Apache-2.0
"""``transformer_layer`` on the CPU: the whole layer in one compiled call (csrc/include/ctxfast/transformer_layer.h).

Results have the bits that the parts' own CPU implementations give one after another; what is spared are their calls,
which take longer than the arithmetic of a short text, and waits between threads. A call with a gradient keeps its
inputs alone: its backward runs the definition and differentiates that, as torch.compile does from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, packed_weights, registry, torch_ops

_OP = "transformer_layer"
_NORMS, _PRODUCTS = ("attention_norm", "output_norm"), ("qkv", "project", "widen", "narrow")


def _forward(
    x: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Tensor],
    num_heads: int, activation: str, eps: float, is_int8: bool,
) -> Tensor:  # fmt: skip
    y = torch_ops.allocate(x.shape, x)
    x, cu_seqlens = x.contiguous(), cu_seqlens.contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    norms = [norm.contiguous() for norm in norms]
    # Held by this list while the kernel reads them.
    packed = [packed_weights.int8(w) if is_int8 else (packed_weights.panels(w), None, None) for w in weights]
    products = [
        (*(0 if part is None else part.data_ptr() for part in parts), 0 if bias is None else bias.data_ptr())
        for parts, bias in zip(packed, biases)
    ]
    addresses = [norm.data_ptr() for norm in norms]
    capability.extension().transformer_layer_forward(
        x.shape[0], x.shape[1], num_heads, weights[2].shape[0], cu_seqlens.shape[0] - 1, x.dtype is torch.bfloat16,
        is_int8, activation, eps, x.data_ptr(), cu_seqlens.data_ptr(), cu_seqlens.dtype is torch.int64, products,
        [tuple(addresses[:2]), tuple(addresses[2:])], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _forward_fake(
    x: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Tensor],
    num_heads: int, activation: str, eps: float, is_int8: bool,
) -> Tensor:  # fmt: skip
    return torch_ops.allocate(x.shape, x)


_fwd = torch_ops.define(
    "transformer_layer_cpu_fwd",
    "(Tensor x, Tensor cu_seqlens, Tensor[] weights, Tensor?[] biases, Tensor[] norms, int num_heads, str activation, "
    "float eps, bool is_int8) -> Tensor",
    _forward, _forward_fake, "CPU",
)  # fmt: skip


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, options: tuple[Any, ...], *flat: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, cu_seqlens, *flat)
        ctx.options = options
        _, num_heads, activation, eps = options
        return _fwd(x, cu_seqlens, flat[:4], flat[4:8], flat[8:], num_heads, activation, eps, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cu_seqlens, *flat = ctx.saved_tensors
        max_seqlen, num_heads, activation, eps = ctx.options
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(wants)
            for tensor, wants in zip((x, *flat), wanted)
        ]
        with torch.enable_grad():
            own, weights, biases, norms = leaves[0], leaves[1:5], leaves[5:9], leaves[9:]
            pairs = dict(zip(_PRODUCTS, zip(weights, biases)))
            y = registry.OPS[_OP].reference(
                own, cu_seqlens, max_seqlen, **pairs, attention_norm=tuple(norms[:2]), output_norm=tuple(norms[2:]),
                num_heads=num_heads, activation=activation, eps=eps, weight_dtype=None,
            )  # fmt: skip
        sources = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, sources, grad))
        grads = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        return grads[0], None, None, *grads[1:]


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled layer cannot run this call."""
    x, wide = args["x"], args["widen"][0].shape[0]
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}."
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and x is {x.dtype}."
    if x.shape[1] > 8192 or x.shape[1] // args["num_heads"] > 1024 or not 0 < wide <= 65536:
        return "it takes at most 8192 columns, heads of 1024 and 1 to 65536 columns between the last two products."
    if args["weight_dtype"] is not None and registry.needs_grad(args):
        return "its int8 products have no gradient."
    if capability.extension() is None:
        return capability.why_no_extension()
    if args["weight_dtype"] is None and x.shape[0] > packed_weights.most_rows(x.dtype):
        return f"on this processor, products of {x.shape[0]} rows in {x.dtype} are faster by oneDNN, one by one."
    return None


def transformer_layer(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    qkv: tuple[Tensor, Tensor | None],
    project: tuple[Tensor, Tensor | None],
    attention_norm: tuple[Tensor, Tensor],
    widen: tuple[Tensor, Tensor | None],
    narrow: tuple[Tensor, Tensor | None],
    output_norm: tuple[Tensor, Tensor],
    num_heads: int,
    activation: str,
    eps: float,
    weight_dtype: torch.dtype | None,
) -> Tensor:
    """See ``ctxfast.functional.transformer_layer``."""
    pairs = (qkv, project, widen, narrow)
    weights, biases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    norms = [*attention_norm, *output_norm]
    tensors = (x, cu_seqlens, *weights, *biases, *norms)
    if registry.needs_grad(dict(tensors=tensors)):
        if torch.compiler.is_compiling():  # differentiates what it sees, so it sees the definition
            return registry.OPS[_OP].reference(
                x, cu_seqlens, max_seqlen, qkv, project, attention_norm, widen, narrow, output_norm,
                num_heads, activation, eps, weight_dtype,
            )  # fmt: skip
        return _Layer.apply(x, cu_seqlens, (max_seqlen, num_heads, activation, eps), *weights, *biases, *norms)
    forward = _forward if torch_ops.is_direct(*tensors) else _fwd
    return forward(x, cu_seqlens, weights, biases, norms, num_heads, activation, eps, weight_dtype is torch.int8)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    pairs = [args[name] for name in _PRODUCTS]
    norms = [tensor for name in _NORMS for tensor in args[name]]
    weights, biases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    options = (args["num_heads"], args["activation"], args["eps"], args["weight_dtype"] is torch.int8)
    return [(_fwd, (args["x"], args["cu_seqlens"], weights, biases, norms, *options))]
