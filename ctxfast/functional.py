# SPDX-License-Identifier: Apache-2.0
"""One public function per op: gather arguments -> autocast rule -> check -> choose an implementation -> run.

Shape letters: B batch, T time steps (``lstm``) or packed tokens (all other ops), S sequences, I input size,
H hidden size (``lstm``) or heads (``attention``), P projected size, D head size, N hidden size of a transformer,
K layers, R directions (1 or 2), V rows of a table, W words, C characters of a word. Batch comes first everywhere.

Every function takes ``impl=``: the name of an implementation, or None for the fastest that accepts the call;
``explain`` says which those are, and why the others do not. The reference, an op's definition in plain PyTorch, takes
any device and floating dtype.
Raises common to all: TypeError for wrong dtypes and kinds, ValueError for wrong shapes, devices and values,
RuntimeError when an implementation asked for by name cannot run the call. Checks run before any kernel.
"""

from __future__ import annotations

from typing import Any

from ._core import calls, choice, registry
from .ops.add_layer_norm import add_layer_norm
from .ops.add_norm import add_norm
from .ops.attention import attention
from .ops.char_cnn import char_cnn
from .ops.embed_layer_norm import embed_layer_norm
from .ops.feed_forward import feed_forward
from .ops.linear_act import linear_act
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.lstm import lstm
from .ops.scalar_mix import scalar_mix
from .ops.transformer_layers import transformer_layers

__all__ = [
    "add_layer_norm",
    "add_norm",
    "attention",
    "char_cnn",
    "embed_layer_norm",
    "explain",
    "feed_forward",
    "linear_act",
    "linear_cross_entropy",
    "lstm",
    "scalar_mix",
    "transformer_layers",
]

registry.load_implementations()
choice.read_environment()


def explain(op: str, *args: Any, **kwargs: Any) -> calls.Explanation:
    """Which implementation of ``op`` would run this call, and why the others would not; nothing is run.

    Args:
        op: name of a function of this module, e.g. "lstm".
        args, kwargs: the arguments of that function.

    Returns:
        An Explanation: prints as one row per implementation; ``.used`` is the name of the one that would run.

    Example:
        >>> print(ctxfast.explain("attention", qkv, cu_seqlens, 128))
    """
    if op not in registry.OPS:
        raise ValueError(f"ctxfast.explain: op is {op!r}; expected one of {', '.join(sorted(registry.OPS))}.")
    return calls.explain(registry.OPS[op], *args, **kwargs)
