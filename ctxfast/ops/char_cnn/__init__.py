# SPDX-License-Identifier: Apache-2.0
"""``char_cnn``: characters of words to vectors: embedding, convolutions, maximum over positions, activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..._core import calls, checks, registry
from .reference import char_cnn as reference

_OP = "char_cnn"


def _check(args: Mapping[str, Any]) -> None:
    char_ids = checks.integer(_OP, "char_ids", args["char_ids"])
    table = checks.floating(_OP, "char_embeddings", args["char_embeddings"])
    weights, biases = args["conv_weights"], args["conv_biases"]
    checks.shape(_OP, "char_ids", char_ids, (None, None), "(words, characters)")
    checks.shape(_OP, "char_embeddings", table, (None, None), "(character vocabulary, embedding size)")
    checks.same(_OP, "char_embeddings", table, [("char_ids", char_ids)], dtype=False)
    checks.in_range(_OP, "char_ids", char_ids, 0, table.shape[0] - 1, "These are the rows of char_embeddings.")
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            f"ctxfast.char_cnn: conv_weights holds {len(weights)} tensors and conv_biases {len(biases)}; "
            f"expected one of each per filter width."
        )
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        name = f"conv_weights[{i}]"
        checks.shape(_OP, name, weight, (None, table.shape[1], None), "(filters, embedding size, width)")
        if weight.shape[2] > char_ids.shape[1]:
            raise ValueError(
                f"ctxfast.char_cnn: {name} has width {weight.shape[2]}; expected at most {char_ids.shape[1]}, "
                f"the characters of a word in char_ids."
            )
        checks.shape(_OP, f"conv_biases[{i}]", bias, (weight.shape[0],), "(filters,)")
        checks.same(_OP, "char_embeddings", table, [(name, weight), (f"conv_biases[{i}]", bias)])
    checks.choice(_OP, "activation", args["activation"], ("relu", "tanh"))


@calls.op(
    reference=reference,
    check=_check,
    autocast="lower",
    impls=(
        registry.Impl(
            "cpu",
            "cpu",
            note="compiled: no value before the maximum in memory, padding windows computed once",
            proven="cpu",
        ),
        registry.Impl(
            "cuda", "cuda", note="gather to activation in one kernel, 16 bits on tensor cores", proven="emulator"
        ),
    ),
)
def char_cnn(
    char_ids: Tensor,
    char_embeddings: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    impl: str | None = None,
) -> Tensor:
    """Word vectors from characters: embedding, convolutions of several widths, maximum, activation.

    Args:
        char_ids: (W, C) int64 or int32, rows of ``char_embeddings``.
        char_embeddings: (V, D).
        conv_weights: one (n_i, D, w_i) per filter width; windows lie wholly inside the word, stride 1.
        conv_biases: one (n_i,) per filter width.
        activation: "relu" or "tanh", after the maximum.
        impl: name of an implementation; None chooses.

    Returns:
        (W, sum of n_i), filters in the order given.

    Numerics: compiled kernels sum in float32. Where windows of different characters tie for the maximum, the first
        takes the gradient (the reference shares it out).
    Reference: Kim et al. 2016; Peters et al. 2018; AllenNLP's _ElmoCharacterEncoder.
    """
    return calls.given(
        impl,
        char_ids=char_ids,
        char_embeddings=char_embeddings,
        conv_weights=tuple(conv_weights),
        conv_biases=tuple(conv_biases),
        activation=activation,
    )
