# SPDX-License-Identifier: Apache-2.0
"""How the layers of an encoder run: in a CUDA graph, in one call, op by op, or recomputed in the backward pass
(activation checkpointing). All of that is decided here.

Modules, both ctxfast's and swapped ones of other packages, describe what their layers compute with (``LayerWeights``).
A layer is called as a module where no such description holds: a part of it was replaced, is observed by hooks, or has
been given an ``impl`` of its own.

One call (``functional.transformer_layers``) avoids the overhead of the layers' ops. On a CPU it counts for short texts;
there layers run op by op with gradients (one call would recompute the layers in the backward pass), with dropout and
under autocast. On a GPU it always counts, in training most of all. Layers run op by op under torch.compile, and where
an implementation of a layer's op was requested by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._core import calls, choice, registry
from ..ops.attention import same_sequences
from . import tools
from .all_rows import AllRows
from .graphs import PackedGraphs

_OPS = ("add_layer_norm", "add_norm", "attention", "feed_forward", "linear_act")

Layer = Callable[..., Tensor]  # (x, cu_seqlens, max_seqlen, rows, or with a relative bias that too) -> x
Weight = Callable[[Tensor], Tensor] | Tensor
Tensors = tuple[
    Weight, "Tensor | None", Weight, "Tensor | None", "Tensor | None", "Tensor | None",
    Weight, "Tensor | None", Weight, "Tensor | None", "Tensor | None", "Tensor | None",
]  # fmt: skip


class LayerOptions(NamedTuple):
    """What a layer computes with besides its weights. All but the first six are as in BERT's layer by default, and what
    differs from that runs op by op.

    Attributes:
        num_heads, activation, weight_dtype: as in ``functional.transformer_layers``.
        eps: of both norms.
        dropout_p: probabilities of dropping an attention weight, and an element before each residual.
        by_ops: whether one call cannot compute it because a module replaces a product (an adapter, say).
        is_pre_norm: whether norms stand before attention and feed-forward block, and what these give is added to the
            residual stream as it is; else each norm stands after such a sum.
        norm: of both norms, as in ``functional.add_norm``.
        is_gated: whether the feed-forward block is, as in ``functional.feed_forward``.
        num_kv_heads, window, softmax_scale: as in ``functional.attention``.
    """

    num_heads: int
    activation: str
    eps: tuple[float, float]
    weight_dtype: torch.dtype | None = None
    dropout_p: tuple[float, float, float] = (0.0, 0.0, 0.0)
    by_ops: bool = False
    is_pre_norm: bool = False
    norm: str = "layer"
    is_gated: bool = False
    num_kv_heads: int | None = None
    window: int | None = None
    softmax_scale: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has nothing that BERT's layers have not."""
        return self[6:] == _PLAIN


_PLAIN = LayerOptions(1, "none", (1.0, 1.0))[6:]


class LayerWeights(NamedTuple):
    """What a layer computes with.

    Attributes:
        tensors: weight and bias of qkv, project, the attention's norm, widen, narrow and the feed-forward block's norm,
            as ``functional.transformer_layers`` takes them. A module that replaces a product stands in place of its
            weight, and adds its own bias. A pre-norm layer may have no norm before its attention (None).
        options: the rest.
        rotary: as in ``functional.attention``.
    """

    tensors: Tensors
    options: LayerOptions
    rotary: Tensor | None = None


def encode(
    function: Callable[[Sequence[Tensor | None], Tensor, int], Sequence[Tensor]],
    module: nn.Module,
    graphs: PackedGraphs | None,
    tokens: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    max_seqlen: int,
    **options: Any,
) -> Sequence[Tensor]:
    """``function(tokens, cu_seqlens, max_seqlen)``, which runs ``module``, in a CUDA graph where possible.

    ``options`` are those of ``PackedGraphs.run``; ``graphs`` None: without.
    """
    lead = tokens[0]
    if graphs is not None and lead is not None and graphs.can_run(lead):
        return graphs.run(function, module, tokens, cu_seqlens, max_seqlen, **options)
    return function(tokens, cu_seqlens, max_seqlen)


