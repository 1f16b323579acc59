# SPDX-License-Identifier: Apache-2.0
"""The ops: each package holds one op's spec, reference, implementations and test cases under its name."""

from __future__ import annotations

from .._core import registry
from . import (  # noqa: F401  (importing an op enters it in the table)
    add_layer_norm,
    attention,
    char_cnn,
    embed_layer_norm,
    linear_act,
    linear_cross_entropy,
    lstm,
    scalar_mix,
    transformer_layers,
)

registry.load_implementations()
registry.read_environment()
