# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm``: bias, dropout, residual and LayerNorm in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._core import checks, registry
from .reference import add_layer_norm as reference

_OP = "add_layer_norm"


def _check(args: Mapping[str, Any]) -> None:
    x = checks.tensor(_OP, "x", args["x"])
    checks.floating(_OP, "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"ctxfast.add_layer_norm: x has shape {tuple(x.shape)}; expected (..., hidden_size) with hidden_size >= 1."
        )
    size = x.shape[-1]
    others = [
        ("residual", args["residual"]),
        ("weight", args["weight"]),
        ("bias", args["bias"]),
        ("x_bias", args["x_bias"]),
    ]
    if args["residual"] is not None:
        checks.shape(
            _OP,
            "residual",
            checks.tensor(_OP, "residual", args["residual"]),
            tuple(x.shape),
            "the shape of x",
        )
    for name in ("weight", "bias", "x_bias"):
        if args[name] is not None:
            checks.shape(_OP, name, checks.tensor(_OP, name, args[name]), (size,), "(hidden_size,)")
        elif name != "x_bias":
            raise TypeError(f"ctxfast.add_layer_norm: {name} is None; expected a tensor of shape ({size},).")
    checks.same(_OP, "x", x, others)
    checks.positive(_OP, "eps", args["eps"])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="LayerNorm(residual + dropout(x + bias))",
        cite="Ba et al. 2016; Vaswani et al. 2017, section 3.1 (post-LN residual)",
        reference=reference,
        check=_check,
        check_values=registry.no_values,
        autocast="fp32",
        impls=(
            registry.Impl("cpu", "cpu", note="one compiled pass over the rows; torch's with a gradient"),
            registry.Impl("triton", "cuda", note="one pass over the rows, with backward; not yet run on a GPU"),
        ),
    )
)
