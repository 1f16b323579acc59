# SPDX-License-Identifier: Apache-2.0
"""One post-LN encoder layer over packed tokens, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from operator import getitem
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from . import encoder, tools, watched
from .all_rows import AllRows
from .attention import SelfAttention
from .feed_forward import Intermediate, ProjectAddLayerNorm, feed_forward
from .layer_norm import AddLayerNorm


class AttentionBlock(tools.NotScriptable):
    """Self-attention, output projection, residual and LayerNorm: ``self.{query,key,value}``,
    ``output.{dense,LayerNorm}``."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.self = SelfAttention(hidden_size, num_heads, dropout=attention_dropout, **place)
        self.output = ProjectAddLayerNorm(hidden_size, hidden_size, eps=eps, dropout=dropout, **place)

    @tools.fx_leaf
    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: AllRows | None = None,
        relative_bias: Tensor | None = None,
    ) -> Tensor:
        """x (T, N) -> (T, N); the rest as in ``SelfAttention``."""
        places = () if relative_bias is None else (relative_bias,)
        return self.output(self.self(x, cu_seqlens, max_seqlen, rows, *places), x)


class TransformerLayer(tools.NotScriptable):
    """A layer of BERT's encoder: attention block, then feed-forward block, each ended by residual and LayerNorm.

    Args:
        hidden_size: N.
        num_heads: H, a divisor of N.
        intermediate_size: width of the feed-forward block.
        activation: an activation of ``ctxfast.linear_act``.
        eps: of both LayerNorms.
        dropout: before both residuals, in training.
        attention_dropout: of the attention weights, in training.

    Implementations are chosen per call; ``with ctxfast.use_impl(...)`` or the ``impl`` attribute of
    an inner module (``layer.attention.self.impl = "reference"``) asks for one.

    Parameters: ``attention.self.{query,key,value}``, ``attention.output.{dense,LayerNorm}``,
    ``intermediate.dense``, ``output.{dense,LayerNorm}``.
    Reference: Devlin et al. 2019; names as in Hugging Face's BertLayer.
    """

    ops = ("transformer_layers", "attention", "linear_act", "feed_forward", "add_layer_norm")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.attention = AttentionBlock(
            hidden_size,
            num_heads,
            eps=eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            **place,
        )
        self.intermediate = Intermediate(hidden_size, intermediate_size, activation, **place)
        self.output = ProjectAddLayerNorm(intermediate_size, hidden_size, eps=eps, dropout=dropout, **place)

    @tools.fx_leaf
    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: AllRows | None = None,
        relative_bias: Tensor | None = None,
    ) -> Tensor:
        """x (T, N) packed tokens, cu_seqlens (S + 1,) int32, max_seqlen (the longest sequence, or more) -> (T, N). With
        ``rows``, x holds every row of a padded batch. ``relative_bias`` as in ``functional.attention``."""
        weights = None if watched.is_all_watched() else self.weights()
        if weights is not None:
            return encoder.run([weights], x, cu_seqlens, max_seqlen, rows=rows, relative_bias=relative_bias)[0]
        places = () if relative_bias is None else (relative_bias,)
        x = self.attention(x, cu_seqlens, max_seqlen, rows, *places)
        return feed_forward(self.intermediate, self.output, x)

    def parts(self) -> Parts | None:
        """The modules inside, in the order of ``_KINDS``; None if one was replaced or is observed by hooks."""
        # Through ``_modules``: attribute access takes ten times as long.
        try:
            modules: dict[str, Any] = self._modules
            attention, widen, narrow = modules["attention"], modules["intermediate"], modules["output"]
            own, project = attention._modules["self"], attention._modules["output"]
            found = (
                own, project, project._modules["dense"], project._modules["LayerNorm"], widen, widen._modules["dense"],
                narrow, narrow._modules["dense"], narrow._modules["LayerNorm"], attention,
            )  # fmt: skip
        except (AttributeError, KeyError):  # a part was replaced, perhaps by None
            return None
        return None if tuple(map(type, found)) != _KINDS or any(map(watched.is_watched, found)) else found

    def weights(self) -> encoder.LayerWeights | None:
        """The weights and options of this layer as it is now; None where its parts must be called: one was replaced or
        is observed by hooks, or has settings that ``LayerOptions`` cannot express."""
        parts = self.parts()
        if parts is None:
            return None
        own, project, _, norm, widen, _, narrow, _, last_norm, _ = parts
        if any([part.impl is not None for part in (own, project, norm, widen, narrow, last_norm)]):
            return None
        if any([part.weight_dtype is not own.weight_dtype for part in (project, widen, narrow)]):
            return None
        p, norm_p, last_p = [part.dropout if part.training else 0.0 for part in (own, norm, last_norm)]
        options = encoder.LayerOptions(
            own.num_heads, widen.activation, (norm.eps, last_norm.eps), own.weight_dtype, (p, norm_p, last_p)
        )
        try:
            tensors = [table[name] for table, name in _places(parts)]
        except KeyError:  # some are not parameters any more: parametrised, pruned or sharded
            return None
        return encoder.LayerWeights((*own.qkv(), *tensors[2:]), options)


