# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters and one call each; they keep the names and state_dict of what they stand in for."""

from __future__ import annotations

from .attention import SelfAttention
from .char_cnn import CharCnn
from .elmo_lstm import ElmoLstm
from .embeddings import Embeddings
from .feed_forward import FeedForward
from .highway import Highway
from .layer_norm import AddLayerNorm, LayerNorm
from .lstm import LSTM
from .scalar_mix import ScalarMix
from .transformer import TransformerLayer

__all__ = [
    "LSTM",
    "AddLayerNorm",
    "CharCnn",
    "ElmoLstm",
    "Embeddings",
    "FeedForward",
    "Highway",
    "LayerNorm",
    "ScalarMix",
    "SelfAttention",
    "TransformerLayer",
]
