# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers`` on a GPU: a layer is one step of autograd, made of its parts' kernels and cuBLAS's products.

Called one by one, a layer's parts take the host longer than a GPU takes for their arithmetic: checks, choices, dispatch
and autograd's records come once a layer here, and the copy of the weights in the products' dtype once a call. Kept for
the backward are the results of the products, of attention and of the first LayerNorm; the activation is made again.

With ``compute_dtype`` (under autocast) the sum that runs along the layers is float32. Each LayerNorm's kernel writes
the copy in ``compute_dtype`` that the next product reads beside it, and its backward takes the gradients of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import philox, triton_activation, triton_product, triton_rows
from . import PARTS, TENSORS

_OP = "transformer_layers"
# Kernels of a layer's parts, by the table of ops: implementations do not import one another.
_attention, _norm = (registry.OPS[name].module("triton") for name in ("attention", "add_layer_norm"))
# Places among a layer's tensors.
(_QKV, _PROJECT, _NORM, _WIDEN, _NARROW, _LAST_NORM) = range(0, TENSORS, 2)
assert PARTS == ("qkv", "project", "attention_norm", "widen", "narrow", "output_norm")
# What products read; the other biases are added in float32 by the LayerNorms' kernels.
_LOWERED = (_QKV, _QKV + 1, _PROJECT, _WIDEN, _WIDEN + 1, _NARROW)
_ALIGNED = 64  # elements: what a copy of a weight must be a multiple of, so that the next begins at 128 bytes
# Products of half precision that give float32 (torch 2.8, on a GPU).
_HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
_KEPT = 3 + TENSORS  # saved after seeds and weights: what _outputs lists for the backward
# Gradients by place: those of x and its copy, then a layer's tensors and the relative bias.
_OF_X, _OF_LOW, _OF_WEIGHTS, _OF_TABLE = 0, 1, 2, 2 + TENSORS


def _bits(*places: int) -> int:
    return sum(1 << _OF_WEIGHTS + place for place in places)


_SUMS = _bits(_NORM, _NORM + 1, _PROJECT + 1)
_LAST_SUMS = _bits(_LAST_NORM, _LAST_NORM + 1, _NARROW + 1)
# What has its gradient before the last LayerNorm's, and before the first's.
_BEFORE_LAST = ~_LAST_SUMS
_BEFORE_WIDEN = _BEFORE_LAST & ~_bits(_WIDEN, _WIDEN + 1, _NARROW)
_BEFORE_NORM = _BEFORE_WIDEN & ~_SUMS
_BEFORE_ATTENTION = _BEFORE_NORM & ~_bits(_PROJECT)


