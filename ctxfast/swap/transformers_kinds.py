# SPDX-License-Identifier: Apache-2.0
"""The kinds of encoders of Hugging Face's Transformers that ``swap_in`` knows, and where each part of a layer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parts:
    """The modules of one layer, whatever its names for them, and what else its arithmetic needs."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    project: nn.Linear
    attention_norm: nn.LayerNorm
    widen: nn.Linear
    narrow: nn.Linear
    output_norm: nn.LayerNorm
    activation: nn.Module
    attention: nn.Module  # holds heads, scaling and the config
    heads: int
    attention_dropout: nn.Dropout
    project_dropout: nn.Dropout | None
    output_dropout: nn.Dropout
    containers: tuple[nn.Module, ...]  # the layer and the modules between it and these, which may have hooks too

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.project, self.widen, self.narrow

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.attention_norm, self.output_norm

    @property
    def dropouts(self) -> tuple[nn.Dropout, ...]:
        every = (self.attention_dropout, self.project_dropout, self.output_dropout)
        return tuple(dropout for dropout in every if dropout is not None)

    @property
    def every(self) -> tuple[nn.Module, ...]:
        return *self.containers, *self.linears, *self.norms, *self.dropouts, self.activation


def _bert_parts(layer: nn.Module) -> Parts:
    attention, own = layer.attention, layer.attention.self
    return Parts(
        query=own.query,
        key=own.key,
        value=own.value,
        project=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        widen=layer.intermediate.dense,
        narrow=layer.output.dense,
        output_norm=layer.output.LayerNorm,
        activation=layer.intermediate.intermediate_act_fn,
        attention=own,
        heads=own.num_attention_heads,
        attention_dropout=own.dropout,
        project_dropout=attention.output.dropout,
        output_dropout=layer.output.dropout,
        containers=(layer, attention, own, attention.output, layer.intermediate, layer.output),
    )


def _distilbert_parts(layer: nn.Module) -> Parts:
    attention, ffn = layer.attention, layer.ffn
    return Parts(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        project=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        widen=ffn.lin1,
        narrow=ffn.lin2,
        output_norm=layer.output_layer_norm,
        activation=ffn.activation,
        attention=attention,
        heads=attention.n_heads,
        attention_dropout=attention.dropout,
        project_dropout=None,
        output_dropout=ffn.dropout,
        containers=(layer, attention, ffn),
    )


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of encoder: its modeling module, names of classes, how a layer's parts are found, its result's class.

    ``containers``: paths of the modules between a layer and its leaves, and the names of their classes; "" is the
    layer.
    """

    modeling: str
    name: str
    containers: dict[str, str]
    parts: Callable[[nn.Module], Parts]
    result: str

    @property
    def layer(self) -> str:
        return self.containers[""]


def _bert_kind(model: str, name: str) -> Kind:
    paths = {
        "": "Layer", "attention": "Attention", "attention.self": "SelfAttention", "attention.output": "SelfOutput",
        "intermediate": "Intermediate", "output": "Output",
    }  # fmt: skip
    return Kind(
        f"transformers.models.{model}.modeling_{model}",
        f"{name}Encoder",
        {path: name + suffix for path, suffix in paths.items()},
        _bert_parts,
        "BaseModelOutputWithPastAndCrossAttentions",
    )


_EVERY = (
    *(
        _bert_kind(*names)
        for names in (
            ("bert", "Bert"),
            ("roberta", "Roberta"),
            ("xlm_roberta", "XLMRoberta"),
            ("camembert", "Camembert"),
            ("electra", "Electra"),
            ("ernie", "Ernie"),
        )
    ),
    Kind(
        "transformers.models.distilbert.modeling_distilbert",
        "Transformer",
        {"": "TransformerBlock", "attention": "DistilBertSelfAttention", "ffn": "FFN"},
        _distilbert_parts,
        "BaseModelOutput",
    ),
)
# Encoder's full name -> its kind.
ENCODERS: dict[str, Kind] = {f"{kind.modeling}.{kind.name}": kind for kind in _EVERY}