def run(
    layers: Iterable[LayerWeights | Layer],
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    all_layers: bool = False,
    rows: AllRows | None = None,
    recompute: Callable[..., Tensor] | None = None,
    relative_bias: Tensor | None = None,
) -> list[Tensor]:
    """Run layers in order, (T, N) -> the input and the output of every layer, or the last output alone, (T, N) each.

    Args:
        layers: the weights of each, or the layer itself where it has to be called; consumed lazily.
        x, cu_seqlens, max_seqlen: packed tokens.
        all_layers: whether to return the output of every layer.
        rows: given if x holds every row of a padded batch.
        recompute: ``recompute(layer, x, cu_seqlens, max_seqlen, rows)`` calls a layer, and calls it again in the
            backward pass instead of keeping its activations.
        relative_bias: (H, 2R - 1), of every layer's attention (see ``functional.attention``), not with ``rows``, whose
            places are not a text's; layers and ``recompute`` are given it after ``rows``.
    """
    if rows is not None and relative_bias is not None:
        raise ValueError("ctxfast.nn.encoder: rows and relative_bias are both given; expected one of them.")
    cu_seqlens = same_sequences.for_one_pass(cu_seqlens)
    if rows is not None or recompute is not None or not _is_open(x):
        states = _one_by_one(layers, x, cu_seqlens, max_seqlen, all_layers, rows, recompute, relative_bias)
        return [x, *states] if all_layers else states
    states = [x]
    for options, group in _groups(layers):
        found = None
        if options is not None:
            found = one_call(group, options, states[-1], cu_seqlens, max_seqlen, all_layers, relative_bias)
        if found is None:
            found = _one_by_one(group, states[-1], cu_seqlens, max_seqlen, all_layers, relative_bias=relative_bias)
        states = [*states, *found] if all_layers else found
    return list(states)


def _is_open(x: Tensor) -> bool:
    """Whether one call may compute layers over these tokens, if the layers themselves allow it."""
    requested = dict(choice.requested())
    name = requested.get("transformer_layers", requested.get("*"))
    if any(op in requested for op in _OPS) or name not in (None, "cpu", "triton"):
        return False
    if name == "triton" or not x.is_cpu:
        return not torch.compiler.is_compiling()
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _groups(
    layers: Iterable[LayerWeights | Layer],
) -> list[tuple[LayerOptions | None, list[Any]]]:
    """Runs of adjacent layers that one call can compute (all ``LayerWeights``), with their options; None in place of
    the options for layers that it cannot."""
    groups: list[tuple[LayerOptions | None, list[Any]]] = []
    last: tuple[LayerOptions, int] | None = None
    for layer in layers:
        kind = _one_calls_kind(layer) if isinstance(layer, LayerWeights) else None
        if groups and last == kind:
            groups[-1][1].append(layer)
        else:
            groups.append((None if kind is None else kind[0], [layer]))
        last = kind
    return groups


def _one_calls_kind(layer: LayerWeights) -> tuple[LayerOptions, int] | None:
    """What layers must share to be computed by one call: options and the feed-forward block's width; None for a layer
    that cannot be."""
    options = layer.options
    if options.by_ops or options.eps[0] != options.eps[1] or not options.is_plain:
        return None
    if layer.rotary is not None:
        return None
    if layer.tensors[5] is None or layer.tensors[11] is None:  # LayerNorms without bias
        return None
    qkv: Any = layer.tensors[0]  # a tensor, and the next too: no module replaces a product
    widen: Any = layer.tensors[6]
    # With pruned heads the attention is narrower than the hidden size.
    return (options, widen.size(0)) if qkv.size(0) == 3 * qkv.size(1) else None


def one_call(
    layers: Sequence[LayerWeights],
    options: LayerOptions,
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    all_layers: bool,
    relative_bias: Tensor | None = None,
) -> Sequence[Tensor] | None:
    """Outputs of layers with these options, or of the last alone; None where only the reference takes such a call."""
    spec = registry.OPS["transformer_layers"]
    args = spec.arguments(
        x, cu_seqlens, max_seqlen, [tensor for layer in layers for tensor in layer.tensors],
        num_heads=options.num_heads, activation=options.activation, eps=options.eps[0],
        weight_dtype=options.weight_dtype, all_layers=all_layers, dropout_p=options.dropout_p,
        relative_bias=relative_bias,
    )  # fmt: skip
    function, args = calls.prepared(spec, args)
    if function is spec.reference:
        return None
    states = function(**args)
    return states if all_layers else (states,)


