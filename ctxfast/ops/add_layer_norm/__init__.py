# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm``: bias, dropout, residual and LayerNorm in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from .reference import add_layer_norm as reference

_OP = "add_layer_norm"
_TENSORS = ("x", "residual", "weight", "bias", "x_bias")


def _check(args: Mapping[str, Any]) -> None:
    x = checks.floating(_OP, "x", args["x"])
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"ctxfast.add_layer_norm: x has shape {tuple(x.shape)}; expected (..., hidden_size) with hidden_size >= 1."
        )
    size = x.shape[-1]
    if args["residual"] is not None:
        checks.shape(_OP, "residual", args["residual"], tuple(x.shape), "the shape of x")
    for name in ("weight", "bias", "x_bias"):
        if args[name] is not None:
            checks.shape(_OP, name, args[name], (size,), "(hidden_size,)")
        elif name != "x_bias":
            raise TypeError(f"ctxfast.add_layer_norm: {name} is None; expected a tensor of shape ({size},).")
    others = [(name, args[name]) for name in _TENSORS[1:]]
    checks.same(_OP, "x", x, others, dtype=args["out_dtype"] is None)
    if args["out_dtype"] is not None:
        checks.choice(_OP, "out_dtype", args["out_dtype"], checks.FLOATING)
        for name, value in others:
            if value is not None:
                checks.floating(_OP, name, value)
    checks.positive(_OP, "eps", args["eps"])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


def _autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """float32, as torch's own LayerNorm gives, of inputs as they are: nothing is converted in a pass of its own."""
    is_given = args["out_dtype"] is not None
    is_double = any(each is not None and each.dtype == torch.float64 for each in map(args.get, _TENSORS))
    return dict(args) if is_given or is_double else {**args, "out_dtype": torch.float32}


@calls.op(
    reference=reference,
    check=_check,
    check_values=calls.no_values,
    autocast=_autocast,
    impls=(
        registry.Impl("cpu", "cpu", note="one compiled pass over the rows; torch's with a gradient", proven="cpu"),
        registry.Impl("triton", "cuda", note="one pass over the rows, with backward", proven="interpreter"),
    ),
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """``LayerNorm(residual + dropout(x + x_bias))`` over the last dimension.

    Args:
        x: (..., N).
        residual: (..., N); None for none.
        weight, bias: (N,), scale and shift after normalisation.
        x_bias: (N,), bias of the linear layer that made ``x``; None for none.
        eps: added to the variance. BERT's 1e-12 is below half precision's resolution, so statistics are float32.
        dropout_p: probability of dropping an element of ``x + x_bias`` in this call (0 at inference).
        out_dtype: dtype of the result, of tensors that may differ in dtype; None for that of all of them, under
            autocast float32.
        impl: name of an implementation; None chooses.

    Returns:
        The shape of ``x``, in its dtype or ``out_dtype``.

    Numerics: float32 statistics (float64 for float64), and float32 sums with ``out_dtype``; deterministic without
    dropout.
    Reference: Ba et al. 2016; Vaswani et al. 2017, section 3.1.
    """
    return calls.given(
        impl,
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        x_bias=x_bias,
        eps=eps,
        dropout_p=dropout_p,
        out_dtype=out_dtype,
    )
