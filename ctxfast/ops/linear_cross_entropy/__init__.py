# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy``: an output layer and its loss over the labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..._core import calls, checks, registry
from .reference import linear_cross_entropy as reference

_OP = "linear_cross_entropy"


def _check(args: Mapping[str, Any]) -> None:
    hidden, weight, bias = checks.floating(_OP, "hidden", args["hidden"]), args["weight"], args["bias"]
    checks.shape(_OP, "hidden", hidden, (None, None), "(rows, hidden_size)")
    checks.shape(_OP, "weight", weight, (None, hidden.shape[1]), "(vocab_size, hidden_size)")
    labels = checks.integer(_OP, "labels", args["labels"])
    checks.shape(_OP, "labels", labels, (hidden.shape[0],), "(rows,)")
    if bias is not None:
        checks.shape(_OP, "bias", bias, (weight.shape[0],), "(vocab_size,)")
    checks.same(_OP, "hidden", hidden, [("weight", weight), ("bias", bias)])
    checks.same(_OP, "hidden", hidden, [("labels", labels)], dtype=False)
    checks.choice(_OP, "reduction", args["reduction"], ("mean", "sum", "none"))
    if checks.is_readable(labels):
        ignored = args["ignore_index"]
        used = labels if ignored is None else labels[labels != ignored]
        hint = (
            "With ignore_index=None every row has a label."
            if ignored is None
            else (f"Rows without a label hold ignore_index ({ignored}).")
        )
        checks.in_range(_OP, "labels", used, 0, weight.shape[0] - 1, hint)


@calls.op(
    reference=reference,
    check=_check,
    autocast="lower",
    impls=(
        registry.Impl("cpu", "cpu", note="labelled rows only, a chunk of their logits at a time", proven="cpu"),
        registry.Impl("triton", "cuda", note="labelled rows only, softmax in one kernel", proven="interpreter"),
    ),
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of ``W h + b`` against labels, over the rows that have one.

    Args:
        hidden: (T, N).
        weight: (V, N).
        labels: (T,) int64 or int32, 0..V-1, or ``ignore_index`` for a row without a label.
        bias: (V,); None for none.
        ignore_index: the value that marks a row without a label; None where every row has one. A GPU is waited for
            once, until it has counted them, and not for None.
        reduction: "mean" over labelled rows (0 when there is none), "sum", or "none" for (T,) with 0 at ignored rows.
        impl: name of an implementation; None chooses.

    Returns:
        A scalar (float32; float64 for float64), or (T,) with "none".

    Reference: Devlin et al. 2019, section 3.1.
    """
    return calls.given(
        impl, hidden=hidden, weight=weight, labels=labels, bias=bias, ignore_index=ignore_index, reduction=reduction
    )
