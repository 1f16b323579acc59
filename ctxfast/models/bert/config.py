# SPDX-License-Identifier: Apache-2.0
"""Sizes and options of a BERT-family encoder, under Hugging Face's field names."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, cast

from ..._core.files import replacing
from ..._core.reading import read_json, reading
from .families import FAMILIES, Family

ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text")
MODEL_TYPES = tuple(FAMILIES)

# Hugging Face's hidden_act -> the name `linear_act` uses. The five names of the tanh form stand
# for one formula; "gelu_new" is the one this package writes.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "task_type_vocab_size",
    "num_labels",
)
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


# A config.json with more labels than this, and no names for them, is damaged: a head would be built from the number.
_MOST_UNNAMED_LABELS = 65536


def _fail(field: str, got: object, expected: str) -> ValueError:
    shown = repr(got)
    shown = shown if len(shown) <= 300 else shown[:300] + "..."
    return ValueError(f"ctxfast.BertConfig: {field} is {shown}; expected {expected}")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON under a temporary name beside `path`, then moves it into place."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Configuration of a post-LayerNorm encoder: BERT, RoBERTa, XLM-R, CamemBERT, data2vec, ERNIE, DistilBERT, ELECTRA
    or MPNet.

    Fields have the names and defaults of Hugging Face's BertConfig (bert-base-uncased), whatever the model type; files
    have each type's own (`dim`, `n_layers`, ... of DistilBERT). The object is frozen: use `dataclasses.replace`,
    `with_labels` or `with_gelu`.
    Keys of a config.json that have no field here are kept in `extra` and written back.

    Attributes:
        embedding_size: width of the tables (None: `hidden_size`); ELECTRA's may be another and is then projected.
        type_vocab_size: 0 for DistilBERT and MPNet, which have no token types; None becomes that, else 2.

    Raises:
        ValueError: a value out of range, an unknown activation, model type or position embedding,
            a hidden size that the heads do not divide, or a decoder.
        TypeError: a size that is not an integer.

    Reference: Devlin et al. 2019 (BERT); Liu et al. 2019 (RoBERTa); Sun et al. 2020 (ERNIE 2.0); Sanh et al. 2019
    (DistilBERT); Clark et al. 2020 (ELECTRA); Song et al. 2020 (MPNet).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = cast("int", None)
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = cast("int", None)  # None becomes 1 for RoBERTa's types, else 0
    classifier_dropout: float | None = None
    model_type: str = "bert"
    use_task_id: bool = False
    task_type_vocab_size: int = 3
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    position_embedding_type: str = "absolute"
    tie_word_embeddings: bool = True
    embedding_size: int = cast("int", None)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            way = "Another opens in ctxfast.Embedder, or by Transformers and then faster by ctxfast.swap_in(model)"
            raise _fail("model_type", self.model_type, f"one of {', '.join(MODEL_TYPES)}. {way}")
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", 1 if self.is_roberta else 0)
        if self.embedding_size is None:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        has_types = "type_vocab_size" not in self.family.absent
        if self.type_vocab_size is None:
            object.__setattr__(self, "type_vocab_size", 2 if has_types else 0)
        for name in (*_POSITIVE, "pad_token_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"ctxfast.BertConfig: {name} is {value!r}; expected an integer")
            may_be_zero = name == "pad_token_id" or (name == "type_vocab_size" and not has_types)
            if value < (0 if may_be_zero else 1):
                raise _fail(name, value, "a positive integer")
        if not has_types and self.type_vocab_size:
            raise _fail("type_vocab_size", self.type_vocab_size, f"0: {self.model_type} has no token types")
        if self.embedding_size != self.hidden_size and "embedding_size" in self.family.absent:
            expected = f"hidden_size = {self.hidden_size} for model_type {self.model_type!r}"
            raise _fail("embedding_size", self.embedding_size, expected)
        if self.hidden_size % self.num_attention_heads:
            raise _fail(
                "hidden_size", self.hidden_size, f"a multiple of num_attention_heads = {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise _fail("hidden_act", self.hidden_act, f"one of {', '.join(ACTIVATIONS)}")
        for name in (*_PROBABILITIES, "span_dropout"):
            value = getattr(self, name)
            if name == "classifier_dropout" and value is None:
                continue
            if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
                raise _fail(name, value, "a probability in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise _fail(name, value, "a number above 0")
        for name in ("use_task_id", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, getattr(self, name), "true or false")
        if self.pad_token_id >= self.vocab_size:
            raise _fail("pad_token_id", self.pad_token_id, f"an id below {self.vocab_size}")
        if self.max_position_embeddings <= self.position_offset:
            raise _fail(
                "max_position_embeddings",
                self.max_position_embeddings,
                f"more than pad_token_id + 1 = {self.position_offset} ({self.model_type} leaves that many rows unused)",
            )
        if self.position_embedding_type != "absolute":
            raise _fail(
                "position_embedding_type",
                self.position_embedding_type,
                "'absolute'; relative key and query position embeddings are not supported",
            )
        if self.model_type == "mpnet" and self.pad_token_id != 1:
            raise _fail("pad_token_id", self.pad_token_id, "1, from which mpnet counts its positions")
        buckets = self.extra.get("relative_attention_num_buckets", self.relative_buckets)
        if self.relative_buckets and buckets != self.relative_buckets:
            raise _fail("relative_attention_num_buckets", buckets, f"{self.relative_buckets}, as Hugging Face counts")
        if self.use_task_id and self.model_type != "ernie":
            raise _fail("use_task_id", True, f"False for model_type {self.model_type!r}")
        for name in ("is_decoder", "add_cross_attention"):
            if self.extra.get(name):
                raise _fail(name, True, "False; only bidirectional encoders are supported")
        if self.extra.get("pruned_heads"):
            raise _fail("pruned_heads", self.extra["pruned_heads"], "none; heads are kept whole")
        if self.extra.get("problem_type") not in (None, *PROBLEMS):
            raise _fail("problem_type", self.extra["problem_type"], f"one of {', '.join(map(repr, PROBLEMS))}")
        if self.extra.get("quantization_config"):
            expected = "none; weights that were quantised are not supported. Save the model dequantised"
            raise _fail("quantization_config", self.extra["quantization_config"], expected)
        if self.id2label is not None:
            if sorted(self.id2label) != list(range(len(self.id2label))):
                raise _fail("id2label", self.id2label, "the keys 0, 1, ... without gaps")
            if len(self.id2label) != self.num_labels:
                raise _fail(
                    "num_labels",
                    self.num_labels,
                    f"{len(self.id2label)}, the length of id2label. Use with_labels() to change it",
                )

    @property
    def family(self) -> Family:
        """What is peculiar to the model type."""
        return FAMILIES[self.model_type]

    @property
    def is_roberta(self) -> bool:
        """True for the types with RoBERTa's position numbering and head names."""
        return self.model_type in ROBERTA_TYPES

    @property
    def relative_buckets(self) -> int:
        """Buckets of relative positions, whose embedding biases attention (MPNet); 0 for none."""
        return self.family.relative_buckets

    @property
    def activation(self) -> str:
        """Name of `hidden_act` among the activations of `ctxfast.linear_act`."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """Row of the position table for the first token of a text."""
        return self.pad_token_id + 1 if self.is_roberta else 0

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, special ones included, that the position table allows."""
        return self.max_position_embeddings - self.position_offset

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier of texts: `classifier_dropout`, else `hidden_dropout_prob`."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    @property
    def token_dropout(self) -> float:
        """Dropout before a classifier of tokens; DistilBERT's `classifier_dropout` is that of texts alone."""
        return self.hidden_dropout_prob if self.model_type == "distilbert" else self.head_dropout

    @property
    def span_dropout(self) -> float:
        """Dropout before answer spans, which DistilBERT alone has (`qa_dropout`)."""
        return self.extra.get("qa_dropout", 0.1) if self.model_type == "distilbert" else 0.0

    @property
    def label2id(self) -> dict[str, int] | None:
        """The inverse of `id2label`."""
        if self.id2label is None:
            return None
        return {name: index for index, name in self.id2label.items()}

    @classmethod
    def base(cls, **changes: Any) -> BertConfig:
        """The released BERT-Base (uncased): 12 layers, 768 wide, 12 heads."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> BertConfig:
        """The released BERT-Large (uncased): 24 layers, 1024 wide, 16 heads."""
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """Makes a config from the keys of a config.json or of Google's bert_config.json.

        Without `model_type` the type comes from `architectures`, else it is "bert".
        Keys that are not fields go to `extra`. Raises as the constructor.
        """
        values = dict(values)
        extra = dict(values.pop("extra", {}))
        if values.get("model_type") is None:
            values["model_type"] = _type_from_architectures(values.get("architectures"))
        family = FAMILIES.get(values["model_type"]) if isinstance(values["model_type"], str) else None
        if family is not None:
            values = _own_fields(values, family, extra)
        labels = values.pop("id2label", None)
        label2id = values.pop("label2id", None)
        if labels is None and label2id:
            labels = {index: name for name, index in label2id.items()}
        if labels is not None:
            values["id2label"] = {int(key): str(name) for key, name in labels.items()}
            values.setdefault("num_labels", len(labels))
        # Old files spell "use the default" as null.
        for name in ("position_embedding_type", "num_labels"):
            if values.get(name, "") is None:
                del values[name]
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in fields}
        extra.update((name, value) for name, value in values.items() if name not in fields)
        return cls(**known, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> BertConfig:
        """Reads a config.json or bert_config.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or values the constructor refuses; both name the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"ctxfast.BertConfig: {path} does not exist")
        values = read_json(path, "ctxfast.BertConfig")
        with reading(path, "ctxfast.BertConfig", "config of a model"):
            config = cls.from_dict(values)
            if config.id2label is None and config.num_labels > _MOST_UNNAMED_LABELS:
                expected = f"at most {_MOST_UNNAMED_LABELS} labels without names. Name them in id2label"
                raise _fail("num_labels", config.num_labels, expected)
            return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys Hugging Face writes, with `extra` merged in."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("extra", "id2label", "num_labels")
        }
        if self.model_type != "ernie":
            del values["use_task_id"], values["task_type_vocab_size"]
        for name in self.family.absent:
            del values[name]
        values = {self.family.fields.get(name, name): value for name, value in values.items()}
        labels = self.id2label
        if labels is None and self.num_labels != 2:
            labels = {index: f"LABEL_{index}" for index in range(self.num_labels)}
        if labels is not None:
            values["id2label"] = {str(index): name for index, name in labels.items()}
            values["label2id"] = {name: index for index, name in labels.items()}
        return {**self.extra, **values}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes config.json into `directory` (made if absent) and returns its path."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.json"
        write_json(path, self.to_dict())
        return path

    def with_labels(self, labels: int | list[str]) -> BertConfig:
        """Returns a copy for that many labels, or for labels of those names."""
        if isinstance(labels, int):
            return dataclasses.replace(self, num_labels=labels, id2label=None)
        names = dict(enumerate(labels))
        return dataclasses.replace(self, num_labels=len(names), id2label=names)

    def with_gelu(self, form: str) -> BertConfig:
        """Returns a copy whose GELU is exact (`form="erf"`) or Google's approximation ("tanh")."""
        if form not in ("erf", "tanh"):
            raise ValueError(f"ctxfast.BertConfig: gelu is {form!r}; expected 'erf' or 'tanh'")
        if not self.activation.startswith("gelu"):
            raise _fail("hidden_act", self.hidden_act, f"a GELU, as gelu={form!r} was asked for")
        return dataclasses.replace(self, hidden_act="gelu" if form == "erf" else "gelu_new")


def _own_fields(values: dict[str, Any], family: Family, extra: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json under the names of fields here, with the defaults of their type; keys that would be
    taken for fields that the type does not have go to ``extra``."""
    extra.update((name, values.pop(name)) for name in family.absent if name in values)
    theirs = {theirs: ours for ours, theirs in family.fields.items()}
    return {**family.defaults, **{theirs.get(name, name): value for name, value in values.items()}}


def _type_from_architectures(architectures: object) -> str:
    """Model type behind class names such as ["RobertaForMaskedLM"], which stand alone in files that predate the
    model_type key; "bert" without any."""
    if not isinstance(architectures, (list, tuple)) or not architectures:
        return "bert"
    name = str(architectures[0])
    for model_type, family in FAMILIES.items():
        if name.startswith(family.classes):
            return model_type
    raise _fail("architectures", list(architectures), f"classes of {', '.join(MODEL_TYPES)}")
