# SPDX-License-Identifier: Apache-2.0
"""The kinds of encoders of Hugging Face's Transformers that ``swap_in`` knows, and where each part of a layer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
    attention_dropout: nn.Dropout | None
    attention_p: Callable[[], float]  # the probability of dropping an attention weight, as modules are now
    project_dropout: nn.Dropout | None
    output_dropout: nn.Dropout | None
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


def rate(dropout: nn.Dropout | None, mode: nn.Module | None = None) -> float:
    """The probability that a dropout has now, in its own mode or in that of the module that hands it on."""
    return dropout.p if dropout is not None and (mode or dropout).training else 0.0


def _setting(own: Any) -> float:
    """A probability that is a number of the attention's."""
    return own.attention_dropout if own.training else 0.0


def _bert_parts(layer: nn.Module, p: str = "by attention") -> Parts:
    """``p``: where the probability of dropping attention weights is: "by attention", whose mode decides over its
    dropout; "by dropout", a module that is called; or "by setting", a number of the attention's."""
    attention, own = layer.attention, layer.attention.self
    rates = {
        "by attention": partial(rate, own.dropout, own),
        "by dropout": partial(rate, own.dropout),
        "by setting": partial(_setting, own),
    }
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
        attention_p=rates[p],
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
        attention_p=partial(rate, attention.dropout, attention),
        project_dropout=None,
        output_dropout=ffn.dropout,
        containers=(layer, attention, ffn),
    )


def _albert_parts(layer: nn.Module) -> Parts:
    attention = layer.attention
    return Parts(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        project=attention.dense,
        attention_norm=attention.LayerNorm,
        widen=layer.ffn,
        narrow=layer.ffn_output,
        output_norm=layer.full_layer_layer_norm,
        activation=layer.activation,
        attention=attention,
        heads=attention.num_attention_heads,
        attention_dropout=attention.attention_dropout,
        attention_p=partial(rate, attention.attention_dropout, attention),
        project_dropout=attention.output_dropout,
        output_dropout=None,
        containers=(layer, attention),
    )


def _mpnet_parts(layer: nn.Module) -> Parts:
    attention, own = layer.attention, layer.attention.attn
    return Parts(
        query=own.q,
        key=own.k,
        value=own.v,
        project=own.o,
        attention_norm=attention.LayerNorm,
        widen=layer.intermediate.dense,
        narrow=layer.output.dense,
        output_norm=layer.output.LayerNorm,
        activation=layer.intermediate.intermediate_act_fn,
        attention=own,
        heads=own.num_attention_heads,
        attention_dropout=own.dropout,
        attention_p=partial(rate, own.dropout),
        project_dropout=attention.dropout,
        output_dropout=layer.output.dropout,
        containers=(layer, attention, own, layer.intermediate, layer.output),
    )


class Stack(NamedTuple):
    """What one encoder runs.

    Attributes:
        layers: in the order in which they run; shared ones come as often as they run.
        entry: a product before the first layer.
        between: modules between the encoder and its layers.
        buckets: the embedding of relative positions whose bias every layer's attention adds to its scores.
    """

    layers: list[nn.Module]
    entry: nn.Module | None = None
    between: tuple[nn.Module, ...] = ()
    buckets: nn.Module | None = None


def _in_list(encoder: nn.Module, name: str = "layer", entry: str = "", buckets: str = "") -> Stack | str:
    """Layers that stand in a list of this name; a sentence if they do not."""
    modules = encoder.__dict__["_modules"]
    layers = modules.get(name)
    if type(layers) is not nn.ModuleList:
        return f"its layers stand in a {type(layers).__name__}, not in a torch.nn.ModuleList."
    return Stack(list(layers._modules.values()), modules.get(entry), buckets=modules.get(buckets))


