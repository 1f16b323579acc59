# SPDX-License-Identifier: Apache-2.0
"""``add_norm``: the residual stream of a pre-norm layer and its norm, in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from .reference import NORMS, add_norm as reference

_OP = "add_norm"
_TENSORS = ("x", "residual", "weight", "bias", "x_bias")


def _check(args: Mapping[str, Any]) -> None:
    x = checks.floating(_OP, "x", args["x"])
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"ctxfast.add_norm: x has shape {tuple(x.shape)}; expected (..., hidden_size) with hidden_size >= 1."
        )
    size = x.shape[-1]
    if args["residual"] is not None:
        checks.shape(_OP, "residual", args["residual"], tuple(x.shape), "the shape of x")
    if args["weight"] is None:
        raise TypeError(f"ctxfast.add_norm: weight is None; expected a tensor of shape ({size},).")
    for name in ("weight", "bias", "x_bias"):
        if args[name] is not None:
            checks.shape(_OP, name, args[name], (size,), "(hidden_size,)")
    checks.same(_OP, "x", x, [(name, args[name]) for name in _TENSORS[1:]])
    checks.choice(_OP, "norm", args["norm"], NORMS)
    checks.positive(_OP, "eps", args["eps"])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


def _autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """float32, as torch's own norms give and as the stream of residuals is."""
    given = {name: args[name] for name in _TENSORS if args[name] is not None}
    if any(each.dtype == torch.float64 for each in given.values()):
        return dict(args)
    return {**args, **{name: each.float() for name, each in given.items()}}


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
def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = residual + dropout(x + x_bias)`` and its norm over the last dimension.

    The total goes on as the residual stream of pre-norm layers. The norm "layer" is ``(total - mean) / sqrt(variance +
    eps) * weight + bias``, "rms" is ``total / sqrt(mean(total^2) + eps) * weight + bias``.

    Args:
        x: (..., N), the output of the block before.
        residual: (..., N); None for none.
        weight: (N,), scale after normalisation.
        bias: (N,), shift after it; None for none.
        x_bias: (N,), bias of the linear layer that made ``x``; None for none.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm, which takes no mean away).
        eps: added to the variance, or to the mean square.
        dropout_p: probability of dropping an element of ``x + x_bias`` in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        (total, norm), each of the shape of ``x`` and in its dtype; under autocast both float32.

    Numerics: float32 statistics (float64 for float64) of the total as it is returned; deterministic without dropout.
    Reference: Xiong et al. 2020 (pre-norm layers); Ba et al. 2016; Zhang & Sennrich 2019 (RMSNorm).
    """
    return calls.given(
        impl,
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        x_bias=x_bias,
        norm=norm,
        eps=eps,
        dropout_p=dropout_p,
    )
