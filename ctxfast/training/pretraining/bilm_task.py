# SPDX-License-Identifier: Apache-2.0
"""Pretraining of ELMo's bidirectional language model, as bilm-tf does it.

Lanes of running text; the LSTMs' state is carried from step to step and gradients go back one step's window; two
directions share characters, projections and the output layer, and nothing else.

Unlike in bilm-tf, lanes restart from zeros, at documents and now and then elsewhere. A state that is carried from the
first step to the last never comes near zero again, and a network that has only seen the region where its lanes are may
be useless when started from zeros (held-out perplexity 363 from a carried state, 39,068 from zeros was seen).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
from ...models.elmo.files import STEADY_STATE, find_elmo_files
from ...models.elmo.weights import load_weights, random_weights, save_weights
from ..loop.task import BaseTask
from ..loop.train import moved
from .bilm_corpus import BiLmCorpus, Window, read_vocabulary
from .sampled_softmax import log_uniform_negatives, sampled_softmax_loss

_WHO = "ctxfast.training.BiLmPretraining"
_EVALUATION_STEPS = 64
# Predictions of a batch of sentences that are judged from zeros, padding included.
_EVALUATION_PREDICTIONS = 8192
# A lane restarts at a document at most once in so many windows, not at each of many short ones.
_WINDOWS_OF_A_DOCUMENT = 4
_CALIBRATION_SENTENCES = 512


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


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
        """Initial weights, drawn as bilm-tf draws them."""
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
            state = (state[0].to(vectors.dtype), state[1].to(vectors.dtype))
        layers, state = self.bilm._elmo_lstm.layers(sides, None, state, input_dropout=self.dropout)
        forward, backward = layers[-1].split(self.config.projection_dim, dim=2)
        return forward, backward.flip(1), (state[0].detach().float(), state[1].detach().float())

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
            if negatives is not None and tries is not None:
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
    """A window of every lane: ``words`` (W, C), ``inputs`` and ``targets`` (2, B, U), ``is_new`` (B,) bool for lanes
    that restart, negatives (2, S)."""

    words: Tensor
    inputs: Tensor
    targets: Tensor
    is_new: Tensor
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
        restart: probability that a lane begins anew with a window: from zeros, at the start of a sentence. It does so
            at documents too. 0 with a text of one document: states are carried through an epoch, as in bilm-tf.
        scale_by_unroll: the loss that gradients are taken of is multiplied by ``unroll``, as bilm-tf does; it matters
            to clipping and to Adagrad's start.
        seed: of first weights, of lanes' starts and of negatives.
        impl: implementation of every op; None chooses.

    Where a lane starts is drawn anew for each epoch, at a sentence and from zeros; it reads on from there, its state
    carried, until it restarts.

    Raises:
        ValueError: a text too short for its lanes, or values out of range.

    Reference: Peters et al. 2018, section 3.4; bilm-tf.
    """

    model: BiLmWithSoftmax
    unit = "words"  # a sentence's end is one

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
        restart: float = 0.05,
        scale_by_unroll: bool = True,
        seed: int = 0,
        impl: str | None = None,
    ) -> None:
        if not 0.0 <= restart <= 1.0:
            raise ValueError(f"{_WHO}: restart is {restart}; expected a probability, 0 <= p <= 1.")
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
        self._restart, self._scale = restart, unroll if scale_by_unroll else 1
        self.model = BiLmWithSoftmax(config, size, dropout, impl=impl)
        self.model.initialize(seed)
        self._state: tuple[Tensor, Tensor] | None = None
        self._lanes = lru_cache(maxsize=2)(self._make_lanes)

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

    def _make_lanes(self, epoch: int, ranks: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each lane of an epoch the windows with which it restarts, and the positions at which it does."""
        lanes, total, unroll = self.batch_size * ranks, self.corpus.positions, self.unroll
        windows = self.windows_per_epoch(ranks)
        draw = np.random.default_rng((self.seed, epoch))
        shift = int(draw.integers(total))
        nominal = (np.arange(lanes) * total // lanes + shift) % total
        documents = self.corpus.documents
        plan = []
        for start in nominal:
            drawn = np.flatnonzero(draw.random(windows) < self._restart) if self._restart else np.empty(0, np.int64)
            found = np.union1d(drawn, [0])
            places = self.corpus.sentence_starts(start + found * unroll)
            # A document that begins within a window: the next one begins with it.
            last = start + (windows - 1) * unroll
            edges = np.searchsorted(documents, np.array([start, min(last, total), max(last - total, 0)]))
            ahead = np.concatenate([documents[edges[0] : edges[1]], documents[: edges[2]] + total]) - start
            _, first = np.unique(ahead // (unroll * _WINDOWS_OF_A_DOCUMENT), return_index=True)
            ahead = ahead[first]
            found = np.concatenate([-(-ahead // unroll), found])
            places = np.concatenate([(start + ahead) % total, places])
            found, first = np.unique(found, return_index=True)  # a document goes before a sentence
            plan.append((found, places[first]))
        return plan

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> BiLmBatch:
        epoch, place = divmod(step, self.windows_per_epoch(ranks))
        starts, is_new = [], []
        for windows, places in self._lanes(epoch, ranks)[rank * self.batch_size : (rank + 1) * self.batch_size]:
            last = int(np.searchsorted(windows, place, side="right")) - 1
            starts.append(int(places[last]) + (place - int(windows[last])) * self.unroll)
            is_new.append(place == windows[last])
        window = self.corpus.window(starts, self.unroll)
        negatives = tries = None
        if self.negatives:
            draw = np.random.default_rng((self.seed, step, rank))
            size = len(self.corpus.vocabulary)
            pairs = [log_uniform_negatives(draw, self.negatives, size) for _ in range(2)]
            negatives = torch.from_numpy(np.stack([words for words, _ in pairs]))
            tries = torch.tensor([count for _, count in pairs])
        return BiLmBatch(*self._tensors(self.corpus, window), torch.tensor(is_new), negatives, tries)

    def size(self, batch: BiLmBatch) -> int:
        return batch.targets[0].numel()

    @staticmethod
    def _tensors(corpus: BiLmCorpus, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        words, inputs = np.unique(window.inputs, return_inverse=True)
        characters = torch.from_numpy(corpus.characters[words].astype(np.int64))
        inputs = torch.from_numpy(inputs.reshape(window.inputs.shape))
        return characters, inputs, torch.from_numpy(window.targets)

    def loss(self, model: nn.Module, batch: BiLmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        state = self._state
        if state is not None:
            is_new = batch.is_new[:, None]
            state = (state[0].masked_fill(is_new, 0.0), state[1].masked_fill(is_new, 0.0))
        losses, self._state = model(batch.words, batch.inputs, batch.targets, state, batch.negatives, batch.tries)
        mean = losses.mean()
        return mean * self._scale, {"loss": mean, "loss_forward": losses[0], "loss_backward": losses[1]}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Losses and perplexities of the held-out text under the full softmax, every word predicted once each way.

        "warm": from the state that running text leaves; "zero": every sentence from zeros. ``loss`` and
        ``perplexity``, means over both directions, are those of the start that is worse, so that a model is the best
        one only if it is good from both.
        """
        text = self.held_out
        if text is None:
            return {}
        losses = {"warm": self._warm_losses(model, text), "zero": self._zero_losses(model, text)}
        means = {start: sum(values) / 2 for start, values in losses.items()}
        worse = max(means.values())
        figures = {"loss": worse, "perplexity": _perplexity(worse)}
        for start, values in losses.items():
            figures[f"perplexity_{start}"] = _perplexity(means[start])
            for direction, value in zip(("forward", "backward"), values):
                figures[f"perplexity_{start}_{direction}"] = _perplexity(value)
        return figures

    def _warm_losses(self, model: nn.Module, text: BiLmCorpus) -> list[float]:
        """Mean losses of both directions over the held-out text, read in lanes that carry their state."""
        steps = _EVALUATION_STEPS
        lanes = max(1, min(self.batch_size, text.positions // steps))
        edges = [lane * text.positions // lanes for lane in range(lanes + 1)]
        totals, state = None, None
        # The window before a lane's first word warms it up.
        for start in range(-steps, max(end - begin for begin, end in zip(edges, edges[1:])), steps):
            ends = edges[:-1] if start < 0 else edges[1:]
            losses, state = self._judge(model, text, [edge + start for edge in edges[:-1]], steps, ends, state)
            if start >= 0:
                totals = losses.double() if totals is None else totals + losses
        assert totals is not None  # no text is without words
        return (totals / text.positions).tolist()

    def _zero_losses(self, model: nn.Module, text: BiLmCorpus) -> list[float]:
        """Mean losses of both directions over the held-out text, every sentence read from zeros."""
        lengths = np.diff(text.starts)
        order = np.argsort(lengths, kind="stable")
        totals, first = None, 0
        while first < len(order):
            # As many sentences as fit, padded to the longest of them.
            last = first + 1
            while last < len(order) and (last + 1 - first) * lengths[order[last]] <= _EVALUATION_PREDICTIONS:
                last += 1
            rows, state = order[first:last], None
            for start in range(0, int(lengths[order[last - 1]]), _EVALUATION_PREDICTIONS):
                steps = min(_EVALUATION_PREDICTIONS, int(lengths[order[last - 1]]) - start)
                losses, state = self._judge(model, text, text.starts[rows] + start, steps, text.starts[rows + 1], state)
                totals = losses.double() if totals is None else totals + losses
            first = last
        assert totals is not None  # no text is without words
        return (totals / text.positions).tolist()

    def _judge(
        self,
        model: nn.Module,
        text: BiLmCorpus,
        starts: Iterable[int],
        steps: int,
        ends: Iterable[int],
        state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Summed losses (2,) of a window of the held-out text, and the state after it."""
        window = text.window([int(start) for start in starts], steps, [int(end) for end in ends])
        words, inputs, targets = moved(self._tensors(text, window), self.model.softmax.weight.device)
        return model(words, inputs, targets, state)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [value for value in self.model.parameters() if value.requires_grad]}]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._state is None else {"h": self._state[0], "c": self._state[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.model.softmax.weight.device
        self._state = (state["h"].to(device), state["c"].to(device)) if state else None

    def save(self, directory: Path) -> None:
        """options.json and weights.hdf5 as AllenNLP and bilm-tf read them; steady_state.safetensors, from which
        ``ElmoBiLm`` starts texts by ``state="steady"``; vocabulary.txt, softmax.safetensors."""
        state = self.model.bilm.state_dict()
        save_weights(state, self.config, directory / "options.json", directory / "weights.hdf5")
        self._calibrate()
        self.model.bilm.save_steady_state(directory / STEADY_STATE)
        text = "".join(f"{word}\n" for word in self.corpus.vocabulary)
        (directory / "vocabulary.txt").write_text(text, encoding="utf-8")
        layer = {name: value.detach().cpu().contiguous() for name, value in self.model.softmax.state_dict().items()}
        save_file(layer, directory / "softmax.safetensors")

    def _calibrate(self) -> None:
        """The steady state over running text of the corpus, from as many places as there are lanes."""
        lanes = 4
        count = min(_CALIBRATION_SENTENCES, self.corpus.num_sentences)
        each = -(-count // lanes)
        first = [lane * (self.corpus.num_sentences - each) // lanes for lane in range(lanes)]
        # Lanes read side by side: sentence i of all of them, then i + 1.
        chosen = [min(start + i, self.corpus.num_sentences - 1) for i in range(each) for start in first]
        self.model.bilm.calibrate((self.corpus.words(number) for number in chosen), lanes=lanes)

    def start_from(self, directory: Path) -> None:
        """Take the weights of a model that ``save`` wrote, or of any ELMo folder (then without its output layer).

        Raises:
            ValueError: weights of other sizes, or an output layer over another vocabulary.
        """
        files = find_elmo_files(directory, _WHO)
        if files is None:
            raise ValueError(f"{_WHO}: {directory} holds a BERT model; expected options.json and ELMo's weights.")
        _, state = load_weights(files[1], self.config)
        self.model.bilm.load_state_dict(state)
        if (directory / "softmax.safetensors").is_file():
            if read_vocabulary(directory / "vocabulary.txt") != self.corpus.vocabulary:
                raise ValueError(
                    f"{_WHO}: {directory}/vocabulary.txt is not the text's vocabulary; pass it as --vocab, so that "
                    "the output layer fits."
                )
            self.model.softmax.load_state_dict(load_file(directory / "softmax.safetensors"))