def _one_by_one(
    layers: Iterable[LayerWeights | Layer],
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    all_layers: bool,
    rows: AllRows | None = None,
    recompute: Callable[..., Tensor] | None = None,
    relative_bias: Tensor | None = None,
) -> list[Tensor]:
    """The output of each layer, or of the last alone."""
    states: list[Tensor] = []
    rest: _Rest | None = None
    places = () if relative_bias is None else (relative_bias,)
    for layer in layers:
        own = layer if isinstance(layer, LayerWeights) and layer.options.is_pre_norm and recompute is None else None
        normed = x
        if own is not None:
            x, normed = _entered(own, x, rest)
        elif rest is not None:
            x = _added(x, rest)
        if rest is not None:
            rest = None
            if all_layers:
                states.append(x)
        if own is not None:
            x, rest = _pre_norm(own, x, normed, cu_seqlens, max_seqlen, rows, relative_bias)
            continue
        step: Layer = partial(by_ops, layer) if isinstance(layer, LayerWeights) else layer
        if recompute is not None:
            step = partial(recompute, choice.with_choice(step))
        x = step(x, cu_seqlens, max_seqlen, rows, *places)
        if all_layers:
            states.append(x)
    if rest is not None:
        x = _added(x, rest)
        states.append(x)
    return states if all_layers else [x]


