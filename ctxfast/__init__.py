# SPDX-License-Identifier: Apache-2.0
"""ctxfast: contextual word embeddings (ELMo, BERT) at the speed of the hardware."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is loaded on first use below
    from . import functional as functional, models as models, nn as nn, packing as packing
    from ._core.choice import use_impl as use_impl
    from ._core.report import show_config as show_config
    from .embedding.embedder import Embedder as Embedder
    from .embedding.precision import quantize_vectors as quantize_vectors
    from .embedding.ray_data import embed_dataset as embed_dataset
    from .functional import *  # noqa: F403
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
    from .ops.shared.weight_cache import forget_packed as forget_packed
    from .swap.attention_interface import register_attention as register_attention
    from .swap.in_place import restore as restore, swap_in as swap_in

    __version__: str

# An op is a folder.
_ROOM = os.path.join(os.path.dirname(__file__), "ops")
_OPS = [name for name in sorted(os.listdir(_ROOM)) if os.path.isfile(os.path.join(_ROOM, name, "__init__.py"))]
_OPS.remove("shared")
# Loaded on first use: `import ctxfast`, and with it `ctxfast --help`, needs neither torch nor numpy. The first use of
# any of it loads all ops.
_LAZY = {
    **dict.fromkeys((*_OPS, "explain"), "ctxfast.functional"),
    "forget_packed": "ctxfast.ops.shared.weight_cache",
    "show_config": "ctxfast._core.report",
    "use_impl": "ctxfast._core.choice",
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
_LAZY_MODULES = ("functional", "nn", "models", "packing")

__all__ = [*_LAZY, *_LAZY_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import_module("ctxfast.functional")  # the ops, whose table some of these read
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = import_module(f"ctxfast.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'ctxfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("ctxfast")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "0+source"
