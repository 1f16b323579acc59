# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters and one call each; they keep the names and state_dict of what they stand in for."""

from __future__ import annotations

from .attention import SelfAttention
from .embeddings import Embeddings
from .feed_forward import FeedForward
from .layer_norm import AddLayerNorm, LayerNorm
from .transformer import TransformerLayer

__all__ = [
    "AddLayerNorm",
    "Embeddings",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "TransformerLayer",
]
