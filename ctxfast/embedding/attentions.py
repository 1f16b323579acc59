# SPDX-License-Identifier: Apache-2.0
"""What the heads of a BERT look at in a text: shares, and a picture.

Reference: Clark et al. 2019, "What does BERT look at?", whose kinds of places these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._core import pictures

_WHO = "ctxfast.attention"
# Place -> how far to the right of the query it is.
_NEAR = {"previous": -1, "itself": 0, "next": 1}
PLACES = (*_NEAR, "special")


def shares(weights: np.ndarray, is_special: Sequence[bool]) -> dict[str, np.ndarray]:
    """Mean share of each head's attention by place, and its entropy.

    Args:
        weights: (K, H, L, L), rows add up to 1.
        is_special: of each token, whether it is [CLS], [SEP] or the like; what these look at does not count.

    Returns:
        "previous", "itself", "next", "special" (all special tokens together) and "entropy" (nats), (K, H) each.
    """
    special = np.asarray(is_special)
    queries = np.flatnonzero(~special)
    if not len(queries):
        raise ValueError(f"{_WHO}: the text has special tokens only; expected words.")
    rows = weights[:, :, queries]
    found = {}
    for place, step in _NEAR.items():
        keys = queries + step  # a special token stands at either end
        inside = (keys >= 0) & (keys < weights.shape[-1])
        found[place] = (rows[:, :, np.arange(len(queries)), keys.clip(0, weights.shape[-1] - 1)] * inside).mean(-1)
    found["special"] = rows[..., special].sum(-1).mean(-1)
    found["entropy"] = -(rows * np.log(np.maximum(rows, 1e-30))).sum(-1).mean(-1)
    return found


def picture(path: str | Path, tokens: Sequence[str], weights: np.ndarray, layers: Sequence[int]) -> None:
    """Draw heads as squares, a row of the picture for each layer: queries down, keys to the right, darker is more.

    Args:
        path: .png, .svg or .pdf.
        tokens: L.
        weights: (K, H, L, L) of all layers.
        layers: which to draw.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    heads, length = weights.shape[1], len(tokens)
    side = max(1.3, 0.16 * length)
    size = (side * heads + 1.2, (side + 0.2) * len(layers) + 0.6)
    drawing = pictures.figure_class(_WHO)(figsize=size, layout="constrained")
    panels = drawing.subplots(len(layers), heads, squeeze=False)
    for row, layer in zip(panels, layers):
        for head, axes in enumerate(row):
            axes.imshow(weights[layer, head], cmap="Purples", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
            is_last = layer == layers[-1]
            axes.set_yticks(range(length) if head == 0 else [], tokens if head == 0 else [], fontsize=6)
            axes.set_xticks(range(length) if is_last else [], tokens if is_last else [], fontsize=6, rotation=90)
            axes.tick_params(length=0)
    pictures.save(drawing, path, dpi=130)
