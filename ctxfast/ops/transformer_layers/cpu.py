# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers`` on the CPU: all layers in one compiled call (csrc/transformer_layers/transformer_layers.h).

Results have the bits that the parts' own CPU implementations give one after another; what is spared are their calls,
which take longer than the arithmetic of a short text, and waits between threads. A call with a gradient keeps each
layer's input alone: its backward runs the definition and differentiates that, as torch.compile does from the start.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..shared import packed_weights
from . import PARTS, TENSORS

_OP = "transformer_layers"
# Among a layer's tensors: the weights of its products, and of its first feed-forward product.
_PRODUCTS = tuple(2 * PARTS.index(part) for part in ("qkv", "project", "widen", "narrow"))
_WIDEN = 2 * PARTS.index("widen")


def _packed(weights: Sequence[Tensor | None], is_int8: bool) -> tuple[array, list[Any]]:
    """A row of 20 addresses for each layer, as the kernel reads them, and what lies there."""
    table, held = array("q"), []

    def address(tensor: Tensor | None) -> int:
        held.append(tensor)
        return torch_ops.address(tensor)

    for i in range(0, len(weights), 2):
        weight, bias = weights[i], _vector(weights[i + 1])
        if i % TENSORS not in _PRODUCTS:  # a LayerNorm
            parts = (_vector(weight), bias)
        elif is_int8:
            parts = (*packed_weights.int8(weight), bias)
        else:
            parts = (packed_weights.panels(weight), None, None, bias)
        table.extend(map(address, parts))
    return table, held


def _is_read(tensor: Tensor) -> bool:
    """Whether the kernel reads a tensor where it is: biases and LayerNorms, unless they are strided, or stand in larger
    memory: what is kept for the kernel would keep all of that."""
    own = tensor.numel() * tensor.element_size()
    return tensor.dim() == 1 and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == own


def _vector(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or _is_read(tensor):
        return None if tensor is None else tensor.detach()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _outputs(x: Tensor, weights: Sequence[Tensor | None], all_layers: bool) -> list[Tensor]:
    return [torch_ops.allocate(x.shape, x) for _ in range(len(weights) // TENSORS if all_layers else 1)]


def _forward(
    x: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor | None], num_heads: int, activation: str, eps: float,
    is_int8: bool, all_layers: bool, relative_bias: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    outputs = _outputs(x, weights, all_layers)
    x, cu_seqlens = x.contiguous(), cu_seqlens.contiguous()
    # Biases that are missing need no place in the key: what is there stands between matrices, LayerNorms have both.
    sources, addresses = (
        [tensor for tensor in weights if tensor is not None],
        array("q", [y.data_ptr() for y in outputs]),
    )
    # _held: what the table points to stays while the kernel reads it.
    table, _held = packed_weights.CACHE.get(
        sources, (_OP, is_int8, x.dtype), lambda: _packed(weights, is_int8), _is_read
    )
    io_dtype, places = capability.DTYPE_NAMES[x.dtype], {}
    if relative_bias is not None:
        relative_bias = relative_bias.contiguous()
        places = dict(relative_bias=relative_bias.data_ptr(), reach=(relative_bias.shape[1] + 1) // 2)
    capability.extension().transformer_layers_forward(
        x.shape[0], x.shape[1], num_heads, weights[_WIDEN].shape[0], cu_seqlens.shape[0] - 1,
        io_dtype, "int8" if is_int8 else io_dtype, activation, eps, x.data_ptr(), cu_seqlens.data_ptr(),
        cu_seqlens.dtype is torch.int64, table.buffer_info()[0], len(weights) // TENSORS, all_layers,
        addresses.buffer_info()[0], torch.get_num_threads(), **places,
    )  # fmt: skip
    return outputs


_fwd = torch_ops.define("transformer_layers_cpu_fwd", _forward, _outputs, "CPU")


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cu_seqlens: Tensor, options: tuple[Any, ...], relative_bias: Tensor | None,
        *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, cu_seqlens, relative_bias, *weights)
        ctx.options = options
        return _fwd(x, cu_seqlens, weights, *options[1:], False, False, relative_bias)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cu_seqlens, relative_bias, *weights = ctx.saved_tensors
        max_seqlen, *options = ctx.options
        grads = torch_ops.definition_gradients(
            lambda x, relative_bias, *weights: registry.OPS[_OP].reference(
                x, cu_seqlens, max_seqlen, weights, *options, None, False, relative_bias=relative_bias
            ),
            (x, relative_bias, *weights), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]), (grad,),
        )  # fmt: skip
        return grads[0], None, None, *grads[1:]


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled layers cannot run this call."""
    x, wide = args["x"], args["weights"][_WIDEN].shape[0]
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}."
    if any(args["dropout_p"]):
        return "it has no dropout."
    if args["compute_dtype"] is not None:
        return "it computes in one dtype."
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and x is {x.dtype}."
    if x.shape[1] > 8192 or x.shape[1] // args["num_heads"] > 1024 or not 0 < wide <= 65536:
        return "it takes at most 8192 columns, heads of 1024 and 1 to 65536 columns between the last two products."
    if args["weight_dtype"] is not None and registry.needs_grad(*args.values()):
        return "its int8 products have no gradient."
    if capability.extension() is None:
        return capability.why_no_extension()
    # float32 has no limit, and torch.export none to compare a number of rows with that only the mask tells.
    if args["weight_dtype"] is None and x.dtype is not torch.float32 and x.shape[0] > packed_weights.most_rows(x.dtype):
        return f"on this processor, products of {x.shape[0]} rows in {x.dtype} are faster by oneDNN, one by one."
    return None


def transformer_layers(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor | None],
    num_heads: int,
    activation: str,
    eps: float,
    weight_dtype: torch.dtype | None,
    all_layers: bool,
    dropout_p: tuple[float, float, float],
    compute_dtype: torch.dtype | None,
    relative_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See ``ctxfast.functional.transformer_layers``."""
    options = (num_heads, activation, eps)
    if not registry.needs_grad(x, weights, relative_bias):
        forward = _forward if torch_ops.is_direct(x, cu_seqlens, relative_bias, *weights) else _fwd
        states = forward(x, cu_seqlens, weights, *options, weight_dtype is torch.int8, all_layers, relative_bias)
        return tuple(states) if all_layers else states[0]
    if torch.compiler.is_compiling():  # differentiates what it sees, so it sees the definition
        return registry.OPS[_OP].reference(
            x, cu_seqlens, max_seqlen, weights, *options, weight_dtype, all_layers, relative_bias=relative_bias
        )
    states = []
    for i in range(0, len(weights), TENSORS):
        x = _Layer.apply(x, cu_seqlens, (max_seqlen, *options), relative_bias, *weights[i : i + TENSORS])
        states.append(x)
    return tuple(states) if all_layers else x


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    names = ("x", "cu_seqlens", "weights", "num_heads", "activation", "eps")
    more = (args["weight_dtype"] is torch.int8, args["all_layers"], args["relative_bias"])
    return [(_fwd, (*(args[name] for name in names), *more))]
