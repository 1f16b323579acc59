# SPDX-License-Identifier: Apache-2.0
"""Probing: a linear classifier on every layer of a frozen model, and one on a learned mix of the layers.

As the ELMo paper's analysis (Peters et al. 2018, 5.3) and BERT's table of layers (Devlin et al. 2019, table 7), with a
classifier that can learn nothing but what a layer holds.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._core import pictures
from ...embedding.embedder import Embedder
from ...nn import ScalarMix
from ..loop.batches import Batches
from ..readers.conll import Sentence
from . import metrics
from .features import FrozenLayers
from .tag import tag_names

_CHUNK = 8192  # words judged at a time
_SENTENCES = 512  # sentences embedded at a time
_PLOT_SIZE = (8.0, 3.2)


@dataclass(frozen=True)
class ProbeReport:
    """What probes found.

    Attributes:
        figure: "accuracy" or "f1".
        layers: the figure of every layer, the token layer first.
        mix: the figure of the learned mix of all layers.
        mix_weights: the share of every layer in it; they add up to 1.
        baseline: the figure of giving every word the tag it mostly had in training.
        words: words trained on and judged on.
        tags: number of tags.
    """

    figure: str
    layers: tuple[float, ...]
    mix: float
    mix_weights: tuple[float, ...]
    baseline: float
    words: tuple[int, int]
    tags: int

    def table(self) -> str:
        """As text: a row a layer."""
        best = max(range(len(self.layers)), key=lambda layer: self.layers[layer])
        lines = [f"layer   {self.figure:>8}   weight in the mix"]
        for layer, (score, weight) in enumerate(zip(self.layers, self.mix_weights)):
            mark = "  best layer" if layer == best else ""
            bar = "#" * round(40 * weight)
            name = f"{layer} token" if layer == 0 else str(layer)
            lines.append(f"{name:<7} {100 * score:8.2f}   {weight:5.3f} {bar}{mark}")
        lines.append(f"{'mix':<7} {100 * self.mix:8.2f}")
        lines.append(f"{'words':<7} {100 * self.baseline:8.2f}   each word's most frequent tag, no model")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def plot(self, path: str | Path, title: str = "") -> None:
        """Write a picture: figures and weights by layer.

        Raises:
            RuntimeError: matplotlib is not installed.
        """
        figure = pictures.figure_class("ctxfast.probe")(figsize=_PLOT_SIZE, layout="constrained")
        left, right = figure.subplots(1, 2)
        numbers = range(len(self.layers))
        left.plot(numbers, [100 * score for score in self.layers], "o-", label="one layer")
        left.axhline(100 * self.mix, linestyle="--", color="tab:orange", label="learned mix")
        left.axhline(100 * self.baseline, linestyle=":", color="gray", label="no model")
        left.set(xlabel="layer (0: tokens)", ylabel=f"{self.figure} (%)", title=title, xticks=list(numbers))
        left.legend()
        right.bar(numbers, self.mix_weights)
        right.set(xlabel="layer (0: tokens)", ylabel="weight in the mix", xticks=list(numbers))
        pictures.save(figure, path)


class _Probes(nn.Module):
    """K linear classifiers side by side, one for each layer, and one over a ScalarMix of all."""

    def __init__(self, num_layers: int, dim: int, num_tags: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, dim, num_tags))
        self.bias = nn.Parameter(torch.zeros(num_layers, 1, num_tags))
        self.mix = ScalarMix(num_layers)
        self.mixed = nn.Linear(dim, num_tags)

    def forward(self, layers: Tensor) -> Tensor:
        """(K, W, N) -> (K + 1, W, C), the mix last."""
        alone = torch.baddbmm(self.bias, layers, self.weight)
        return torch.cat((alone, self.mixed(self.mix(layers.unbind(0)))[None]))


class _Layers:
    """The vectors of all words of a set of sentences, in one array: (K, W, N) in the embedder's vector_dtype."""

    def __init__(self, embedder: Embedder, sentences: Sequence[Sentence]) -> None:
        frozen = FrozenLayers(embedder, "mix")
        words = sum(len(sentence.words) for sentence in sentences)
        place = 0
        # Filled part by part: a list of everything beside it would take the memory twice.
        for start in range(0, len(sentences), _SENTENCES):
            for vectors in frozen([sentence.words for sentence in sentences[start : start + _SENTENCES]]):
                if place == 0:
                    self.values = np.empty((vectors.shape[0], words, vectors.shape[2]), dtype=embedder.vector_dtype)
                self.values[:, place : place + vectors.shape[1]] = vectors
                place += vectors.shape[1]

    def rows(self, rows: Any, device: torch.device) -> Tensor:
        """(K, rows, N) float32."""
        return torch.from_numpy(self.values[:, rows]).to(device, torch.float32)


