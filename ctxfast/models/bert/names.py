# SPDX-License-Identifier: Apache-2.0
"""Tensor names: what files call them, the normal form used here, and the shape of each.

Normal form: `bert.embeddings...`, `bert.encoder.layer.N...`, `bert.pooler.dense...` for the backbone of every model
type; `cls.predictions...`, `cls.seq_relationship...`, `classifier...` and `qa_outputs...` for the heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .config import BertConfig
from .families import FAMILIES

# Counts from 0 and zeros that older classes stored; Hugging Face's library does not read them.
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
DECODER_WEIGHT, DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
WORDS, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"

# A dimension is the config field that gives it; "labels" is free.
Shape = tuple[str, ...]
_H, _F, _V = "hidden_size", "intermediate_size", "vocab_size"
POOLER_SHAPES: dict[str, Shape] = {"bert.pooler.dense.weight": (_H, _H), "bert.pooler.dense.bias": (_H,)}
# Beginnings of the backbone's names.
_BACKBONE = ("embeddings.", "embeddings_project.", "encoder.", "pooler.")
# Names of the backbone that is meant, for a file that belongs to another config.
PREFIXES = tuple(dict.fromkeys(f"{family.prefix}." for family in FAMILIES.values()))

_TF_RENAMES = {
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}
_TF_LAST = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
_TF_SLOT = re.compile(r"(^|/)(adam_[mv]|\w*Optimizer(_\d+)?|Adam(_\d+)?|global_step|beta[12]_power)$")


def _table_width(config: BertConfig) -> str:
    """The field that says how wide the embedding tables are."""
    return _H if config.embedding_size == config.hidden_size else "embedding_size"


def head_shapes(config: BertConfig) -> dict[str, Shape]:
    """Every tensor of the heads with its dimensions; files have few of them."""
    width = _table_width(config)
    return {
        "cls.predictions.transform.dense.weight": (width, _H),
        "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.transform.LayerNorm.weight": (width,),
        "cls.predictions.transform.LayerNorm.bias": (width,),
        "cls.predictions.bias": (_V,),
        "cls.predictions.decoder.weight": (_V, width),
        "cls.seq_relationship.weight": ("labels", _H),
        "cls.seq_relationship.bias": ("labels",),
        "cls.discriminator.dense.weight": (_H, _H),
        "cls.discriminator.dense.bias": (_H,),
        "cls.discriminator.dense_prediction.weight": ("labels", _H),
        "cls.discriminator.dense_prediction.bias": ("labels",),
        "classifier.weight": ("labels", _H),
        "classifier.bias": ("labels",),
        "qa_outputs.weight": ("labels", _H),
        "qa_outputs.bias": ("labels",),
    }


def backbone_shapes(config: BertConfig) -> dict[str, Shape]:
    """Every backbone tensor but the pooler, which many files leave out, with its dimensions."""
    width = _table_width(config)
    shapes: dict[str, Shape] = {
        "bert.embeddings.word_embeddings.weight": (_V, width),
        "bert.embeddings.position_embeddings.weight": ("max_position_embeddings", width),
        "bert.embeddings.LayerNorm.weight": (width,),
        "bert.embeddings.LayerNorm.bias": (width,),
    }
    if config.type_vocab_size:
        shapes["bert.embeddings.token_type_embeddings.weight"] = ("type_vocab_size", width)
    if width != _H:
        shapes["bert.embeddings_project.weight"] = (_H, width)
        shapes["bert.embeddings_project.bias"] = (_H,)
    if config.use_task_id:
        shapes["bert.embeddings.task_type_embeddings.weight"] = ("task_type_vocab_size", _H)
    if config.relative_buckets:
        shapes["bert.encoder.relative_attention_bias.weight"] = ("relative_buckets", "num_attention_heads")
    blocks: dict[str, Shape] = {
        "attention.self.query": (_H, _H),
        "attention.self.key": (_H, _H),
        "attention.self.value": (_H, _H),
        "attention.output.dense": (_H, _H),
        "attention.output.LayerNorm": (_H,),
        "intermediate.dense": (_F, _H),
        "output.dense": (_H, _F),
        "output.LayerNorm": (_H,),
    }
    for layer in range(config.num_hidden_layers):
        for block, shape in blocks.items():
            name = f"bert.encoder.layer.{layer}.{block}"
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def layer_of(name: str) -> int | None:
    """Number of the encoder layer that a tensor in normal form belongs to."""
    match = re.match(r"bert\.encoder\.layer\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def from_torch_names(names: Iterable[str], config: BertConfig) -> dict[str, str]:
    """Maps names of a PyTorch file to the normal form; several may have the same.

    Accepts every name with or without the backbone's prefix, `module.` in front, and the old LayerNorm names gamma and
    beta. The decoder's own bias keeps its name (`DECODER_BIAS`), and so do buffers (`BUFFERS`). A pooler
    beside a classifier that has the pooler's place keeps a name without prefix, which is not a known part.
    """
    family = config.family
    blocks = {theirs: ours for ours, theirs in family.blocks.items()}
    stripped = {name: name.removeprefix("module.") for name in names}
    # A layer before a classifier of texts takes the pooler's place.
    pooled = tuple(theirs for theirs, ours in family.sentence_head if ours.startswith("bert.pooler."))
    has_dense_head = bool(pooled) and any(key.startswith(pooled) for key in stripped.values())
    result: dict[str, str] = {}
    for name, key in stripped.items():
        if key.endswith(".gamma"):
            key = key.removesuffix("gamma") + "weight"
        elif key.endswith(".beta"):
            key = key.removesuffix("beta") + "bias"
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        if key.startswith((*_BACKBONE, f"{family.layers}.")):
            if not (has_dense_head and key.startswith("pooler.")):
                key = f"bert.{_renamed_layer(key, family.layers, 'encoder.layer', blocks)}"
        else:
            for theirs, ours in (*family.heads, *family.sentence_head):
                if key.startswith(theirs):
                    key = ours + key.removeprefix(theirs)
                    break
        result[name] = key
    return result


def _renamed_layer(name: str, layers: str, others: str, blocks: Mapping[str, str]) -> str:
    """A tensor of a layer under its other name, "encoder.layer.0.output.dense.weight" say."""
    match = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return name
    number, block, kind = match.groups()
    return f"{others}.{number}.{blocks.get(block, block)}.{kind}"


def from_tensorflow_names(names: Iterable[str]) -> dict[str, str]:
    """Maps variables of Google's checkpoints to the normal form; optimiser slots are left out."""
    result = {}
    for name in names:
        if _TF_SLOT.search(name):
            continue
        if name in _TF_RENAMES:
            result[name] = _TF_RENAMES[name]
            continue
        parts = [re.sub(r"^layer_(\d+)$", r"layer.\1", part) for part in name.split("/")]
        if parts[-1] in _TF_LAST:
            parts[-1] = _TF_LAST[parts[-1]]
        elif parts[-1].endswith("_embeddings"):
            parts.append("weight")
        result[name] = ".".join(parts)
    return result


