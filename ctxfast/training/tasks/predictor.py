# SPDX-License-Identifier: Apache-2.0
"""The interface of every fine-tuned model, and its adapter to the training loop."""

from __future__ import annotations

import collections
import functools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._core.checks import shown
from ..._core.files import replacing
from ..loop.batches import Batches
from ..loop.task import BaseTask
from ..loop.train import moved
from ..readers.files import fail

SETTINGS_FILE = "ctxfast_task.json"
FORMAT = 1
IGNORE = -100
# Texts of a batch without gradients: enough to fill a CPU; texts of similar length come together.
_PREDICT_BATCH = 32


class Predictor(ABC):
    """A model and what it needs to read examples, to predict and to be stored.

    Attributes:
        task: "classify", "pair", "tag", "span" or "coref".
        form: "bert" (all layers trained), "features" (frozen encoder), "elmo" (trained with its head) or "words".
        model: what is trained.
        labels: names of the classes, by number; () where there are none.
        is_spans: whether labels are tags of spans.
        options: plain values that reading examples depends on; stored with the model.
        predict_batch: items of a batch without gradients.
    """

    task: str
    form: str
    model: nn.Module
    labels: tuple[str, ...] = ()
    is_spans = False
    options: dict[str, Any]
    predict_batch = _PREDICT_BATCH

    @functools.cached_property
    def lost(self) -> collections.Counter[str]:
        """Counts of what the model does not see of the examples so far, by description: "texts of more than 128 tokens,
        cut"."""
        return collections.Counter()

    @property
    @abstractmethod
    def main_figure(self) -> str:
        """The metric of ``scores`` by which the best model is chosen."""

    @abstractmethod
    def items(self, examples: Sequence[Any]) -> list[Any]:
        """Examples as ``collate`` takes them, labels included where they have some; each has a ``length``, tokens the
        model sees. An example may become several (windows)."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch, on the CPU: the arguments of the model."""

    @abstractmethod
    def predict(self, examples: Sequence[Any], items: Sequence[Any] | None = None) -> list[Any]:
        """Predictions, in the order of the examples; ``items`` are theirs, if they were made before."""

    @abstractmethod
    def scores(self, examples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Metrics of predictions for examples with labels."""

    @abstractmethod
    def write_predictions(self, path: Path, examples: Sequence[Any], predictions: Sequence[Any]) -> list[Path]:
        """Write predictions into a file (see each task for its format), whole or not at all."""

    @abstractmethod
    def save_model(self, directory: Path) -> None:
        """Write the model's own files."""

    def weight(self, batch: dict[str, Any]) -> float:
        """The weight of a batch's mean loss: its number of examples."""
        return float(next(iter(batch.values())).shape[0])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write everything ``load`` needs into a directory, made if absent."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save_model(directory)
        settings = {
            "format": FORMAT,
            "task": self.task,
            "form": self.form,
            "labels": list(self.labels),
            "options": self.options,
        }
        with replacing(directory / SETTINGS_FILE) as temporary:
            temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def outputs(self, items: Sequence[Any]) -> Iterable[tuple[list[Any], Any]]:
        """Items, grouped by similar length, and the model's output for them; meanwhile it is in eval mode."""
        was_training, device = self.model.training, self.device
        self.model.eval()
        try:
            order = sorted(range(len(items)), key=lambda index: items[index].length)
            for start in range(0, len(order), self.predict_batch):
                chosen = [items[index] for index in order[start : start + self.predict_batch]]
                batch = self.collate(chosen)
                batch.pop("labels", None)
                yield chosen, self.model(**moved(batch, device))
        finally:
            self.model.train(was_training)


class FineTune(BaseTask):
    """A predictor as a task of the training loop.

    Args:
        predictor: what is trained.
        train: its examples.
        dev: held-out examples, for ``evaluate``.
        batch_size: items of a batch.
        seed: of their order.
        order: "shuffled", or "length": examples of similar length together, for models that pay for padding.

    Raises:
        ValueError: an unknown order, no examples.
    """

    def __init__(
        self,
        predictor: Predictor,
        train: Sequence[Any],
        dev: Sequence[Any] = (),
        *,
        batch_size: int = 32,
        seed: int = 0,
        order: str = "shuffled",
    ) -> None:
        if order not in ("shuffled", "length"):
            raise ValueError(f"ctxfast.finetune: order is {order!r}; expected 'shuffled' or 'length'.")
        self.predictor, self.model, self.dev = predictor, predictor.model, dev
        self.unit = "tokens" if predictor.form == "bert" else "words"
        self.items = predictor.items(train)
        self._dev_items: list[Any] | None = None
        lengths = [item.length for item in self.items] if order == "length" else None
        self.batches = Batches(len(self.items), batch_size, seed, lengths)

    def batch(self, step: int, rank: int, ranks: int) -> dict[str, Any]:
        return self.predictor.collate([self.items[index] for index in self.batches(step, rank, ranks)])

    def weight(self, batch: dict[str, Any]) -> float:
        return self.predictor.weight(batch)

    def size(self, batch: dict[str, Any]) -> int:
        lengths = batch["lengths"]
        return int(lengths.sum()) if isinstance(lengths, Tensor) else sum(lengths)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return model(**batch).loss, {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if not self.dev:
            return {}
        if self._dev_items is None:
            self._dev_items = self.predictor.items(self.dev)
        own, self.predictor.model = self.predictor.model, model
        try:
            return self.predictor.scores(self.dev, self.predictor.predict(self.dev, self._dev_items))
        finally:
            self.predictor.model = own

    def save(self, directory: Path) -> None:
        own, self.predictor.model = self.predictor.model, self.model
        try:
            self.predictor.save(directory)
        finally:
            self.predictor.model = own


def label_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Name to number."""
    return {label: number for number, label in enumerate(labels)}


def check_label(path: Any, line: int, label: str, known: Collection[str]) -> None:
    """Refuse a label that does not occur in the training data.

    Raises:
        ValueError: with file, line and the labels there are.
    """
    if label not in known:
        names = ", ".join(map(repr, sorted(known)[:12])) + (", ..." if len(known) > 12 else "")
        reason = f"label {shown(label)} does not occur in the training data, which has {names}"
        raise fail(path, f"line {line}", f"{reason}. Correct it, or count such labels as wrong (--unseen keep)")


def pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of numbers -> (B, longest) int64."""
    width = max((len(row) for row in rows), default=0)
    result = torch.full((len(rows), width), fill, dtype=torch.int64)
    for k, row in enumerate(rows):
        result[k, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return result


def write_text(path: Path, text: str) -> Path:
    """A text file, whole or not at all; its directory is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