def probe(
    embedder: Embedder,
    train: Sequence[Sentence],
    dev: Sequence[Sentence],
    *,
    is_spans: bool = True,
    epochs: int = 5,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> ProbeReport:
    """Train and judge probes of every layer. Every word's vectors are computed once.

    Args:
        embedder: the frozen model; its vector_dtype is that in which vectors are kept (float16 halves the memory).
        train, dev: tagged sentences to learn from and to judge by.
        is_spans: tags are BIO spans, judged by F1; else by accuracy.
        epochs, batch_size (words), learning_rate, seed: of the probes (Adam, decaying to 0).
        say: told what is going on.

    Vectors are standardised first, each dimension of a layer by the training data's mean and deviation, so that layers
    of any scale are learned equally well and weights of the mix can be compared.

    Raises:
        ValueError: no sentences, fewer than two tags.
    """
    for name, sentences in (("train", train), ("dev", dev)):
        if not sentences:
            raise ValueError(f"ctxfast.probe: {name} is empty; expected tagged sentences.")
    names = tag_names(train)
    if len(names) < 2:
        raise ValueError(f"ctxfast.probe: train has {len(names)} tags; expected two or more to tell apart.")
    say = say or (lambda text: None)
    numbers = {name: number for number, name in enumerate(names)}
    say(f"computing {embedder.num_layers} layers of {sum(len(s.words) for s in (*train, *dev)):,} words")
    layers = _Layers(embedder, train)
    device = embedder.device
    gold = torch.tensor([numbers[tag] for sentence in train for tag in sentence.gold], device=device)
    mean, scale = _standard(layers.values, device)

    torch.manual_seed(seed)
    probes = _Probes(len(layers.values), layers.values.shape[2], len(names)).to(device)
    optimizer = torch.optim.Adam(probes.parameters(), lr=learning_rate)
    batches = Batches(len(gold), batch_size, seed)
    steps = batches.steps(epochs)
    for step in range(steps):
        rows = batches(step)
        logits = probes((layers.rows(rows, device) - mean) / scale)
        # Each probe's own mean loss: no probe has a part in another's gradient.
        target = gold[rows].expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / len(rows)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % batches.per_epoch == 0:
            say(f"epoch {(step + 1) // batches.per_epoch} of {epochs}: mean loss {loss.item() / len(logits):.4f}")
    words = layers.values.shape[1]
    del layers
    held_out = _Layers(embedder, dev)
    best = []
    with torch.no_grad():
        for start in range(0, held_out.values.shape[1], _CHUNK):
            part = held_out.rows(slice(start, start + _CHUNK), device)
            best.append(probes((part - mean) / scale).argmax(-1).cpu())
    predicted = torch.cat(best, 1)
    figure = "f1" if is_spans else "accuracy"
    scores = [_score(figure, dev, [names[k] for k in row]) for row in predicted.tolist()]
    shares = torch.cat(list(probes.mix.scalar_parameters)).softmax(0).tolist()
    return ProbeReport(
        figure=figure,
        layers=tuple(scores[:-1]),
        mix=scores[-1],
        mix_weights=tuple(shares),
        baseline=_score(figure, dev, _usual_tags(train, dev)),
        words=(words, held_out.values.shape[1]),
        tags=len(names),
    )


def _standard(values: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every dimension of every layer, (K, 1, N)."""
    means, scales = [], []
    for layer in values:
        wide = layer.astype(np.float64)
        means.append(wide.mean(0))
        scales.append(np.maximum(wide.std(0), 1e-6))
    stack = [torch.from_numpy(np.stack(part)[:, None]).to(device, torch.float32) for part in (means, scales)]
    return stack[0], stack[1]


def _score(figure: str, sentences: Sequence[Sentence], tags: list[str]) -> float:
    gold = [sentence.gold for sentence in sentences]
    predicted, start = [], 0
    for own in gold:
        predicted.append(tags[start : start + len(own)])
        start += len(own)
    if figure == "accuracy":
        return metrics.token_accuracy(gold, predicted)
    return metrics.entity_scores(gold, predicted)["f1"]


def _usual_tags(train: Sequence[Sentence], dev: Sequence[Sentence]) -> list[str]:
    """For each word of dev the tag it mostly has in train; for a word that is not there, the most frequent of all."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    overall: collections.Counter[str] = collections.Counter()
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.gold):
            counts[word][tag] += 1
            overall[tag] += 1
    usual = overall.most_common(1)[0][0]
    return [
        counts[word].most_common(1)[0][0] if word in counts else usual for sentence in dev for word in sentence.words
    ]
