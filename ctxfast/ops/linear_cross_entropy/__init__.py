# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy``: an output layer and its loss over the labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._core import checks, registry
from .reference import linear_cross_entropy as reference

_OP = "linear_cross_entropy"


def _check(args: Mapping[str, Any]) -> None:
    hidden, weight = (
        checks.tensor(_OP, "hidden", args["hidden"]),
        checks.tensor(_OP, "weight", args["weight"]),
    )
    labels, bias = checks.tensor(_OP, "labels", args["labels"]), args["bias"]
    checks.floating(_OP, "hidden", hidden)
    checks.shape(_OP, "hidden", hidden, (None, None), "(rows, hidden_size)")
    checks.shape(_OP, "weight", weight, (None, hidden.shape[1]), "(vocab_size, hidden_size)")
    checks.integer(_OP, "labels", labels)
    checks.shape(_OP, "labels", labels, (hidden.shape[0],), "(rows,)")
    if bias is not None:
        checks.shape(_OP, "bias", checks.tensor(_OP, "bias", bias), (weight.shape[0],), "(vocab_size,)")
    checks.same(_OP, "hidden", hidden, [("weight", weight), ("bias", bias)])
    checks.same(_OP, "hidden", hidden, [("labels", labels)], dtype=False)
    checks.choice(_OP, "reduction", args["reduction"], ("mean", "sum", "none"))
    if checks.is_readable(labels):
        used = labels[labels != args["ignore_index"]]
        checks.in_range(
            _OP,
            "labels",
            used,
            0,
            weight.shape[0] - 1,
            f"Rows without a label hold ignore_index ({args['ignore_index']}).",
        )


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="cross entropy of W h + b against labels, over the labelled rows",
        cite="Devlin et al. 2019, section 3.1 (masked LM)",
        reference=reference,
        check=_check,
        autocast="lower",
        impls=(
            registry.Impl("cpu", "cpu", note="labelled rows only, a chunk of their logits at a time"),
            registry.Impl("triton", "cuda", note="labelled rows only, softmax in one kernel; not yet run on a GPU"),
        ),
    )
)
