# SPDX-License-Identifier: Apache-2.0
"""Which examples make which batch: a pure function of the seed and the step, so that going on needs no more than the
step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Lengths are sorted within so many batches: like lengths come together, and batches still differ from epoch to epoch.
_WINDOW_BATCHES = 50


class Batches:
    """Examples in batches, another order every epoch, without end.

    Args:
        count: number of examples.
        batch_size: examples of a batch; the last one of an epoch may hold fewer.
        seed: of the order.
        lengths: tokens of each example; given, a batch holds examples of like length and batches are shuffled.
        is_shuffled: False keeps the order of the examples.

    Raises:
        ValueError: no examples, a batch size below 1, a seed below 0, lengths of another number of examples.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
        is_shuffled: bool = True,
    ) -> None:
        who = "ctxfast.training.Batches"
        if count < 1:
            raise ValueError(f"{who}: count is {count}; expected at least one example.")
        if batch_size < 1:
            raise ValueError(f"{who}: batch_size is {batch_size}; expected 1 or more.")
        if seed < 0:
            raise ValueError(f"{who}: seed is {seed}; expected 0 or more.")
        if lengths is not None and len(lengths) != count:
            raise ValueError(f"{who}: lengths has {len(lengths)} values; expected count = {count}.")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = -(-count // batch_size)
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._is_shuffled = is_shuffled
        self._order = lru_cache(maxsize=2)(self._make_order)  # two: batches are made ahead

    def __call__(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Indices of the examples of micro-batch ``step`` of one of ``ranks`` processes, which share an epoch."""
        epoch, place = divmod(step * ranks + rank, self.per_epoch)
        return self._order(epoch)[place].tolist()

    def epoch(self, step: int, ranks: int = 1) -> int:
        """The epoch that rank 0's micro-batch ``step`` belongs to."""
        return step * ranks // self.per_epoch

    def steps(self, epochs: float, accumulate: int = 1, ranks: int = 1) -> int:
        """Optimiser steps that ``epochs`` take."""
        return max(1, -(-int(round(epochs * self.per_epoch)) // (accumulate * ranks)))

    def _make_order(self, epoch: int) -> list[np.ndarray]:
        if not self._is_shuffled:
            return np.array_split(np.arange(self.count), range(self.batch_size, self.count, self.batch_size))
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(self.count)
        if self._lengths is not None:
            window = self.batch_size * _WINDOW_BATCHES
            for start in range(0, self.count, window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = np.array_split(order, range(self.batch_size, self.count, self.batch_size))
        if self._lengths is not None:
            batches = [batches[place] for place in draw.permutation(len(batches))]
        return batches
