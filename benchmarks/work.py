# SPDX-License-Identifier: Apache-2.0
"""The work a case needs at least: arithmetic, memory traffic, tokens. Padding and repeated work count for nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiply-add is two), bytes moved, tokens; None where it would say nothing.

    A case declares ``flops`` if arithmetic bounds it and ``bytes`` if memory does. A recurrence declares its ``steps``,
    which wait for one another, and ``step_bytes``, the weights that each of them multiplies by.
    """

    flops: float | None = None
    bytes: float | None = None
    tokens: int | None = None
    steps: int | None = None
    step_bytes: float | None = None


# ELMo's released filters (width, number), the characters of a word, their vectors' size, rows of their table.
ELMO_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
ELMO_CHARACTERS = 50
ELMO_DEPTH = 16
ELMO_ALPHABET = 262


@dataclass(frozen=True)
class BertSizes:
    """What the arithmetic of an encoder depends on."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int


BERT_SIZES = {
    "minilm": BertSizes(layers=6, hidden=384, heads=12, feed_forward=1536),
    "bert-base": BertSizes(layers=12, hidden=768, heads=12, feed_forward=3072),
}


def op_work(op: str, sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    """The work of a case of ``op`` with these sizes; ``itemsize`` is bytes per element (of weights, where
    they are held in another dtype than the inputs)."""
    passes = 3 if backward else 1  # a product has two gradients, each a product of the same size
    if op == "lstm":
        hidden, steps = sizes["H"], lstm_tokens(sizes)
        size = sizes.get("P") or hidden
        per_step = 4 * hidden * (sizes["I"] + size) + (size * hidden if sizes.get("P") else 0)
        projection = size * hidden if sizes.get("P") else 0
        weights = sizes["R"] * (4 * hidden * size + projection) * itemsize
        return Work(
            flops=passes * 2.0 * steps * sizes["R"] * per_step,
            tokens=steps,
            steps=sizes["T"],
            step_bytes=(2.0 if backward else 1.0) * weights,
        )
    if op == "attention":
        lengths, width = sizes["lengths"], sizes["H"] * sizes["D"]
        flops = 4.0 * sum(n * n for n in lengths) * width
        # The backward pass is five products to the forward pass's two.
        return Work(flops=(3.5 if backward else 1) * flops, tokens=sum(lengths))
    if op == "add_layer_norm":
        # Forward: x and residual in, y out. Backward: the gradient and x + residual in, one gradient out.
        return Work(bytes=(6.0 if backward else 3.0) * sizes["T"] * sizes["N"] * itemsize)
    if op == "linear_act":
        return Work(flops=passes * 2.0 * sizes["T"] * sizes["N"] * sizes["M"])
    if op == "embed_layer_norm":
        # Forward: three table rows in, one out. Backward: the gradient and the rows again, and three gradients out.
        return Work(bytes=(11.0 if backward else 4.0) * sizes["T"] * sizes["N"] * itemsize, tokens=sizes["T"])
    if op == "char_cnn":
        # Of all windows: a kernel that computes those in the padding once does about a fifth of it.
        windows = sum(n * w * ELMO_DEPTH * (ELMO_CHARACTERS - w + 1) for w, n in ELMO_FILTERS)
        return Work(flops=2.0 * sizes["W"] * windows)
    if op == "scalar_mix":
        return Work(bytes=(sizes["K"] + 1.0) * sizes["B"] * sizes["T"] * sizes["N"] * itemsize)
    if op == "linear_cross_entropy":
        return Work(flops=passes * 2.0 * sizes["labelled"] * sizes["N"] * sizes["V"])
    if op == "transformer_layers":
        lengths, size = sizes["lengths"], sizes["N"]
        per_token = 2.0 * (4 * size**2 + 2 * size * sizes["M"])
        attended = 4.0 * sum(n * n for n in lengths) * size
        return Work(flops=passes * sizes["K"] * (sum(lengths) * per_token + attended), tokens=sum(lengths))
    if op in ("bert", "bert_mlm"):
        passes = 3 if op == "bert_mlm" else 1
        lengths, s = sizes["lengths"], BERT_SIZES[sizes["model"]]
        per_token = 2.0 * (4 * s.hidden**2 + 2 * s.hidden * s.feed_forward)
        attended = 4.0 * sum(n * n for n in lengths) * s.hidden
        return Work(flops=passes * s.layers * (sum(lengths) * per_token + attended), tokens=sum(lengths))
    if op == "elmo":
        return Work(tokens=sizes["B"] * sizes["words"])
    raise ValueError(f"benchmarks: the work of op {op!r} is not declared; add it to benchmarks/work.py.")


def ragged_lengths(count: int, longest: int) -> tuple[int, ...]:
    """``count`` lengths from ``longest`` down to about a quarter of it, in a fixed shuffled order."""
    lengths = [max(1, round(longest * (1 - 0.75 * i / max(count - 1, 1)))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return tuple(lengths[i] for i in order)


def lstm_tokens(sizes: dict[str, Any]) -> int:
    """Steps that carry a token, over the whole batch."""
    return sum(ragged_lengths(sizes["B"], sizes["T"])) if sizes.get("ragged") else sizes["B"] * sizes["T"]
