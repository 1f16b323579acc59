# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers``: whole post-LN encoder layers over packed sequences in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from ..shared.definitions import ACTIVATIONS
from .reference import transformer_layers as reference

_OP = "transformer_layers"

# Parts of a layer, (weight, bias) each, in the order of ``weights``.
PARTS = ("qkv", "project", "attention_norm", "widen", "narrow", "output_norm")
TENSORS = 2 * len(PARTS)
_MAY_MISS = tuple(2 * PARTS.index(part) + 1 for part in ("qkv", "project", "widen", "narrow"))


def _is_right(x: Tensor, weights: Sequence[Any], wide: int | None, is_mixed: bool) -> bool:
    """Whether the tensors of a layer are those that ``_check_layer`` wants, found out in a tenth of its time."""
    size, dtype, device = x.shape[1], x.dtype, x.device
    row, long_row = (size,), (wide,)
    shapes = (
        (3 * size, size), (3 * size,), (size, size), row, row, row,
        (wide, size), long_row, (size, wide), row, row, row,
    )  # fmt: skip
    for place, (tensor, shape) in enumerate(zip(weights, shapes)):
        if tensor is None and place in _MAY_MISS:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != device:
            return False
        if tensor.dtype not in checks.FLOATING if is_mixed else tensor.dtype is not dtype:
            return False
    return True


def _check_layer(x: Tensor, layer: int, weights: Sequence[Tensor | None], wide: int, is_mixed: bool) -> None:
    if _is_right(x, weights, wide, is_mixed):
        return
    size = x.shape[1]
    shapes = {
        "qkv": ((3 * size, size), "(3*hidden_size, hidden_size)"),
        "project": ((size, size), "(hidden_size, hidden_size)"),
        "widen": ((wide, size), "(intermediate_size, hidden_size)"),
        "narrow": ((size, wide), "(hidden_size, intermediate_size)"),
    }
    for part, weight, bias in zip(PARTS, weights[::2], weights[1::2]):
        name, is_norm = f"{part} of layer {layer}", part not in shapes
        shape, meaning = shapes.get(part, ((size,), "(hidden_size,)"))
        checks.shape(_OP, f"weight of {name}", weight, shape, meaning)
        if bias is not None or is_norm:
            first = meaning.strip("()").partition(",")[0]
            checks.shape(_OP, f"bias of {name}", bias, shape[:1], f"({first},)")
        pairs = [(f"weight of {name}", weight), (f"bias of {name}", bias)]
        checks.same(_OP, "x", x, pairs, dtype=not is_mixed)
        for each, value in pairs:
            if value is not None:
                checks.floating(_OP, each, value)


def _check_relative_bias(x: Tensor, heads: int, table: Tensor | None) -> None:
    if table is None:
        return
    checks.shape(_OP, "relative_bias", table, (heads, None), "(num_heads, 2*reach - 1)")
    checks.same(_OP, "x", x, [("relative_bias", table)], dtype=False)
    wide = torch.promote_types(x.dtype, torch.float32)
    if table.dtype is not wide or table.shape[1] % 2 == 0:
        raise ValueError(
            f"ctxfast.{_OP}: relative_bias has shape {tuple(table.shape)} and dtype {table.dtype}; expected an odd "
            f"number of columns, 2*reach - 1, in {wide}, whatever half precision x has."
        )