# Of ``TransformerLayer.parts``.
Parts = tuple[
    SelfAttention, ProjectAddLayerNorm, nn.Linear, AddLayerNorm, Intermediate, nn.Linear, ProjectAddLayerNorm,
    nn.Linear, AddLayerNorm, AttentionBlock,
]  # fmt: skip
_KINDS = get_args(Parts)
# What ``TransformerLayer.weights`` looks at, in each part.
_SETTINGS = (
    ("num_heads", "dropout", "training", "weight_dtype", "impl"), ("weight_dtype", "impl"), (),
    ("eps", "dropout", "training", "impl"), ("activation", "weight_dtype", "impl"), (), ("weight_dtype", "impl"), (),
    ("eps", "dropout", "training", "impl"), (),
)  # fmt: skip


def _places(parts: Parts) -> list[tuple[dict[str, Any], str]]:
    """Table and name of the 12 tensors of a layer, from its ``parts``."""
    own, _, project, norm, _, widen, _, narrow, last_norm, _ = (part._parameters for part in parts)
    pairs = [(table, name) for table in (project, norm, widen, narrow, last_norm) for name in ("weight", "bias")]
    return [(own, "qkv_weight"), (own, "qkv_bias"), *pairs]


def _described(layer: nn.Module) -> encoder.LayerWeights | nn.Module:
    """What a layer computes with; the layer itself where it has to be called."""
    if type(layer) is not TransformerLayer or watched.is_watched(layer):
        return layer
    return layer.weights() or layer


class CachedLayers:
    """The layers of an encoder as ``encoder.run`` takes them, described anew only if something in them has changed
    since the last call. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return CachedLayers, ()

    def __call__(self, layers: Iterable[nn.Module]) -> Sequence[encoder.LayerWeights | nn.Module]:
        """What each layer computes with; the layer itself where it has to be called."""
        layers = list(layers)
        if watched.is_all_watched():
            return layers
        if torch.compiler.is_compiling():
            return list(map(_described, layers))
        seen = self._seen
        if seen is not None and seen.layers == layers and seen.snapshot.is_still():
            with suppress(KeyError):  # a tensor that is not a parameter any more
                return seen.weights()
        found = list(map(_described, layers))
        options = [each.options for each in found if type(each) is encoder.LayerWeights]
        is_stock = len(options) == len(found)
        self._seen = _Seen(cast("list[TransformerLayer]", layers), options) if is_stock else None
        return found


class _Seen:
    """Layers all of which could be described, and a snapshot of them."""

    def __init__(self, layers: list[TransformerLayer], options: list[encoder.LayerOptions]) -> None:
        self.layers, self._options = layers, options
        parts = cast("list[Parts]", [layer.parts() for layer in layers])
        settings = [(part.__dict__, name) for own in parts for part, names in zip(own, _SETTINGS) for name in names]
        self.snapshot = watched.Snapshot([*layers, *chain.from_iterable(parts)], settings)
        self._places = list(zip(*[place for own in parts for place in _places(own)]))

    def weights(self) -> list[encoder.LayerWeights]:
        """What each computes with now."""
        tensors = iter(map(getitem, *self._places))
        return list(map(encoder.LayerWeights, zip(*[tensors] * 12), self._options))
