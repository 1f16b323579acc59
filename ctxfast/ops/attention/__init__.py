# SPDX-License-Identifier: Apache-2.0
"""``attention``: bidirectional attention inside each of several packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..._core import calls, checks, registry
from .reference import attention as reference

_OP = "attention"


def _check(args: Mapping[str, Any]) -> None:
    qkv = checks.floating(_OP, "qkv", args["qkv"])
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"ctxfast.attention: qkv has shape {tuple(qkv.shape)}; expected (tokens, 3, heads, head_dim): the packed "
            f"query, key and value rows. Pack a padded batch with ctxfast.packing first."
        )
    checks.packed(_OP, "qkv", qkv, args["cu_seqlens"], args["max_seqlen"])
    if args["bias"] is not None:
        checks.shape(_OP, "bias", args["bias"], (3, qkv.shape[2], qkv.shape[3]), "(3, heads, head_dim)")
        checks.same(_OP, "qkv", qkv, [("bias", args["bias"])])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "qkv", args["qkv"].shape[0])


@calls.op(
    reference=reference,
    check=_check,
    check_values=_check_offsets,
    autocast="lower",
    impls=(
        registry.Impl("cpu", "cpu", note="compiled kernels over packed rows, split over threads by cost", proven="cpu"),
        registry.Impl("triton", "cuda", note="one pass over packed rows, with backward", proven="interpreter"),
    ),
)
def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Bidirectional attention inside each of S packed sequences: ``softmax(scale Q K^T) V``.

    Args:
        qkv: (T, 3, H, D), query, key and value of every token, sequences one after another.
        cu_seqlens: (S + 1,) int32 or int64, row where each sequence starts; the last entry is T.
        max_seqlen: length of the longest sequence, or more.
        bias: (3, H, D), added to every row of ``qkv`` (the bias of the QKV projection); None for none.
        softmax_scale: factor on the scores; None for 1/sqrt(D).
        dropout_p: probability of dropping an attention weight in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        (T, H, D), in the dtype of ``qkv``.

    Numerics: softmax in float32 (float64 for float64); deterministic without dropout, and with it for a given seed.
    Reference: Vaswani et al. 2017, equation 1; Devlin et al. 2019.
    """
    return calls.given(
        impl,
        qkv=qkv,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        bias=bias,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
    )
