# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm``: BERT's input embeddings, summed and normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..._core import calls, checks, registry
from .reference import embed_layer_norm as reference

_OP = "embed_layer_norm"
_PAIRS = (
    ("input_ids", "word_embeddings"),
    ("position_ids", "position_embeddings"),
    ("token_type_ids", "token_type_embeddings"),
    ("task_type_ids", "task_type_embeddings"),
)


def _check(args: Mapping[str, Any]) -> None:
    table = checks.floating(_OP, "word_embeddings", args["word_embeddings"])
    if table.dim() != 2:
        raise ValueError(
            f"ctxfast.embed_layer_norm: word_embeddings has shape {tuple(table.shape)}; "
            f"expected (vocab_size, hidden_size)."
        )
    ids = checks.tensor(_OP, "input_ids", args["input_ids"])
    if ids.dim() != 1:
        raise ValueError(
            f"ctxfast.embed_layer_norm: input_ids has shape {tuple(ids.shape)}; expected (tokens,), packed."
        )
    if (args["task_type_ids"] is None) != (args["task_type_embeddings"] is None):
        missing = "task_type_ids" if args["task_type_ids"] is None else "task_type_embeddings"
        raise ValueError(
            f"ctxfast.embed_layer_norm: {missing} is None; "
            f"expected both task_type_ids and task_type_embeddings, or neither."
        )
    for id_name, table_name in _PAIRS:
        if args[id_name] is None and id_name == "task_type_ids":
            continue
        index = checks.integer(_OP, id_name, args[id_name])
        checks.shape(_OP, id_name, index, tuple(ids.shape), "(tokens,)")
        rows = checks.shape(_OP, table_name, args[table_name], (None, table.shape[1]), "(rows, hidden_size)")
        checks.same(_OP, "word_embeddings", table, [(id_name, index)], dtype=False)
        checks.same(_OP, "word_embeddings", table, [(table_name, rows)])
    for name in ("weight", "bias"):
        checks.shape(_OP, name, args[name], (table.shape[1],), "(hidden_size,)")
        checks.same(_OP, "word_embeddings", table, [(name, args[name])])
    checks.positive(_OP, "eps", args["eps"])
    checks.probability(_OP, "dropout_p", args["dropout_p"])


def _check_ids(args: Mapping[str, Any]) -> None:
    for id_name, table_name in _PAIRS:
        if args[id_name] is not None:
            last, hint = args[table_name].shape[0] - 1, f"These are the rows of {table_name}."
            checks.in_range(_OP, id_name, args[id_name], 0, last, hint)


@calls.op(
    reference=reference,
    check=_check,
    check_values=_check_ids,
    autocast="keep",
    impls=(
        registry.Impl(
            "cpu", "cpu", note="gather and LayerNorm in one compiled pass; torch's with a gradient", proven="cpu"
        ),
        registry.Impl(
            "triton", "cuda", note="gather, LayerNorm and dropout in one pass, with backward", proven="interpreter"
        ),
    ),
)
def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_type_ids: Tensor | None = None,
    task_type_embeddings: Tensor | None = None,
    *,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """``dropout(LayerNorm(word + position + type [+ task]))`` for packed tokens.

    Args:
        input_ids, position_ids, token_type_ids: (T,) int64 or int32, rows of the three tables.
        word_embeddings, position_embeddings, token_type_embeddings: (V, N) each.
        weight, bias: (N,), scale and shift of the LayerNorm.
        task_type_ids, task_type_embeddings: (T,) and (V, N), ERNIE's task embedding; both or neither.
        eps: added to the variance.
        padding_idx, position_padding_idx: rows of the word and position table that get no gradient; None for none.
        dropout_p: probability of dropping an element in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        (T, N), in the dtype of the tables.

    Raises:
        ValueError: also for ids outside their table; on a GPU ids are not read, since that would wait for the device.

    Reference: Devlin et al. 2019, figure 2; Sun et al. 2020 (task embedding).
    """
    return calls.given(
        impl,
        input_ids=input_ids,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        word_embeddings=word_embeddings,
        position_embeddings=position_embeddings,
        token_type_embeddings=token_type_embeddings,
        weight=weight,
        bias=bias,
        task_type_ids=task_type_ids,
        task_type_embeddings=task_type_embeddings,
        eps=eps,
        padding_idx=padding_idx,
        position_padding_idx=position_padding_idx,
        dropout_p=dropout_p,
    )
