# SPDX-License-Identifier: Apache-2.0
"""``attention``: bidirectional attention inside each of several packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._core import checks, registry
from .reference import attention as reference

_OP = "attention"


def _check(args: Mapping[str, Any]) -> None:
    qkv = args["qkv"]
    checks.floating(_OP, "qkv", checks.tensor(_OP, "qkv", qkv))
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"ctxfast.attention: qkv has shape {tuple(qkv.shape)}; expected (tokens, 3, heads, head_dim): the packed "
            f"query, key and value rows. Pack a padded batch with ctxfast.packing first."
        )
    checks.packed(_OP, "qkv", qkv, args["cu_seqlens"], args["max_seqlen"])
    if args["bias"] is not None:
        checks.shape(
            _OP,
            "bias",
            checks.tensor(_OP, "bias", args["bias"]),
            (3, qkv.shape[2], qkv.shape[3]),
            "(3, heads, head_dim)",
        )
        checks.same(_OP, "qkv", qkv, [("bias", args["bias"])])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "qkv", args["qkv"].shape[0])


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="softmax(Q K^T / sqrt(D)) V inside each packed sequence",
        cite="Vaswani et al. 2017, equation 1; Devlin et al. 2019 (bidirectional)",
        reference=reference,
        check=_check,
        check_values=_check_offsets,
        autocast="lower",
        impls=(
            registry.Impl(
                "cpu",
                "cpu",
                note="compiled kernels over packed rows, split over threads by cost",
            ),
            registry.Impl("triton", "cuda", note="one pass over packed rows, with backward; not yet run on a GPU"),
        ),
    )
)
