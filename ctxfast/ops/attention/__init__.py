# SPDX-License-Identifier: Apache-2.0
"""``attention``: bidirectional attention inside each of several packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from .reference import attention as reference

_OP = "attention"


def _check_heads(args: Mapping[str, Any]) -> tuple[int, int]:
    """(H, D), of a qkv that holds such heads."""
    qkv, kv_heads = checks.floating(_OP, "qkv", args["qkv"]), args["num_kv_heads"]
    if kv_heads is None:
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(
                f"ctxfast.attention: qkv has shape {tuple(qkv.shape)}; expected (tokens, 3, heads, head_dim): the "
                f"packed query, key and value rows. Pack a padded batch with ctxfast.packing first."
            )
        return qkv.shape[2], qkv.shape[3]
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1:
        raise ValueError(f"ctxfast.attention: num_kv_heads is {kv_heads!r}; expected an int above 0, or None.")
    if qkv.dim() != 3 or qkv.shape[1] <= 2 * kv_heads or qkv.shape[1] % kv_heads:
        raise ValueError(
            f"ctxfast.attention: qkv has shape {tuple(qkv.shape)}; expected (tokens, heads + 2*num_kv_heads, head_dim) "
            f"with num_kv_heads = {kv_heads} and a multiple of it as heads: the packed query, key and value rows."
        )
    return qkv.shape[1] - 2 * kv_heads, qkv.shape[2]


def _check_positions(args: Mapping[str, Any], heads: int, head_dim: int) -> None:
    """Of what depends on positions: ``relative_bias``, ``window`` and ``rotary``."""
    qkv, relative_bias, window, rotary = (args[name] for name in ("qkv", "relative_bias", "window", "rotary"))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    for name, table in (("relative_bias", relative_bias), ("rotary", rotary)):
        if table is None:
            continue
        checks.same(_OP, "qkv", qkv, [(name, checks.floating(_OP, name, table))], dtype=False)
        if table.dtype is not wide:
            raise TypeError(
                f"ctxfast.attention: {name} has dtype {table.dtype}; expected {wide}, whatever half precision qkv has."
            )
    if relative_bias is not None:
        checks.shape(_OP, "relative_bias", relative_bias, (heads, None), "(heads, 2*reach - 1)")
        if relative_bias.shape[1] % 2 == 0:
            raise ValueError(
                f"ctxfast.attention: relative_bias has {relative_bias.shape[1]} columns; expected an odd number, "
                f"2*reach - 1: one for each distance from -(reach - 1) to reach - 1."
            )
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
        raise ValueError(
            f"ctxfast.attention: window is {window!r}; expected an int of 0 or more, or None to attend to all keys."
        )
    if rotary is None:
        return
    checks.shape(_OP, "rotary", rotary, (None, 2, None), "(positions, 2, rotated/2)")
    if not 0 < 2 * rotary.shape[2] <= head_dim:
        raise ValueError(
            f"ctxfast.attention: rotary has shape {tuple(rotary.shape)}, cosines and sines for {2 * rotary.shape[2]} "
            f"dimensions of a head; expected 2 to head_dim = {head_dim} of them."
        )
    if rotary.shape[0] < args["max_seqlen"]:
        raise ValueError(
            f"ctxfast.attention: rotary has {rotary.shape[0]} positions; expected at least max_seqlen = "
            f"{args['max_seqlen']}. Make a longer table, or split the sequences."
        )
    if torch.is_grad_enabled() and rotary.requires_grad:
        raise ValueError(
            "ctxfast.attention: rotary requires a gradient; expected a table that has none. Pass rotary.detach()."
        )


def _check(args: Mapping[str, Any]) -> None:
    qkv, kv_heads = args["qkv"], args["num_kv_heads"]
    heads, head_dim = _check_heads(args)
    checks.packed(_OP, "qkv", qkv, args["cu_seqlens"], args["max_seqlen"])
    if args["bias"] is not None:
        legend = "(3, heads, head_dim)" if kv_heads is None else "(heads + 2*num_kv_heads, head_dim)"
        checks.shape(_OP, "bias", args["bias"], qkv.shape[1:], legend)
        checks.same(_OP, "qkv", qkv, [("bias", args["bias"])])
    checks.probability(_OP, "dropout_p", args["dropout_p"])
    _check_positions(args, heads, head_dim)


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "qkv", args["qkv"].shape[0])


def _autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Rows in autocast's dtype; tables by position stay float32, as scores and angles are."""
    lowered = {
        name: args[name].to(dtype)
        for name in ("qkv", "bias")
        if args[name] is not None and args[name].dtype != torch.float64
    }
    tables = {
        name: args[name].float()
        for name in ("relative_bias", "rotary")
        if args[name] is not None and args["qkv"].dtype != torch.float64
    }
    return {**args, **lowered, **tables}


@calls.op(
    reference=reference,
    check=_check,
    check_values=_check_offsets,
    autocast=_autocast,
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
    relative_bias: Tensor | None = None,
    window: int | None = None,
    rotary: Tensor | None = None,
    num_kv_heads: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Bidirectional attention inside each of S packed sequences: ``softmax(scale Q K^T + relative bias) V``.

    Args:
        qkv: (T, 3, H, D), query, key and value of every token, sequences one after another; with ``num_kv_heads`` = G
            (T, H + 2G, D): H heads of the query, then G of the key, then G of the value.
        cu_seqlens: (S + 1,) int32 or int64, row where each sequence starts; the last entry is T.
        max_seqlen: length of the longest sequence, or more.
        bias: (3, H, D), added to every row of ``qkv`` (the bias of the QKV projection); None for none. With
            ``num_kv_heads`` (H + 2G, D).
        softmax_scale: factor on the scores; None for 1/sqrt(D).
        dropout_p: probability of dropping an attention weight in this call (0 at inference).
        relative_bias: (H, 2R - 1) float32, added to the scaled score of the query at place i of its sequence and the
            key at place j: column ``j - i + R - 1``; keys further away than R - 1 take the first or the last column.
            It has a gradient: a caller who looks its columns up in an embedding of buckets (MPNet, T5) trains that.
        window: a query attends to keys at most so many places before or after its own, ``|i - j| <= window``; None for
            all keys. As Hugging Face's ``config.sliding_window`` of encoders: ModernBERT's is half of its
            ``local_attention``. (The ``sliding_window`` of ModernBERT's attention modules is one more.)
        rotary: (P, 2, R/2) float32, cosines and sines of each place's angles, P at least ``max_seqlen``. The first R
            dimensions of each query and key (after ``bias``) are rotated by their token's place in its sequence,
            dimension d together with d + R/2 ("rotate half"). A model whose pairs are neighbours permutes the rows of
            its query's and key's weights first. The table has no gradient.
        num_kv_heads: G, heads of keys and values where they are fewer than those of queries, a divisor of H; query
            head h attends with head ``h // (H/G)`` of them (grouped-query attention).
        impl: name of an implementation; None chooses.

    Returns:
        (T, H, D), in the dtype of ``qkv``.

    Numerics: softmax in float32 (float64 for float64, whose tables are float64 too); deterministic without dropout, and
    with it for a given seed.
    Reference: Vaswani et al. 2017, equation 1; Devlin et al. 2019; Raffel et al. 2020, section 2.1 (relative bias);
    Beltagy et al. 2020 (window); Su et al. 2021 (rotary); Ainslie et al. 2023 (grouped queries).
    """
    return calls.given(
        impl,
        qkv=qkv,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        bias=bias,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        relative_bias=relative_bias,
        window=window,
        rotary=rotary,
        num_kv_heads=num_kv_heads,
    )
