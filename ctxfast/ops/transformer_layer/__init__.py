# SPDX-License-Identifier: Apache-2.0
"""``transformer_layer``: a whole post-LN encoder layer over packed sequences in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..._core import checks, registry
from .reference import transformer_layer as reference

_OP = "transformer_layer"
_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")


def _check_pair(args: Mapping[str, Any], name: str, shape: tuple[Any, ...], meaning: str, *, is_norm: bool) -> None:
    pair, x = args[name], args["x"]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"ctxfast.{_OP}: {name} is {_told(pair)}; expected (weight, bias).")
    weight, bias = pair
    checks.shape(_OP, f"{name}[0]", checks.tensor(_OP, f"{name}[0]", weight), shape, meaning)
    if bias is not None or is_norm:
        first = meaning.strip("()").partition(",")[0]
        checks.shape(_OP, f"{name}[1]", checks.tensor(_OP, f"{name}[1]", bias), (weight.shape[0],), f"({first},)")
    checks.same(_OP, "x", x, [(f"{name}[0]", weight), (f"{name}[1]", bias)])


def _told(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


def _check(args: Mapping[str, Any]) -> None:
    x, cu_seqlens, heads = checks.tensor(_OP, "x", args["x"]), args["cu_seqlens"], args["num_heads"]
    checks.floating(_OP, "x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"ctxfast.{_OP}: x has shape {tuple(x.shape)}; expected (tokens, hidden_size), packed. Pack a padded batch "
            f"with ctxfast.packing first."
        )
    checks.integer(_OP, "cu_seqlens", checks.tensor(_OP, "cu_seqlens", cu_seqlens))
    checks.shape(_OP, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
    checks.same(_OP, "x", x, [("cu_seqlens", cu_seqlens)], dtype=False)
    if not isinstance(args["max_seqlen"], (int, torch.SymInt)):
        raise TypeError(f"ctxfast.{_OP}: max_seqlen is a {type(args['max_seqlen']).__name__}; expected an int.")
    size = x.shape[1]
    if not isinstance(heads, int) or heads < 1 or size % heads:
        raise ValueError(f"ctxfast.{_OP}: num_heads is {heads}; expected a divisor of hidden_size = {size}.")
    _check_pair(args, "qkv", (3 * size, size), "(3*hidden_size, hidden_size)", is_norm=False)
    _check_pair(args, "project", (size, size), "(hidden_size, hidden_size)", is_norm=False)
    _check_pair(args, "attention_norm", (size,), "(hidden_size,)", is_norm=True)
    _check_pair(args, "widen", (None, size), "(intermediate_size, hidden_size)", is_norm=False)
    wide = args["widen"][0].shape[0]
    _check_pair(args, "narrow", (size, wide), "(hidden_size, intermediate_size)", is_norm=False)
    _check_pair(args, "output_norm", (size,), "(hidden_size,)", is_norm=True)
    checks.choice(_OP, "activation", args["activation"], _ACTIVATIONS)
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.int8))


def _check_offsets(args: Mapping[str, Any]) -> None:
    checks.offsets(_OP, args["cu_seqlens"], args["max_seqlen"], "x", args["x"].shape[0])


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="a post-LN encoder layer: attention and feed-forward block, residuals, LayerNorms",
        cite="Vaswani et al. 2017, section 3.1; Devlin et al. 2019",
        reference=reference,
        check=_check,
        check_values=_check_offsets,
        autocast="lower",
        # Roundings and sums of six products and two norms add up.
        ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
        impls=(registry.Impl("cpu", "cpu", note="one parallel region for the whole layer, weights packed"),),
    )
)
