# SPDX-License-Identifier: Apache-2.0
"""The model types that ``Bert`` computes, and what each calls its fields and tensors in files.

All are post-LayerNorm encoders; what differs is said here, and by ``BertConfig.is_roberta`` for positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# What a file calls it -> what it is called here.
_Renames = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        prefix: of the backbone's tensors in files of models with a head.
        classes: how Hugging Face's class names begin.
        fields: what config.json calls a field of ``BertConfig`` that has another name there.
        defaults: fields that are not ``BertConfig``'s own where config.json leaves them out.
        absent: fields of ``BertConfig`` that this type's config.json does not have; their values are the ``defaults``.
        layers: where the layers are in files, and ``blocks``: what one calls the parts of a layer.
        heads: beginnings of names of heads.
        sentence_head: those of them that hold in a model with a classifier for texts alone.
        is_of_choices: whether classifiers of choices have that head, too.
        pooler: activation of the layer before that classifier.
        pools: whether the encoder itself has that layer; if not, it belongs to the classifier.
        has_next_sentence: whether there is a head that judges pairs of sentences.
        has_decoder_bias: whether the decoder of masked words holds a copy of the bias, beside the tied one.
        drops_projection: whether training drops elements of the attention block's output.
        relative_buckets: of relative positions, whose embedding biases every layer's attention; 0 for none.
    """

    prefix: str
    classes: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ("embedding_size",)
    layers: str = "encoder.layer"
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heads: _Renames = ()
    sentence_head: _Renames = ()
    is_of_choices: bool = False
    pooler: str = "tanh"
    pools: bool = True
    has_next_sentence: bool = True
    has_decoder_bias: bool = True
    drops_projection: bool = True
    relative_buckets: int = 0


# RoBERTa's heads compute what BERT's do under other names: `classifier.dense` with tanh on the first token is the
# pooler, `out_proj` the classifier behind it.
_DENSE_HEAD = (("classifier.dense.", "bert.pooler.dense."), ("classifier.out_proj.", "classifier."))


_LM_HEAD = (
    ("lm_head.dense.", "cls.predictions.transform.dense."),
    ("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm."),
    ("lm_head.decoder.", "cls.predictions.decoder."),
    ("lm_head.bias", "cls.predictions.bias"),
)


def _roberta(classes: str, prefix: str = "roberta") -> Family:
    return Family(prefix, classes, heads=_LM_HEAD, sentence_head=_DENSE_HEAD, has_next_sentence=False)


_MPNET = Family(
    "mpnet",
    "MPNet",
    defaults={"vocab_size": 30527, "type_vocab_size": 0},
    absent=("embedding_size", "type_vocab_size", "position_embedding_type"),
    blocks={
        "attention.self.query": "attention.attn.q",
        "attention.self.key": "attention.attn.k",
        "attention.self.value": "attention.attn.v",
        "attention.output.dense": "attention.attn.o",
        "attention.output.LayerNorm": "attention.LayerNorm",
    },
    heads=_LM_HEAD,
    sentence_head=_DENSE_HEAD,
    has_next_sentence=False,
    relative_buckets=32,
)


_DISTILBERT = Family(
    "distilbert",
    "DistilBert",
    fields={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "activation",
        "classifier_dropout": "seq_classif_dropout",
    },
    defaults={"num_hidden_layers": 6, "classifier_dropout": 0.2, "type_vocab_size": 0, "layer_norm_eps": 1e-12},
    absent=("embedding_size", "type_vocab_size", "layer_norm_eps", "position_embedding_type"),
    layers="transformer.layer",
    blocks={
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    },
    heads=(
        ("vocab_transform.", "cls.predictions.transform.dense."),
        ("vocab_layer_norm.", "cls.predictions.transform.LayerNorm."),
        ("vocab_projector.weight", "cls.predictions.decoder.weight"),
        ("vocab_projector.bias", "cls.predictions.bias"),
    ),
    sentence_head=(("pre_classifier.", "bert.pooler.dense."),),
    is_of_choices=True,
    pooler="relu",
    pools=False,
    has_next_sentence=False,
    has_decoder_bias=False,
    drops_projection=False,
)
_ELECTRA = Family(
    "electra",
    "Electra",
    defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    absent=(),
    heads=(
        ("generator_predictions.dense.", "cls.predictions.transform.dense."),
        ("generator_predictions.LayerNorm.", "cls.predictions.transform.LayerNorm."),
        ("generator_lm_head.weight", "cls.predictions.decoder.weight"),
        ("generator_lm_head.bias", "cls.predictions.bias"),
        ("discriminator_predictions.", "cls.discriminator."),
    ),
    sentence_head=_DENSE_HEAD,
    pooler="gelu",
    pools=False,
    has_next_sentence=False,
    has_decoder_bias=False,
)
FAMILIES = {
    "bert": Family("bert", "Bert"),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "data2vec-text": _roberta("Data2VecText", "data2vec_text"),
    "ernie": Family("ernie", "Ernie"),
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "mpnet": _MPNET,
}
