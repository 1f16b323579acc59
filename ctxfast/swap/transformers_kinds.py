# SPDX-License-Identifier: Apache-2.0
"""The kinds of encoders of Hugging Face's Transformers that ``swap_in`` knows, and where each part of a layer is."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .transformers_modern_kinds import MODERN
from .transformers_parts import MANY_OUTPUTS, Kind, Parts, Stack, in_list, rate, setting


def _bert_parts(layer: nn.Module, p: str = "by attention") -> Parts:
    """``p``: where the probability of dropping attention weights is: "by attention", whose mode decides over its
    dropout; "by dropout", a module that is called; or "by setting", a number of the attention's."""
    attention, own = layer.attention, layer.attention.self
    rates = {
        "by attention": partial(rate, own.dropout, own),
        "by dropout": partial(rate, own.dropout),
        "by setting": partial(setting, own),
    }
    return Parts(
        qkv=(own.query, own.key, own.value),
        project=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        widen=(layer.intermediate.dense,),
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
        qkv=(attention.q_lin, attention.k_lin, attention.v_lin),
        project=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        widen=(ffn.lin1,),
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
        qkv=(attention.query, attention.key, attention.value),
        project=attention.dense,
        attention_norm=attention.LayerNorm,
        widen=(layer.ffn,),
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
        qkv=(own.q, own.k, own.v),
        project=own.o,
        attention_norm=attention.LayerNorm,
        widen=(layer.intermediate.dense,),
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


def _in_groups(encoder: nn.Module) -> Stack | str:
    """Albert's: every group of layers runs several times before the next does."""
    groups = in_list(encoder, "albert_layer_groups", "embedding_hidden_mapping_in")
    if isinstance(groups, str):
        return groups
    lists = [in_list(group, "albert_layers") for group in groups.layers]
    inside = []
    for found in lists:
        if isinstance(found, str):
            return found
        inside.append(found.layers)
    config: Any = encoder.config
    times = config.num_hidden_layers / config.num_hidden_groups
    layers = [layer for i in range(config.num_hidden_layers) for layer in inside[int(i / times)]]
    return Stack(layers, groups.entry, tuple(groups.layers))


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
        _bert_kind(*names, result=MANY_OUTPUTS)
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
    _bert_kind("bert_generation", "BertGeneration", encoder="BertEncoder", result=MANY_OUTPUTS),
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
        stack=partial(in_list, name="layers"), arguments=("inputs_embeds", "attention_mask"),
    ),
    _bert_kind("tapas", "Tapas", p="by dropout", is_older=True),
    _bert_kind("visual_bert", "VisualBert", p="by dropout", is_older=True),
    _bert_kind(
        "rembert", "RemBert", p="by dropout", is_older=True,
        stack=partial(in_list, entry="embedding_hidden_mapping_in"), result=MANY_OUTPUTS,
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
        stack=partial(in_list, buckets="relative_attention_bias"),
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
    *MODERN,
)  # fmt: skip
# Encoder's full name -> its kind.
ENCODERS: dict[str, Kind] = {kind.full_name: kind for kind in _EVERY}
