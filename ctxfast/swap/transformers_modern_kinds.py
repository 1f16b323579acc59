# SPDX-License-Identifier: Apache-2.0
"""The kinds of encoders of Transformers whose layers are not BERT's: norms before, gated feed-forward blocks, rotary
positions, windows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .transformers_parts import MANY_OUTPUTS, Kind, Parts, Stack, in_list, rate, setting


def _modernbert_parts(layer: nn.Module) -> Parts:
    own, mlp, config = layer.attn, layer.mlp, layer.attn.config
    has_norm, has_dropout = not isinstance(layer.attn_norm, nn.Identity), not isinstance(own.out_drop, nn.Identity)
    return Parts(
        qkv=(own.Wqkv,),
        project=own.Wo,
        attention_norm=layer.attn_norm if has_norm else None,
        widen=(mlp.Wi,),
        narrow=mlp.Wo,
        output_norm=layer.mlp_norm,
        activation=mlp.act,
        attention=own,
        heads=config.num_attention_heads,
        attention_dropout=None,
        attention_p=partial(setting, own),
        project_dropout=own.out_drop if has_dropout else None,
        output_dropout=None,
        containers=(layer, own, mlp),
        inner_dropout=mlp.drop,
        settings=((config.__dict__, "local_attention"), (own.__dict__, "sliding_window")),
        others=(*[layer.attn_norm] * (not has_norm), *[own.out_drop] * (not has_dropout)),
        is_pre_norm=True,
        is_gated=True,
        window=config.sliding_window if own.sliding_window is not None else None,
        rotary=layer.attention_type,
    )


def _projected_parts(layer: nn.Module, norm: str = "layer") -> Parts:
    """Layers with ``self_attn`` and ``mlp``, named as LLaMA's."""
    own, mlp = layer.self_attn, layer.mlp
    is_post = hasattr(layer, "post_mlp_layernorm")
    is_gated = hasattr(mlp, "gate_proj")
    return Parts(
        qkv=(own.q_proj, own.k_proj, own.v_proj),
        project=own.o_proj,
        attention_norm=layer.post_attention_layernorm if is_post else layer.input_layernorm,
        widen=(mlp.gate_proj, mlp.up_proj) if is_gated else (mlp.fc1,),
        narrow=mlp.down_proj if is_gated else mlp.fc2,
        output_norm=layer.post_mlp_layernorm if is_post else layer.post_attention_layernorm,
        activation=mlp.act_fn if is_gated else mlp.activation_fn,
        attention=own,
        heads=own.config.num_attention_heads,
        attention_dropout=None,
        attention_p=partial(setting, own),
        project_dropout=getattr(layer, "post_attention_dropout", None),
        output_dropout=getattr(layer, "post_mlp_dropout", None),
        containers=(layer, own, mlp),
        kv_heads=own.config.num_key_value_heads if hasattr(own, "num_key_value_groups") else None,
        inner_dropout=getattr(mlp, "dropout", None),
        is_pre_norm=not is_post,
        norm=norm,
        is_gated=is_gated,
        rotary="",
    )


def _pre_norm_bert_parts(layer: nn.Module, norms: tuple[str, str], is_older: bool = False) -> Parts:
    """BERT's layers with norms before attention and feed-forward block, at these paths."""
    attention, own, (first, second) = layer.attention, layer.attention.self, map(layer.get_submodule, norms)
    return Parts(
        qkv=(own.query, own.key, own.value),
        project=attention.output.dense,
        attention_norm=first,
        widen=(layer.intermediate.dense,),
        narrow=layer.output.dense,
        output_norm=second,
        activation=layer.intermediate.intermediate_act_fn,
        attention=own,
        heads=own.num_attention_heads,
        attention_dropout=own.dropout,
        attention_p=partial(rate, own.dropout, None if is_older else own),
        project_dropout=attention.output.dropout,
        output_dropout=getattr(layer.output, "dropout", None),
        containers=(layer, attention, own, attention.output, layer.intermediate, layer.output),
        is_pre_norm=True,
    )


def _in_model(model: nn.Module) -> Stack | str:
    """The layers of a model that runs them itself, and what makes its rotary positions."""
    found: Any = in_list(model, "layers")
    if isinstance(found, str):
        return found
    if len(found.layers) > model.config.num_hidden_layers:
        return f"it has {len(found.layers)} layers and runs {model.config.num_hidden_layers} of them."
    return found._replace(between=(model.rotary_emb,))


def _model(folder: str, name: str, layer: str, paths: dict[str, str], parts: Any, result: str) -> Kind:
    """A model that embeds ids, runs layers and norms, with rotary positions."""
    return Kind(
        f"transformers.models.{folder}.modeling_{folder}",
        f"{name}Model",
        {"": f"{name}{layer}", **{path: name + suffix for path, suffix in paths.items()}},
        parts,
        result,
        stack=_in_model,
        between=f"{name}RotaryEmbedding",
        arguments=("inputs_embeds", "attention_mask"),
        is_model=True,
    )


def _pre_norm_bert(folder: str, name: str, norms: tuple[str, str], exit: str = "", is_older: bool = False) -> Kind:
    """An encoder of BERT's layers with norms before; ``exit``: its last norm, where that is its own."""
    paths = {
        "": "Layer", "attention": "Attention", "attention.self": "SelfAttention", "attention.output": "SelfOutput",
        "intermediate": "Intermediate", "output": "Output",
    }  # fmt: skip
    return Kind(
        f"transformers.models.{folder}.modeling_{folder}",
        f"{name}Encoder",
        {path: name + suffix for path, suffix in paths.items()},
        partial(_pre_norm_bert_parts, norms=norms, is_older=is_older),
        MANY_OUTPUTS,
        stack=partial(in_list, exit=exit),
        is_older=is_older,
    )


_LLAMA = {"self_attn": "Attention", "mlp": "MLP"}
_POOLED = "BaseModelOutputWithPooling"
MODERN = (
    _model(
        "modernbert", "ModernBert", "EncoderLayer", {"attn": "Attention", "mlp": "MLP"}, _modernbert_parts,
        "BaseModelOutput",
    ),
    _model("nomic_bert", "NomicBert", "Layer", _LLAMA, _projected_parts, _POOLED),
    _model("gte", "Gte", "Layer", _LLAMA, _projected_parts, _POOLED),
    _model("jina_embeddings_v3", "JinaEmbeddingsV3", "Layer", _LLAMA, _projected_parts, _POOLED),
    _model(
        "eurobert", "EuroBert", "DecoderLayer",
        {**_LLAMA, "input_layernorm": "RMSNorm", "post_attention_layernorm": "RMSNorm"},
        partial(_projected_parts, norm="rms"), "BaseModelOutput",
    ),
    _pre_norm_bert(
        "roberta_prelayernorm", "RobertaPreLayerNorm", ("attention.LayerNorm", "intermediate.LayerNorm")
    ),
    _pre_norm_bert(
        "xlm_roberta_xl", "XLMRobertaXL", ("attention.self_attn_layer_norm", "LayerNorm"), exit="LayerNorm"
    ),
    _pre_norm_bert("megatron_bert", "MegatronBert", ("attention.ln", "ln"), exit="ln", is_older=True),
)  # fmt: skip
