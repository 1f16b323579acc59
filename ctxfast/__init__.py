# SPDX-License-Identifier: Apache-2.0
"""ctxfast: contextual word embeddings (ELMo, BERT) at the speed of the hardware."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from . import functional
from ._core.registry import use_impl
from ._core.report import show_config
from .functional import *  # noqa: F403
from .ops.shared.weight_cache import forget_packed

if TYPE_CHECKING:  # what is loaded on first use below
    from . import models as models, nn as nn, packing as packing
    from .embedding.embedder import Embedder as Embedder
    from .embedding.ray_data import embed_dataset as embed_dataset
    from .models.bert.config import BertConfig as BertConfig
    from .models.bert.heads import (
        BertForMaskedLM as BertForMaskedLM,
        BertForNextSentencePrediction as BertForNextSentencePrediction,
        BertForPreTraining as BertForPreTraining,
        BertForQuestionAnswering as BertForQuestionAnswering,
        BertForSequenceClassification as BertForSequenceClassification,
        BertForTokenClassification as BertForTokenClassification,
    )
    from .models.bert.modeling import Bert as Bert
    from .models.bert.tokenization import BertTokenizer as BertTokenizer
    from .models.elmo.embedder import ElmoEmbedder as ElmoEmbedder
    from .models.elmo.modeling import Elmo as Elmo
    from .models.elmo.tokenization import batch_to_ids as batch_to_ids
    from .swap.attention_interface import register_attention as register_attention
    from .swap.in_place import restore as restore, swap_in as swap_in

try:
    __version__ = metadata.version("ctxfast")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

# Loaded on first use, so that `import ctxfast` stays quick and needs no tokenizer or HDF5 library.
_LAZY = {
    "Embedder": "ctxfast.embedding.embedder",
    "embed_dataset": "ctxfast.embedding.ray_data",
    "quantize_vectors": "ctxfast.embedding.precision",
    "Elmo": "ctxfast.models.elmo.modeling",
    "ElmoEmbedder": "ctxfast.models.elmo.embedder",
    "register_attention": "ctxfast.swap.attention_interface",
    "restore": "ctxfast.swap.in_place",
    "swap_in": "ctxfast.swap.in_place",
    "batch_to_ids": "ctxfast.models.elmo.tokenization",
    "Bert": "ctxfast.models.bert.modeling",
    "BertConfig": "ctxfast.models.bert.config",
    "BertTokenizer": "ctxfast.models.bert.tokenization",
    "BertForMaskedLM": "ctxfast.models.bert.heads",
    "BertForNextSentencePrediction": "ctxfast.models.bert.heads",
    "BertForPreTraining": "ctxfast.models.bert.heads",
    "BertForQuestionAnswering": "ctxfast.models.bert.heads",
    "BertForSequenceClassification": "ctxfast.models.bert.heads",
    "BertForTokenClassification": "ctxfast.models.bert.heads",
}
_LAZY_MODULES = ("nn", "models", "packing")

__all__ = ["forget_packed", "functional", "show_config", "use_impl"]
__all__ += functional.__all__
__all__ += [*_LAZY, *_LAZY_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = import_module(f"ctxfast.{name}")
    else:
        raise AttributeError(f"module 'ctxfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