def _check(args: Mapping[str, Any]) -> None:
    x, heads = checks.floating(_OP, "x", args["x"]), args["num_heads"]
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"ctxfast.{_OP}: x has shape {tuple(x.shape)}; expected (tokens, hidden_size), packed. Pack a padded batch "
            f"with ctxfast.packing first."
        )
    checks.packed(_OP, "x", x, args["cu_seqlens"], args["max_seqlen"])
    size = x.shape[1]
    if not isinstance(heads, int) or heads < 1 or size % heads:
        raise ValueError(f"ctxfast.{_OP}: num_heads is {heads}; expected a divisor of hidden_size = {size}.")
    weights = args["weights"]
    if not weights or len(weights) % TENSORS:
        raise ValueError(
            f"ctxfast.{_OP}: weights holds {len(weights)} tensors; expected {TENSORS} for each of one or more layers: "
            f"weight and bias of {', '.join(PARTS)}."
        )
    first = checks.tensor(_OP, "weight of widen of layer 0", weights[2 * PARTS.index("widen")])
    wide = first.shape[0] if first.dim() else None
    for i in range(0, len(weights), TENSORS):
        _check_layer(x, i // TENSORS, weights[i : i + TENSORS], wide, args["compute_dtype"] is not None)
    checks.choice(_OP, "activation", args["activation"], ACTIVATIONS)
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.int8))
    checks.choice(_OP, "compute_dtype", args["compute_dtype"], (None, torch.float16, torch.bfloat16))
    _check_relative_bias(x, heads, args["relative_bias"])
    if len(args["dropout_p"]) != 3:
        raise ValueError(
            f"ctxfast.{_OP}: dropout_p holds {len(args['dropout_p'])} probabilities; expected 3: of an attention "
            f"weight, and of an element before each of the two residual sums."
        )
    for p in args["dropout_p"]:
        checks.probability(_OP, "dropout_p", p)


def _autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Products in autocast's dtype, all else in float32, as torch's own modules give it."""
    is_given = args["compute_dtype"] is not None
    is_double = any(each.dtype == torch.float64 for each in registry.tensors(args))
    return dict(args) if is_given or is_double else {**args, "compute_dtype": dtype}


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "x", args["x"].shape[0])


@calls.op(
    reference=reference,
    check=_check,
    check_values=_check_offsets,
    autocast=_autocast,
    # Roundings and sums of six products and two norms add up.
    ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
    impls=(
        registry.Impl("cpu", "cpu", note="one parallel region for all layers, weights packed", proven="cpu"),
        registry.Impl(
            "triton", "cuda", note="a layer is one step of autograd, of its parts' kernels", proven="interpreter"
        ),
    ),
)
def transformer_layers(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor | None],
    *,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    weight_dtype: torch.dtype | None = None,
    all_layers: bool = False,
    dropout_p: Sequence[float] = (0.0, 0.0, 0.0),
    compute_dtype: torch.dtype | None = None,
    relative_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Whole post-LN encoder layers over S packed sequences, one after another.

    A layer: ``h = LayerNorm(x + project(attention(qkv(x))))``; ``LayerNorm(h + narrow(activation(widen(h))))``.

    Args:
        x: (T, N), sequences one after another.
        cu_seqlens: (S + 1,) int32 or int64, row where each sequence starts; the last entry is T.
        max_seqlen: length of the longest sequence, or more.
        weights: 12 tensors of each layer, layers one after another: weight and bias of qkv (query, key and value
            together: (3N, N)), project (N, N), the attention's LayerNorm (N,), widen (M, N), narrow (N, M) and the
            output's LayerNorm (N,). The bias of a product may be None.
        num_heads: a divisor of N.
        activation, weight_dtype: as in ``linear_act``.
        eps: of every LayerNorm.
        all_layers: return what every layer gives, not only the last.
        dropout_p: probabilities, in this call, of dropping an attention weight, and an element before each of the two
            residual sums (0 at inference).
        compute_dtype: float16 or bfloat16: that of the products and attention, whatever the tensors' own; sums,
            LayerNorms and results are float32 then. None: all in one dtype. Under autocast its dtype.
        relative_bias: (num_heads, 2R - 1) float32, one for all layers: as in ``attention``.
        impl: name of an implementation; None chooses.

    Returns:
        (T, N), in the dtype of ``x`` (with ``compute_dtype`` float32); with ``all_layers`` one for each layer.

    Numerics: cpu gives the bits that its parts (``linear_act``, ``attention``, ``add_layer_norm``) give one by one; in
    float32 and int8 a sequence's do not depend on the others.
    Reference: Vaswani et al. 2017, section 3.1; Devlin et al. 2019.
    """
    return calls.given(
        impl,
        x=x,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        weights=tuple(weights),
        num_heads=num_heads,
        activation=activation,
        eps=eps,
        weight_dtype=weight_dtype,
        all_layers=all_layers,
        dropout_p=tuple(dropout_p),
        compute_dtype=compute_dtype,
        relative_bias=relative_bias,
    )
