# SPDX-License-Identifier: Apache-2.0
"""Pretraining of ELMo's bidirectional language model, as bilm-tf does it.

Lanes of running text; the LSTMs' state is carried from step to step and gradients go back one step's window; two
directions share characters, projections and the output layer, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ... import functional
from ...models.elmo.bilm import ElmoBiLm
from ...models.elmo.config import ElmoConfig
from ...models.elmo.weights import load_weights, random_weights, save_weights
from ..loop.train import BaseTask, moved
from .bilm_corpus import BiLmCorpus, Window, read_vocabulary
from .sampled_softmax import log_uniform_negatives, sampled_softmax_loss

_WHO = "ctxfast.training.BiLmPretraining"
_EVALUATION_STEPS = 64


class BiLmWithSoftmax(nn.Module):
    """A biLM and the output layer that both directions share.

    Args:
        config: sizes.
        vocabulary_size: V, words of the output layer.
        dropout: of every layer's input and the top layer's output.
        impl: implementation of every op; None chooses.

    Parameters: ``bilm.`` those of ``ElmoBiLm``; ``softmax.{weight (V, P), bias (V,)}``.

    Reference: Peters et al. 2018; bilm-tf's training graph.
    """

    def __init__(
        self, config: ElmoConfig, vocabulary_size: int, dropout: float = 0.1, *, impl: str | None = None
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{_WHO}: dropout is {dropout}; expected a probability, 0 <= p < 1.")
        self.config, self.dropout, self.impl = config, dropout, impl
        self.bilm = ElmoBiLm(config, requires_grad=True, impl=impl)
        self.softmax = nn.Linear(config.projection_dim, vocabulary_size)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """First weights, drawn as bilm-tf draws them."""
        self.bilm.load_state_dict(random_weights(self.config, seed))
        draw = torch.Generator().manual_seed(seed + 1)
        self.softmax.weight.normal_(0, self.config.projection_dim**-0.5, generator=draw)
        self.softmax.bias.zero_()

    def top(
        self, words: Tensor, inputs: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Top layer of both directions, (B, U, P) each, the backward one in the order it reads; and the new state.

        Args:
            words: (W, C) character ids.
            inputs: (2, B, U) rows of ``words``.
            state: as ``ElmoLstm`` takes it.
        """
        vectors = self.bilm._token_embedder.encode(words)
        forward, backward = F.embedding(inputs[0], vectors), F.embedding(inputs[1], vectors)
        # The backward LSTM walks from the last step to the first; what it reads comes in its own order.
        sides = (forward, backward.flip(1))
        if state is not None:
            state = tuple(value.to(vectors.dtype) for value in state)
        layers, state = self.bilm._elmo_lstm.layers(sides, None, state, input_dropout=self.dropout)
        forward, backward = layers[-1].split(self.config.projection_dim, dim=2)
        return forward, backward.flip(1), tuple(value.detach().float() for value in state)

    def forward(
        self,
        words: Tensor,
        inputs: Tensor,
        targets: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        negatives: Tensor | None = None,
        tries: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Losses of both directions.

        Args:
            words, inputs, state: see ``top``.
            targets: (2, B, U) ids of the vocabulary, -100 where there is none.
            negatives, tries: (2, S) and (2,) of ``log_uniform_negatives`` for a sampled softmax; None for a full one.

        Returns:
            (2,) mean losses (a direction's sum over all its targets for a full softmax outside training), and the
            state after the last step.
        """
        forward, backward, state = self.top(words, inputs, state)
        losses = []
        for direction, hidden in enumerate((forward, backward)):
            hidden = F.dropout(hidden, self.dropout, self.training).flatten(0, 1)
            labels = targets[direction].flatten()
            weight, bias = self.softmax.weight, self.softmax.bias
            if negatives is not None:
                loss = sampled_softmax_loss(hidden, weight, bias, labels, negatives[direction], tries[direction])
            else:
                reduction = "mean" if self.training else "sum"
                loss = functional.linear_cross_entropy(
                    hidden.to(weight.dtype), weight, labels, bias, reduction=reduction, impl=self.impl
                )
            losses.append(loss)
        return torch.stack(losses), state


@dataclass(frozen=True)
class BiLmBatch:
    """A window of every lane: ``words`` (W, C), ``inputs`` and ``targets`` (2, B, U), negatives (2, S)."""

    words: Tensor
    inputs: Tensor
    targets: Tensor
    negatives: Tensor | None
    tries: Tensor | None


class BiLmPretraining(BaseTask):
    """Trains a biLM on a prepared text.

    Args:
        corpus: the text.
        config: sizes.
        held_out: text that is judged, prepared with the same vocabulary; None for none.
        batch_size: lanes of a process.
        unroll: steps of a window: how far gradients go back.
        negatives: words of the sampled softmax, new ones each step and direction; 0 for a full softmax.
        dropout: see ``BiLmWithSoftmax``.
        scale_by_unroll: the loss that gradients are taken of is multiplied by ``unroll``, as bilm-tf does; it matters
            to clipping and to Adagrad's start.
        seed: of first weights, of lanes' starts and of negatives.
        impl: implementation of every op; None chooses.

    Where a lane starts is drawn anew for each epoch, at a sentence; it reads on from there, its state carried, from
    epoch to epoch too.

    Raises:
        ValueError: a text too short for its lanes, or values out of range.

    Reference: Peters et al. 2018, section 3.4; bilm-tf.
    """

    def __init__(
        self,
        corpus: BiLmCorpus,
        config: ElmoConfig,
        *,
        held_out: BiLmCorpus | None = None,
        batch_size: int = 128,
        unroll: int = 20,
        negatives: int = 8192,
        dropout: float = 0.1,
        scale_by_unroll: bool = True,
        seed: int = 0,
        impl: str | None = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("unroll", unroll, 1), ("negatives", negatives, 0)):
            if value < least:
                raise ValueError(f"{_WHO}: {name} is {value}; expected {least} or more.")
        if held_out is not None and held_out.vocabulary != corpus.vocabulary:
            raise ValueError(f"{_WHO}: held_out has another vocabulary than corpus; prepare it with corpus.vocabulary.")
        size = len(corpus.vocabulary)
        if negatives >= size:
            raise ValueError(
                f"{_WHO}: negatives is {negatives}; expected fewer than the {size} words of the vocabulary, or 0 for "
                "a full softmax."
            )
        self.corpus, self.held_out, self.config = corpus, held_out, config
        self.batch_size, self.unroll, self.negatives, self.seed = batch_size, unroll, negatives, seed
        self._scale = unroll if scale_by_unroll else 1
        self.model = BiLmWithSoftmax(config, size, dropout, impl=impl)
        self.model.initialize(seed)
        self._state: tuple[Tensor, Tensor] | None = None
        self._lane_starts = lru_cache(maxsize=2)(self._make_lane_starts)

    def windows_per_epoch(self, ranks: int = 1) -> int:
        """Micro-batches of an epoch of one process.

        Raises:
            ValueError: the text is shorter than a window of every lane.
        """
        lanes = self.batch_size * ranks
        windows = self.corpus.positions // (lanes * self.unroll)
        if windows < 1:
            raise ValueError(
                f"{_WHO}: the text has {self.corpus.positions:,} predictions; expected at least {lanes} lanes of "
                f"{self.unroll} = {lanes * self.unroll:,}. Lower the batch size, or give more text."
            )
        return windows

    def _make_lane_starts(self, epoch: int, ranks: int) -> list[int]:
        lanes, total = self.batch_size * ranks, self.corpus.positions
        shift = int(np.random.default_rng((self.seed, epoch)).integers(total))
        return [self.corpus.sentence_start(lane * total // lanes + shift) for lane in range(lanes)]

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> BiLmBatch:
        epoch, place = divmod(step, self.windows_per_epoch(ranks))
        starts = self._lane_starts(epoch, ranks)[rank * self.batch_size : (rank + 1) * self.batch_size]
        window = self.corpus.window([start + place * self.unroll for start in starts], self.unroll)
        negatives = tries = None
        if self.negatives:
            draw = np.random.default_rng((self.seed, step, rank))
            size = len(self.corpus.vocabulary)
            pairs = [log_uniform_negatives(draw, self.negatives, size) for _ in range(2)]
            negatives = torch.from_numpy(np.stack([words for words, _ in pairs]))
            tries = torch.tensor([count for _, count in pairs])
        return BiLmBatch(*self._tensors(self.corpus, window), negatives, tries)

    @staticmethod
    def _tensors(corpus: BiLmCorpus, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        words, inputs = np.unique(window.inputs, return_inverse=True)
        characters = torch.from_numpy(corpus.characters[words].astype(np.int64))
        inputs = torch.from_numpy(inputs.reshape(window.inputs.shape))
        return characters, inputs, torch.from_numpy(window.targets)

    def loss(self, model: nn.Module, batch: BiLmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, self._state = model(batch.words, batch.inputs, batch.targets, self._state, batch.negatives, batch.tries)
        mean = losses.mean()
        return mean * self._scale, {"loss": mean, "loss_forward": losses[0], "loss_backward": losses[1]}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Losses and perplexities of the held-out text under the full softmax, every word predicted once each way."""
        if self.held_out is None:
            return {}
        text, device = self.held_out, self.model.softmax.weight.device
        lanes = max(1, min(self.batch_size, text.positions // _EVALUATION_STEPS))
        edges = [lane * text.positions // lanes for lane in range(lanes + 1)]
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        state = None
        for start in range(0, max(end - begin for begin, end in zip(edges, edges[1:])), _EVALUATION_STEPS):
            starts = [edge + start for edge in edges[:-1]]
            window = text.window(starts, _EVALUATION_STEPS, edges[1:])
            words, inputs, targets = moved(self._tensors(text, window), device)
            losses, state = model(words, inputs, targets, state)
            totals += losses
        forward, backward = (totals / text.positions).tolist()
        both = (forward + backward) / 2
        return {
            "loss": both,
            "perplexity": math.exp(min(both, 700.0)),
            "perplexity_forward": math.exp(min(forward, 700.0)),
            "perplexity_backward": math.exp(min(backward, 700.0)),
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [value for value in self.model.parameters() if value.requires_grad]}]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._state is None else {"h": self._state[0], "c": self._state[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.model.softmax.weight.device
        self._state = (state["h"].to(device), state["c"].to(device)) if state else None

    def save(self, directory: Path) -> None:
        """options.json and weights.hdf5 as AllenNLP and bilm-tf read them; vocabulary.txt, softmax.safetensors."""
        state = self.model.bilm.state_dict()
        save_weights(state, self.config, directory / "options.json", directory / "weights.hdf5")
        text = "".join(f"{word}\n" for word in self.corpus.vocabulary)
        (directory / "vocabulary.txt").write_text(text, encoding="utf-8")
        layer = {name: value.detach().cpu().contiguous() for name, value in self.model.softmax.state_dict().items()}
        save_file(layer, directory / "softmax.safetensors")

    def start_from(self, directory: Path) -> None:
        """Take the weights of a model that ``save`` wrote, or of any ELMo folder (then without its output layer).

        Raises:
            ValueError: weights of other sizes, or an output layer over another vocabulary.
        """
        _, state = load_weights(directory / "weights.hdf5", self.config)
        self.model.bilm.load_state_dict(state)
        if (directory / "softmax.safetensors").is_file():
            if read_vocabulary(directory / "vocabulary.txt") != self.corpus.vocabulary:
                raise ValueError(
                    f"{_WHO}: {directory}/vocabulary.txt is not the text's vocabulary; pass it as --vocab, so that "
                    "the output layer fits."
                )
            self.model.softmax.load_state_dict(load_file(directory / "softmax.safetensors"))
