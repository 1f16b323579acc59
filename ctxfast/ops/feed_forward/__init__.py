# SPDX-License-Identifier: Apache-2.0
"""``feed_forward``: two linear layers and the activation between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from ..shared.definitions import ACTIVATIONS
from .reference import feed_forward as reference

_OP = "feed_forward"


def _check(args: Mapping[str, Any]) -> None:
    x, weight1, weight2 = checks.floating(_OP, "x", args["x"]), args["weight1"], args["weight2"]
    bias1, bias2 = args["bias1"], args["bias2"]
    if x.dim() < 1:
        raise ValueError("ctxfast.feed_forward: x has shape (); expected (..., in_features).")
    checks.shape(_OP, "weight1", weight1, (None, x.shape[-1]), "(intermediate_size, in_features)")
    if bias1 is not None:
        checks.shape(_OP, "bias1", bias1, (weight1.shape[0],), "(intermediate_size,)")
    wide = weight1.shape[0]
    if args["gated"] and wide % 2:
        raise ValueError(
            f"ctxfast.feed_forward: weight1 has {wide} rows; expected an even number with gated: those of the half "
            f"that is activated, then those of the half that it is multiplied by."
        )
    wide = wide // 2 if args["gated"] else wide
    checks.shape(_OP, "weight2", weight2, (None, wide), "(out_features, intermediate_size)")
    if bias2 is not None:
        checks.shape(_OP, "bias2", bias2, (weight2.shape[0],), "(out_features,)")
    checks.same(_OP, "x", x, [("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)])
    checks.choice(_OP, "activation", args["activation"], ACTIVATIONS)
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.int8))


@calls.op(
    reference=reference,
    check=_check,
    check_values=calls.no_values,
    autocast="lower",
    # Two products' roundings add up.
    ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
    impls=(
        registry.Impl(
            "cpu",
            "cpu",
            note="compiled over packed weights, float32, bfloat16, int8; the backward recomputes the activation",
            proven="cpu",
        ),
        registry.Impl(
            "triton",
            "cuda",
            note="products by cuBLAS, bias and activation in one pass; the backward recomputes the activation",
            proven="interpreter",
        ),
    ),
)
def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None = None,
    *,
    activation: str = "gelu",
    weight_dtype: torch.dtype | None = None,
    gated: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``activation(x W1^T + b1) W2^T + b2``, the feed-forward block of a transformer.

    With ``gated`` it is ``(activation(x A^T + a) * (x B^T + b)) W2^T + b2``, where ``W1`` holds the rows of A and then
    those of B, in one product: GeGLU with "gelu", SwiGLU with "silu".
    Of the tensors M wide, training saves one, the first product: the backward recomputes the activation.

    Args:
        x: (..., N_in).
        weight1: (M, N_in); (2M, N_in) with ``gated``.
        bias1: (M,), or (2M,); None for none.
        weight2: (N_out, M).
        bias2: (N_out,); None for none: ``add_layer_norm`` can add it.
        activation: "none", "gelu" (exact, erf), "gelu_tanh", "relu", "tanh" or "silu".
        weight_dtype: of the factors of both products, as in ``linear_act``.
        gated: whether the activation is multiplied by a second half of the first product.
        impl: name of an implementation; None chooses.

    Returns:
        (..., N_out), in the dtype of ``x``.

    Numerics: without gradients, cpu gives the bits of two calls of ``linear_act`` (unless gated), and a row's
    result does not depend on the other rows. Gradients are deterministic.
    Reference: Vaswani et al. 2017, section 3.3; Devlin et al. 2019; Shazeer 2020 (gated).
    """
    return calls.given(
        impl,
        x=x,
        weight1=weight1,
        bias1=bias1,
        weight2=weight2,
        bias2=bias2,
        activation=activation,
        weight_dtype=weight_dtype,
        gated=gated,
    )