def is_tensorflow_kernel(name: str) -> bool:
    """True for the variables that TensorFlow stores as [in, out]."""
    return name.endswith("/kernel")


def class_name(config: BertConfig, names: Iterable[str], task: str | None = None) -> str:
    """Hugging Face's class for a state dict in normal form, e.g. "BertForMaskedLM".

    A `classifier` after a pooler is taken for sequence classification, without one for token
    classification, unless `task` or the class recorded in the config says which.
    """
    names = set(names)
    prefix = config.family.classes
    if task is None and "classifier.weight" in names:
        recorded = config.extra.get("architectures") or [""]
        task = next(
            (t for t in ("TokenClassification", "MultipleChoice") if str(recorded[0]).endswith(t)),
            "SequenceClassification" if "bert.pooler.dense.weight" in names else "TokenClassification",
        )
    if task is not None:
        return f"{prefix}For{task}"
    if "cls.discriminator.dense.weight" in names:
        return prefix + "ForPreTraining"
    if "cls.predictions.bias" in names:
        both = "cls.seq_relationship.weight" in names
        return prefix + ("ForPreTraining" if both else "ForMaskedLM")
    if "cls.seq_relationship.weight" in names:
        return prefix + "ForNextSentencePrediction"
    if "qa_outputs.weight" in names:
        return prefix + "ForQuestionAnswering"
    return prefix + "Model"


def to_torch_names(config: BertConfig, names: Iterable[str], task: str | None = None) -> dict[str, str]:
    """Maps names in normal form to those Hugging Face's class (see `class_name`) has.

    Raises ValueError for a head that the model type's classes do not have.
    """
    names, family = list(names), config.family
    target = class_name(config, names, task)
    prefix = "" if target.endswith("Model") else f"{family.prefix}."
    is_of_choices = family.is_of_choices and target.endswith("ForMultipleChoice")
    of_texts = is_of_choices or target.endswith("ForSequenceClassification")
    heads = (*family.heads, *(family.sentence_head if of_texts else ()))
    result = {}
    for name in names:
        if (name.startswith("cls.seq_relationship.") and not family.has_next_sentence) or (
            name.startswith("bert.pooler.") and not family.pools and not of_texts
        ):
            raise ValueError(
                f"ctxfast.save_checkpoint: {name} has no place in a {config.model_type} model; "
                "leave the head out of state_dict"
            )
        key = next((a + name.removeprefix(b) for a, b in heads if name.startswith(b)), name)
        if key.startswith("bert."):
            key = prefix + _renamed_layer(key.removeprefix("bert."), "encoder.layer", family.layers, family.blocks)
        result[name] = key
    return result
