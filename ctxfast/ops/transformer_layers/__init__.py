# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers``: whole post-LN encoder layers over packed sequences in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import checks, registry
from ..shared.definitions import ACTIVATIONS
from .reference import transformer_layers as reference

_OP = "transformer_layers"

# Parts of a layer, (weight, bias) each, in the order of ``weights``.
PARTS = ("qkv", "project", "attention_norm", "widen", "narrow", "output_norm")
TENSORS = 2 * len(PARTS)


def _check_layer(x: Tensor, layer: int, weights: Sequence[Tensor | None], wide: int) -> None:
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
        checks.same(_OP, "x", x, [(f"weight of {name}", weight), (f"bias of {name}", bias)])


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
        _check_layer(x, i // TENSORS, weights[i : i + TENSORS], wide)
    checks.choice(_OP, "activation", args["activation"], ACTIVATIONS)
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.int8))


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "x", args["x"].shape[0])


@registry.op(
    reference=reference,
    check=_check,
    check_values=_check_offsets,
    autocast="lower",
    # Roundings and sums of six products and two norms add up.
    ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
    impls=(registry.Impl("cpu", "cpu", note="one parallel region for all layers, weights packed", proven="cpu"),),
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
    impl: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Whole post-LN encoder layers over S packed sequences, one after another, without dropout.

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
        impl: name of an implementation; None chooses.

    Returns:
        (T, N), in the dtype of ``x``; with ``all_layers`` one for each layer.

    Numerics: cpu gives the bits that its parts (``linear_act``, ``attention``, ``add_layer_norm``) give one by one; in
    float32 and int8 a sequence's do not depend on the others.
    Reference: Vaswani et al. 2017, section 3.1; Devlin et al. 2019.
    """
    return registry.given(
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
    )