def _in_groups(encoder: nn.Module) -> Stack | str:
    """Albert's: every group of layers runs several times before the next does."""
    groups = _in_list(encoder, "albert_layer_groups", "embedding_hidden_mapping_in")
    if isinstance(groups, str):
        return groups
    lists = [_in_list(group, "albert_layers") for group in groups.layers]
    inside = []
    for found in lists:
        if isinstance(found, str):
            return found
        inside.append(found.layers)
    config: Any = encoder.config
    times = config.num_hidden_layers / config.num_hidden_groups
    layers = [layer for i in range(config.num_hidden_layers) for layer in inside[int(i / times)]]
    return Stack(layers, groups.entry, tuple(groups.layers))


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of encoder.

    Attributes:
        modeling, name: its module and class in Transformers.
        containers: paths of the modules between a layer and its leaves, and the names of their classes; "" is the
            layer.
        parts: finds the parts of a layer.
        result: the class of what it returns.
        stack: finds the layers of an encoder, or says why not.
        between: the class of the modules between encoder and layers.
        arguments: names of its first arguments. The first is hidden states; of others than these and attention_mask
            none may be given.
        is_older: whether its attention computes its own scores, and the encoder itself collects hidden states.
        returns_dict: whether it returns a dictionary where ``return_dict`` is left out.
        collects: whether hidden states of all layers can be collected here.
        note: what to say of calls that run as before.
    """

    modeling: str
    name: str
    containers: dict[str, str]
    parts: Callable[[nn.Module], Parts]
    result: str = "BaseModelOutput"
    stack: Callable[[nn.Module], Stack | str] = _in_list
    between: str = ""
    arguments: tuple[str, ...] = ("hidden_states", "attention_mask")
    is_older: bool = False
    returns_dict: bool = True
    collects: bool = True
    note: str | None = None

    @property
    def layer(self) -> str:
        return self.containers[""]

    @property
    def has_cache(self) -> bool:
        """Whether it hands on a cache where one is asked for."""
        return self.result == _MANY_OUTPUTS

    @property
    def full_name(self) -> str:
        return f"{self.modeling}.{self.name}"


_MANY_OUTPUTS = "BaseModelOutputWithPastAndCrossAttentions"


def _bert_kind(place: str, name: str, p: str = "by attention", **options: Any) -> Kind:
    """A kind whose layers are copies of Bert's. ``place``: a model's folder, and its module where that has another
    name; ``p``: see ``_bert_parts``."""
    model, _, module = place.partition("/")
    paths = {
        "": "Layer", "attention": "Attention", "attention.self": "SelfAttention", "attention.output": "SelfOutput",
        "intermediate": "Intermediate", "output": "Output",
    }  # fmt: skip
    return Kind(
        f"transformers.models.{model}.modeling_{module or model}",
        options.pop("encoder", f"{name}Encoder"),
        {path: name + suffix for path, suffix in paths.items()},
        partial(_bert_parts, p=p),
        **options,
    )


_LUKE = "calls with entities run as before."
_EVERY = (
    *(
        _bert_kind(*names, result=_MANY_OUTPUTS)
        for names in (
            ("bert", "Bert"),
            ("roberta", "Roberta"),
            ("xlm_roberta", "XLMRoberta"),
            ("camembert", "Camembert"),
            ("electra", "Electra"),
            ("ernie", "Ernie"),
            ("data2vec/data2vec_text", "Data2VecText"),
            ("roc_bert", "RoCBert"),
        )
    ),
    _bert_kind("bert_generation", "BertGeneration", encoder="BertEncoder", result=_MANY_OUTPUTS),
    *(
        _bert_kind(*names, p="by setting")
        for names in (
            ("align", "AlignText"),
            ("chinese_clip", "ChineseCLIPText"),
            ("clap", "ClapText"),
            ("layoutlm", "LayoutLM"),
            ("markuplm", "MarkupLM"),
            ("splinter", "Splinter"),
        )
    ),
    _bert_kind(
        "altclip", "AltRoberta", p="by setting",
        stack=partial(_in_list, name="layers"), arguments=("inputs_embeds", "attention_mask"),
    ),
    _bert_kind("tapas", "Tapas", p="by dropout", is_older=True),
    _bert_kind("visual_bert", "VisualBert", p="by dropout", is_older=True),
    _bert_kind(
        "rembert", "RemBert", p="by dropout", is_older=True,
        stack=partial(_in_list, entry="embedding_hidden_mapping_in"), result=_MANY_OUTPUTS,
    ),
    _bert_kind(
        "luke", "Luke", p="by dropout", is_older=True, collects=False, note=_LUKE, result="BaseLukeModelOutput",
        arguments=("word_hidden_states", "entity_hidden_states", "attention_mask"),
    ),
    Kind(
        "transformers.models.distilbert.modeling_distilbert",
        "Transformer",
        {"": "TransformerBlock", "attention": "DistilBertSelfAttention", "ffn": "FFN"},
        _distilbert_parts,
    ),
    Kind(
        "transformers.models.mpnet.modeling_mpnet",
        "MPNetEncoder",
        {
            "": "MPNetLayer", "attention": "MPNetAttention", "attention.attn": "MPNetSelfAttention",
            "intermediate": "MPNetIntermediate", "output": "MPNetOutput",
        },
        _mpnet_parts,
        stack=partial(_in_list, buckets="relative_attention_bias"),
        is_older=True,
        returns_dict=False,
    ),
    Kind(
        "transformers.models.albert.modeling_albert",
        "AlbertTransformer",
        {"": "AlbertLayer", "attention": "AlbertAttention"},
        _albert_parts,
        stack=_in_groups,
        between="AlbertLayerGroup",
    ),
)  # fmt: skip
# Encoder's full name -> its kind.
ENCODERS: dict[str, Kind] = {kind.full_name: kind for kind in _EVERY}