def _outputs(
    x: Tensor, low: Tensor | None, cu_seqlens: Tensor, weights: Sequence[Tensor | None], num_heads: int,
    compute_dtype: torch.dtype | None, with_low: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """The result and its copy, or empty; with ``save`` what the backward takes besides the inputs: see ``_forward``."""
    (tokens, size), wide = x.shape, x.dtype if compute_dtype is None else torch.float32

    def made(*shape: int, dtype: torch.dtype | None = compute_dtype) -> Tensor:
        return torch_ops.allocate(shape, x, dtype)

    copied = (tokens, size) if compute_dtype is not None else (0,)
    outputs = [made(tokens, size, dtype=wide), made(*copied) if with_low else made(0)]
    if not save:
        return outputs
    count = weights[_WIDEN].shape[0]
    return [
        *outputs, made(*copied) if low is None else made(0), made(tokens, 3, num_heads, size // num_heads),
        made(tokens, num_heads, size // num_heads), made(num_heads, tokens, dtype=torch.float32), made(tokens, size),
        made(tokens, size, dtype=wide), made(*copied), made(tokens, count), made(tokens, size),
        *(made(tokens, dtype=torch.float32) for _ in range(4)),
    ]  # fmt: skip


def _forward(
    x: Tensor, low: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, weights: Sequence[Tensor | None],
    num_heads: int, activation: str, eps: float, attention_p: float, dropout_p: float, last_p: float,
    seeds: Sequence[Tensor | None], compute_dtype: torch.dtype | None, relative_bias: Tensor | None, with_low: bool,
    save: bool,
) -> list[Tensor]:  # fmt: skip
    """One layer. ``low``: a copy of x in ``compute_dtype``, where there is one."""
    (
        qkv, qkv_bias, project, project_bias, scale, shift,
        widen, widen_bias, narrow, narrow_bias, last, last_shift,
    ) = weights  # fmt: skip
    out_dtype = None if compute_dtype is None else torch.float32
    attention_seeds, norm_seeds, last_seeds = seeds
    given = x if compute_dtype is None else x.to(compute_dtype) if low is None else low
    head_dim = x.shape[1] // num_heads
    rows, softmax_scale = _product(given, qkv, qkv_bias).view(x.shape[0], 3, num_heads, head_dim), head_dim**-0.5
    is_plain = not save and relative_bias is None
    if is_plain and _attention._is_for_sdpa(rows, cu_seqlens, max_seqlen, softmax_scale, attention_p):
        context = _attention._by_sdpa(rows, max_seqlen, softmax_scale)
    else:
        context, lse = _attention._forward(
            rows, cu_seqlens, max_seqlen, softmax_scale, attention_p, attention_seeds, relative_bias, None, None, save
        )
    projected = context.flatten(1).mm(project.t())
    h, low_h, mean, rstd = _norm.forward(
        projected, x, scale, shift, project_bias, eps, dropout_p, norm_seeds, out_dtype, compute_dtype, save
    )
    made, product = _activated(h if compute_dtype is None else low_h, widen, widen_bias, activation, save)
    narrowed = made.mm(narrow.t())
    del made
    out, low_out, last_mean, last_rstd = _norm.forward(
        narrowed, h, last, last_shift, narrow_bias, eps, last_p, last_seeds, out_dtype,
        compute_dtype if with_low else None, save,
    )  # fmt: skip
    if not save:
        return [out, low_out]
    own = given if compute_dtype is not None and low is None else torch_ops.allocate((0,), x, compute_dtype)
    return [
        out, low_out, own, rows, context, lse, projected, h, low_h, product, narrowed, mean, rstd, last_mean, last_rstd
    ]  # fmt: skip


def _gradients(
    x: Tensor,
    weights: Sequence[Tensor | None],
    wanted: int,
    compute_dtype: torch.dtype | None,
    relative_bias: Tensor | None,
) -> list[Tensor]:
    """Of x, of its copy, of the weights and of the relative bias, by place; empty where not wanted."""
    wide = x.dtype if compute_dtype is None else torch.float32
    given = (x, x, *weights, relative_bias)
    dtypes = [wide, compute_dtype, *(wide if place in _LOWERED else None for place in range(TENSORS)), None]
    found = []
    for place, (each, dtype) in enumerate(zip(given, dtypes)):
        is_there = each is not None and wanted >> place & 1
        found.append(torch_ops.allocate(each.shape, each, dtype) if is_there else torch_ops.allocate((0,), x))
    return found


def _backward(
    grad: Tensor, low_grad: Tensor | None, x: Tensor, low: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
    weights: Sequence[Tensor | None], kept: Sequence[Tensor], num_heads: int, activation: str, attention_p: float,
    dropout_p: float, last_p: float, seeds: Sequence[Tensor | None], compute_dtype: torch.dtype | None,
    relative_bias: Tensor | None, wanted: int,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients by place, those that are ``wanted``: a bit for each."""
    found: list[Tensor | None] = [None] * (_OF_TABLE + 1)

    def keep(place: int, value: Tensor) -> None:
        if wanted >> _OF_WEIGHTS + place & 1:
            found[_OF_WEIGHTS + place] = value

    def wants(place: int) -> int:
        return wanted >> _OF_WEIGHTS + place & 1

    qkv, _, project, project_bias, scale, _, widen, widen_bias, narrow, narrow_bias, last, _ = weights
    own, rows, context, lse, projected, h, low_h, product, narrowed, mean, rstd, last_mean, last_rstd = kept
    is_mixed = compute_dtype is not None
    attention_seeds, norm_seeds, last_seeds = seeds
    of_h, of_narrowed, *sums = _norm.backward(
        grad, low_grad, narrowed, h, last, narrow_bias, last_mean, last_rstd, last_p, last_seeds,
        wanted & _LAST_SUMS != 0,
    )  # fmt: skip
    for place, value in zip((_LAST_NORM, _LAST_NORM + 1, _NARROW + 1), sums):
        keep(place, value)
    if not wanted & _BEFORE_LAST:
        return found
    of_narrowed = of_narrowed if is_mixed or last_seeds is not None else of_h
    of_product = of_narrowed.mm(narrow)  # so far that of the activation's result
    if activation == "none":
        made = product if widen_bias is None else product + widen_bias
        if wants(_WIDEN + 1):
            keep(_WIDEN + 1, of_product.sum(0, dtype=torch.float32 if is_mixed else None))
    else:
        made = triton_activation.output(product) if wants(_NARROW) else None
        size = (widen.shape[0],) if wants(_WIDEN + 1) else (0,)
        of_bias = torch_ops.allocate(size, widen, torch.float32 if is_mixed else None)
        triton_activation.backward(of_product, product, widen_bias, activation, of_product, made, of_bias)
        keep(_WIDEN + 1, of_bias)
    if wants(_NARROW):
        keep(_NARROW, _of_weight(of_narrowed, made, is_mixed))
    del made
    if wants(_WIDEN):
        keep(_WIDEN, _of_weight(of_product, low_h if is_mixed else h, is_mixed))
    if not wanted & _BEFORE_WIDEN:
        return found
    low_of_h = of_product.mm(widen) if is_mixed else None
    if not is_mixed:
        of_h.addmm_(of_product, widen)
    of_x, of_projected, *sums = _norm.backward(
        of_h, low_of_h, projected, x, scale, project_bias, mean, rstd, dropout_p, norm_seeds, wanted & _SUMS != 0
    )
    for place, value in zip((_NORM, _NORM + 1, _PROJECT + 1), sums):
        keep(place, value)
    if not wanted & _BEFORE_NORM:
        return found
    of_projected = of_projected if is_mixed or norm_seeds is not None else of_x
    if wants(_PROJECT):
        keep(_PROJECT, _of_weight(of_projected, context.flatten(1), is_mixed))
    if not wanted & _BEFORE_ATTENTION:
        return found
    of_context = of_projected.mm(project).view(context.shape)
    of_rows, of_table = _attention._backward(
        of_context, rows, cu_seqlens, max_seqlen, (x.shape[1] // num_heads) ** -0.5, attention_p, attention_seeds,
        relative_bias, None, None, wanted >> _OF_TABLE & 1 == 1, context, lse,
    )  # fmt: skip
    of_rows = of_rows.flatten(1)
    if wanted >> _OF_TABLE & 1:
        found[_OF_TABLE] = of_table
    if wants(_QKV + 1):
        keep(_QKV + 1, of_rows.sum(0, dtype=torch.float32 if is_mixed else None))
    given = x if not is_mixed else own if low is None else low
    if wants(_QKV):
        keep(_QKV, _of_weight(of_rows, given, is_mixed))
    if wanted >> _OF_LOW & 1:
        found[_OF_LOW] = of_rows.mm(qkv)
        found[_OF_X] = of_x
    elif wanted >> _OF_X & 1:
        found[_OF_X] = of_x.add_(of_rows.mm(qkv)) if is_mixed else of_x.addmm_(of_rows, qkv)
    return found


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_kept: bool
) -> tuple[Tensor, Tensor | None]:
    """The first half of the feed-forward block, and its product if it is to be kept."""
    if activation == "none":
        product = x.mm(weight.t())
        return product if bias is None else product + bias, product
    return triton_product.linear(x, weight, bias, activation, is_kept, triton_activation.forward)


def _of_weight(grad: Tensor, x: Tensor, is_mixed: bool) -> Tensor:
    """Gradient of a product's weight: float32 where ``is_mixed``, by the product itself if it can."""
    if not is_mixed:
        return grad.t().mm(x)
    if _HAS_WIDE_PRODUCTS and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t().mm(x).float()


def _whole_backward(
    grad: Tensor, low_grad: Tensor | None, x: Tensor, low: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
    weights: Sequence[Tensor | None], kept: Sequence[Tensor], num_heads: int, activation: str, attention_p: float,
    dropout_p: float, last_p: float, seeds: Sequence[Tensor | None], compute_dtype: torch.dtype | None,
    relative_bias: Tensor | None, wanted: int,
) -> list[Tensor]:  # fmt: skip
    """As an operator, which returns tensors alone: empty ones for None."""
    found = _backward(
        grad, low_grad, x, low, cu_seqlens, max_seqlen, weights, kept, num_heads, activation, attention_p, dropout_p,
        last_p, seeds, compute_dtype, relative_bias, wanted,
    )  # fmt: skip
    return [torch_ops.allocate((0,), x) if each is None else each for each in found]


_fwd = torch_ops.define("transformer_layers_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("transformer_layers_triton_bwd", _whole_backward, _gradients, triton_rows.DISPATCH)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor | None, cu_seqlens: Tensor, options: tuple[Any, ...],
        seeds: Sequence[Tensor | None], lowered: Sequence[Tensor | None], with_low: bool,
        relative_bias: Tensor | None, *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        max_seqlen, num_heads, activation, eps, dropout_p, compute_dtype = options
        forward = _forward if torch_ops.is_direct(x, low, relative_bias, *weights) else _fwd
        out, low_out, *kept = forward(
            x, low, cu_seqlens, max_seqlen, lowered, num_heads, activation, eps, *dropout_p, seeds, compute_dtype,
            relative_bias, with_low, True,
        )  # fmt: skip
        copies = () if compute_dtype is None else [lowered[place] for place in _LOWERED]
        ctx.save_for_backward(x, low, cu_seqlens, relative_bias, *seeds, *weights, *kept, *copies)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, low_out if with_low else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, low_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, cu_seqlens, relative_bias, *rest = ctx.saved_tensors
        seeds, weights, kept, copies = rest[:3], rest[3:_KEPT], rest[_KEPT : _KEPT + 13], rest[_KEPT + 13 :]
        max_seqlen, num_heads, activation, eps, dropout_p, compute_dtype = ctx.options
        needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[8:], ctx.needs_input_grad[7])
        given = [each for each in (grad, low_grad) if each is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if torch_ops.needs_definition(*given):
            # All of the gradient through x itself, and none by its copy.
            masks = _masks(kept[1], x, cu_seqlens, max_seqlen, dropout_p, seeds)

            def defined(x: Tensor, relative_bias: Tensor | None, *weights: Tensor | None) -> list[Tensor]:
                out = registry.OPS[_OP].reference(
                    x, cu_seqlens, max_seqlen, weights, num_heads, activation, eps, None, False, dropout_p,
                    compute_dtype, relative_bias, [masks],
                )  # fmt: skip
                return [part for part, own in ((out, grad), (out, low_grad)) if own is not None]

            wanted = (needed[_OF_X], needed[_OF_TABLE], *needed[_OF_WEIGHTS:_OF_TABLE])
            of_x, of_table, *of_weights = torch_ops.definition_gradients(
                defined, (x, relative_bias, *weights), wanted, given
            )
            grads = (of_x, None, *of_weights, of_table)
        else:
            backward = _backward if torch_ops.is_direct(*given) else _bwd
            lowered = list(weights)
            for place, copy in zip(_LOWERED, copies):
                lowered[place] = copy
            grads = backward(
                given[0], given[1] if len(given) == 2 else None, x, low, cu_seqlens, max_seqlen, lowered, kept,
                num_heads, activation, *dropout_p, seeds, compute_dtype, relative_bias,
                sum(1 << place for place, wants in enumerate(needed) if wants),
            )  # fmt: skip
            grads = [each if wants else None for each, wants in zip(grads, needed)]
        return (*grads[:2], None, None, None, None, None, grads[_OF_TABLE], *grads[_OF_WEIGHTS:_OF_TABLE])


def _masks(
    rows: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """What dropout multiplied by, for the definition."""
    attention_seeds, *others = seeds
    found = [_attention._mask(rows, cu_seqlens, max_seqlen, dropout_p[0], attention_seeds)]
    for own, p in zip(others, dropout_p[1:]):
        bits = None if own is None else philox.row_bits(*x.shape, own)
        found.append(None if bits is None else philox.multiplier(bits, p, torch.float32))
    return tuple(found)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the kernels cannot run this call."""
    x, compute_dtype, weights = args["x"], args["compute_dtype"], args["weights"]
    objection = triton_rows.why_no_row("x", x)
    if objection is not None:
        return objection
    if args["weight_dtype"] is not None:
        return "int8 products run on the CPU."
    if compute_dtype is not None and any(each is not None and each.dtype not in triton_rows.DTYPES for each in weights):
        return "it takes float32, float16 and bfloat16, and a weight is float64."
    rows = x.new_empty((0, 3, args["num_heads"], x.shape[1] // args["num_heads"]), dtype=compute_dtype)
    return _attention.supports(registry.OPS["attention"].arguments(rows, args["cu_seqlens"], args["max_seqlen"]))


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
    is_recorded = registry.needs_grad(x, weights, relative_bias)
    if is_recorded and torch.compiler.is_compiling():  # differentiates what it sees, so it sees the definition
        return registry.OPS[_OP].reference(
            x, cu_seqlens, max_seqlen, weights, num_heads, activation, eps, None, all_layers, dropout_p, compute_dtype,
            relative_bias,
        )  # fmt: skip
    count = len(weights) // TENSORS
    lowered = _lowered(weights, compute_dtype)
    seeds = _drawn(x, count, dropout_p)
    options = (max_seqlen, num_heads, activation, eps, dropout_p, compute_dtype)
    direct = torch_ops.is_direct(x, relative_bias, *weights)
    low, states = None, []
    for layer in range(count):
        # A state that others see has one gradient, which holds all there is of it: none goes around it by a copy.
        with_low = compute_dtype is not None and not all_layers and layer < count - 1
        part = slice(layer * TENSORS, (layer + 1) * TENSORS)
        if is_recorded:
            x, low = _Layer.apply(
                x, low, cu_seqlens, options, seeds[layer], lowered[part], with_low, relative_bias, *weights[part]
            )
        else:
            x, copied = (_forward if direct else _fwd)(
                x, low, cu_seqlens, max_seqlen, lowered[part], num_heads, activation, eps, *dropout_p, seeds[layer],
                compute_dtype, relative_bias, with_low, False,
            )  # fmt: skip
            low = copied if with_low else None
        if all_layers:
            states.append(x)
    return tuple(states) if all_layers else x


def _drawn(x: Tensor, count: int, dropout_p: Sequence[float]) -> list[list[Tensor | None]]:
    """Seed and offset of every layer's three masks, drawn where x is; None where nothing is dropped."""
    if not any(dropout_p):
        return [[None] * 3] * count
    found = iter(torch.randint(-(2**63), 2**63 - 1, (3 * count, 2), device=x.device).unbind(0))
    return [[own if p > 0 else None for p, own in zip(dropout_p, found)] for _ in range(count)]


@torch.no_grad()
def _lowered(weights: Sequence[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
    """The weights with those that products read in ``dtype``, all of them copied at once."""
    found = list(weights)
    if dtype is None:
        return found
    places = [
        place for place, each in enumerate(weights)
        if place % TENSORS in _LOWERED and each is not None and each.dtype != dtype
    ]  # fmt: skip
    given = [found[place] for place in places]
    if given and all([each.numel() % _ALIGNED == 0 and each.dtype is given[0].dtype for each in given]):
        flat = torch_ops.allocate((sum([each.numel() for each in given]),), given[0], dtype)
        made = torch._C._nn.unflatten_dense_tensors(flat, given)
        torch._foreach_copy_(made, given)
    else:
        made = [each.to(dtype) for each in given]
    for place, each in zip(places, made):
        found[place] = each
    return found


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, cu_seqlens, max_seqlen = args["x"], args["cu_seqlens"], args["max_seqlen"]
    dropout_p, dtype = args["dropout_p"], args["compute_dtype"]
    weights, seeds = _lowered(args["weights"][:TENSORS], dtype), _drawn(x, 1, dropout_p)[0]
    given = (x, None, cu_seqlens, max_seqlen, weights, args["num_heads"], args["activation"])
    table = args["relative_bias"]
    forward = (*given, args["eps"], *dropout_p, seeds, dtype, table, dtype is not None, True)
    out, low, *kept = _fwd(*forward)
    grads = (torch.randn_like(out), torch.randn_like(low) if dtype is not None else None)
    wanted = sum(1 << _OF_WEIGHTS + place for place, each in enumerate(weights) if each is not None) | 1 << _OF_X
    wanted |= (table is not None) << _OF_TABLE
    backward = (*grads, *given[:5], kept, *given[5:], *dropout_p, seeds, dtype, table, wanted)
    return [(_fwd, forward), (_fwd, (*forward[:-1], False)), (_bwd, backward)]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: nothing that its parts do not list."""
    return iter(())
