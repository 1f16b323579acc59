# SPDX-License-Identifier: Apache-2.0
"""``linear_act``: a linear layer with its activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from ..shared.definitions import ACTIVATIONS
from .reference import linear_act as reference

_OP = "linear_act"


def _check(args: Mapping[str, Any]) -> None:
    x, weight, bias = checks.floating(_OP, "x", args["x"]), args["weight"], args["bias"]
    if x.dim() < 1:
        raise ValueError("ctxfast.linear_act: x has shape (); expected (..., in_features).")
    checks.shape(_OP, "weight", weight, (None, x.shape[-1]), "(out_features, in_features)")
    if bias is not None:
        checks.shape(_OP, "bias", bias, (weight.shape[0],), "(out_features,)")
    checks.same(_OP, "x", x, [("weight", weight), ("bias", bias)])
    checks.choice(_OP, "activation", args["activation"], ACTIVATIONS)
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.int8))


@calls.op(
    reference=reference,
    check=_check,
    check_values=calls.no_values,
    autocast="lower",
    impls=(
        registry.Impl(
            "cpu",
            "cpu",
            note="compiled over packed weights, float32, bfloat16, int8; oneDNN for weights in training",
            proven="cpu",
        ),
        registry.Impl(
            "triton",
            "cuda",
            note="product by cuBLAS, bias and activation in one pass, with backward",
            proven="interpreter",
        ),
    ),
)
def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    weight_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """``activation(x W^T + b)``.

    Args:
        x: (..., N_in).
        weight: (N_out, N_in).
        bias: (N_out,); None for none.
        activation: "none", "gelu" (exact, erf), "gelu_tanh", "relu", "tanh" or "silu".
        weight_dtype: how both factors of the product are held. None: as they are. torch.int8: each row of x and of
            the weight in whole steps of 1/127 of its largest magnitude, products summed exactly.
        impl: name of an implementation; None chooses.

    Returns:
        (..., N_out), in the dtype of ``x``.

    Numerics: a row's result on the CPU does not depend on the other rows, to the last bit (impl cpu).
    Reference: Hendrycks & Gimpel 2016 (both forms of GELU); Devlin et al. 2019.
    """
    return calls.given(impl, x=x, weight=weight, bias=bias, activation=activation, weight_dtype=weight_dtype)