def by_ops(
    layer: LayerWeights,
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: AllRows | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """A layer as calls of its ops, (T, N) -> (T, N). With ``rows``, x holds every row of a padded batch."""
    if layer.options.is_pre_norm:
        return _added(*_pre_norm(layer, *_entered(layer, x, None), cu_seqlens, max_seqlen, rows, relative_bias))
    (
        _, _, project, project_bias, scale, shift, _, _, _, narrow_bias, last_scale, last_shift,
    ) = layer.tensors  # fmt: skip
    assert scale is not None and last_scale is not None  # of a layer that is not pre-norm
    options, (eps, last_eps), (_, dropout_p, last_p) = layer.options, layer.options.eps, layer.options.dropout_p
    context = _attended(layer, x, cu_seqlens, max_seqlen, rows, relative_bias)
    projected = _product(context, project, weight_dtype=options.weight_dtype)
    x = _normed_sum(projected, x, scale, shift, project_bias, options.norm, eps, dropout_p)
    narrowed = _feed_forward(layer, x)
    return _normed_sum(narrowed, x, last_scale, last_shift, narrow_bias, options.norm, last_eps, last_p)


class _Rest(NamedTuple):
    """What a pre-norm layer adds to the residual stream at its end: the next layer's norm is taken in the same pass."""

    x: Tensor
    bias: Tensor | None
    dropout_p: float


def _added(x: Tensor, rest: _Rest) -> Tensor:
    """The residual stream after a layer."""
    given = rest.x if rest.bias is None else rest.x + rest.bias
    return x + F.dropout(given, rest.dropout_p, training=rest.dropout_p > 0)


def _entered(layer: LayerWeights, x: Tensor, rest: _Rest | None) -> tuple[Tensor, Tensor]:
    """The residual stream before a pre-norm layer, and what its attention is given."""
    scale, shift = layer.tensors[4:6]
    if scale is None:  # there is no norm before its attention
        x = x if rest is None else _added(x, rest)
        return x, x
    options: dict[str, Any] = dict(norm=layer.options.norm, eps=layer.options.eps[0])
    if rest is None:
        return x, functional.add_norm(x, None, scale, shift, **options)[1]
    return functional.add_norm(rest.x, x, scale, shift, rest.bias, dropout_p=rest.dropout_p, **options)


def _pre_norm(
    layer: LayerWeights, x: Tensor, normed: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: AllRows | None,
    relative_bias: Tensor | None,
) -> tuple[Tensor, _Rest]:  # fmt: skip
    """The residual stream after a pre-norm layer's attention, (T, N), and what is added to it after that."""
    _, _, project, project_bias, *_, narrow_bias, scale, shift = layer.tensors
    assert scale is not None  # only the norm before the attention may be missing
    options, (_, dropout_p, last_p) = layer.options, layer.options.dropout_p
    context = _attended(layer, normed, cu_seqlens, max_seqlen, rows, relative_bias)
    projected = _product(context, project, weight_dtype=options.weight_dtype)
    x, normed = functional.add_norm(
        projected, x, scale, shift, project_bias, norm=options.norm, eps=options.eps[1], dropout_p=dropout_p
    )
    return x, _Rest(_feed_forward(layer, normed), narrow_bias, last_p)


def _normed_sum(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor | None, x_bias: Tensor | None, norm: str, eps: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """The norm of ``residual + dropout(x + x_bias)``."""
    if norm == "layer" and shift is not None:
        return functional.add_layer_norm(x, residual, scale, shift, x_bias, eps=eps, dropout_p=dropout_p)
    return functional.add_norm(x, residual, scale, shift, x_bias, norm=norm, eps=eps, dropout_p=dropout_p)[1]


def _attended(
    layer: LayerWeights, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: AllRows | None,
    relative_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The layer's attention, (T, N) -> (T, N)."""
    qkv, qkv_bias, *_ = layer.tensors
    options = layer.options
    return self_attention(
        x, qkv, qkv_bias, options.num_heads, cu_seqlens, max_seqlen, rows, dropout_p=options.dropout_p[0],
        weight_dtype=options.weight_dtype, relative_bias=relative_bias, window=options.window, rotary=layer.rotary,
        num_kv_heads=options.num_kv_heads, softmax_scale=options.softmax_scale,
    )  # fmt: skip


def self_attention(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: AllRows | None,
    *,
    dropout_p: float,
    weight_dtype: torch.dtype | None,
    impl: str | None = None,
    **places: Any,
) -> Tensor:
    """One product for query, key and value, then attention, (T, N) -> (T, N), heads side by side. ``impl``: of
    attention; ``places``: what else it takes, which is not with ``rows``."""
    places = {name: each for name, each in places.items() if each is not None}
    kv_heads = places.get("num_kv_heads")
    heads = (3, num_heads, -1) if kv_heads is None else (num_heads + 2 * kv_heads, -1)
    # The product's epilogue adds the bias for nothing, and rounds once.
    qkv = _product(x, weight, bias, weight_dtype=weight_dtype).unflatten(-1, heads)
    if rows is not None:
        if places:
            raise ValueError(
                f"attention over every row of a padded batch takes no {', '.join(places)}: pack the batch."
            )
        return rows.attend(qkv, blank_is_zero=True, dropout_p=dropout_p, impl=impl).flatten(1)
    return functional.attention(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, impl=impl, **places).flatten(1)


def _feed_forward(layer: LayerWeights, x: Tensor) -> Tensor:
    """(T, N) -> (T, N), without the second bias."""
    widen, bias, narrow = layer.tensors[6:9]
    options = layer.options
    activation, dtype = options.activation, options.weight_dtype
    if isinstance(widen, Tensor) and isinstance(narrow, Tensor):
        more: dict[str, Any] = dict(gated=True) if options.is_gated else {}
        return functional.feed_forward(x, widen, bias, narrow, activation=activation, weight_dtype=dtype, **more)
    if options.is_gated:
        wide = tools.gated(_product(x, widen, bias, weight_dtype=dtype), activation)
    else:
        wide = _product(x, widen, bias, activation, weight_dtype=dtype)
    return _product(wide, narrow, weight_dtype=dtype)


def _product(x: Tensor, weight: Weight, bias: Tensor | None = None, activation: str = "none", **options: Any) -> Tensor:
    if isinstance(weight, Tensor):
        return functional.linear_act(x, weight, bias, activation=activation, **options)
    return tools.activated(weight(x), activation)
